"""The rows of a sweep as a table, a picture and a page, in which the best of each metric is marked."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.io.chart import Chart, Curve, charts_png
from tread_composer.io.files import write_atomically
from tread_composer.io.page import Report, flat, in_words
from tread_composer.io.table import text_table

__all__ = ['best_rows', 'format_sweep', 'write_sweep']

Rows = Sequence[Mapping[str, Any]]

_SCALE = 'guidance_scale'


def best_rows(rows: Rows) -> dict[str, int]:
    """The position of the best row for each metric, the first of equals; a cost is no quality, and has none."""
    directions, best = {metric: better for row in rows for metric, better in row['better'].items()}, {}
    for metric, better in directions.items():
        sign = 1 if better == 'lower' else -1  # the smallest of sign * value is the best
        measured = [(sign * row['values'][metric], i) for i, row in enumerate(rows) if metric in row['values']]
        best[metric] = min(measured)[1]
    return best


def format_sweep(rows: Rows) -> str:
    """The rows as a table for a terminal; ``*`` marks the best of each metric."""
    head, cells, best = _table(rows)
    for i, j in best:
        cells[i][j] = f'*{cells[i][j]}'
    return f'{text_table(head, cells, "r")}\n* best of its column'


def write_sweep(rows: Rows, folder: str | Path, contract: Mapping[str, Any], command: str) -> list[Path]:
    """Write ``sweep.csv``, ``sweep.png`` and ``sweep.html``; returns the files.

    ``contract``, what the rows have in common, and ``command``, by which one gets the same again, stand in the page.
    """
    paths = [Path(folder) / f'sweep.{ending}' for ending in ('csv', 'png', 'html')]
    table, best, charts = io.StringIO(), best_rows(rows), _charts(rows)
    writer = csv.DictWriter(table, [*_names(rows), *_metrics(rows), 'seconds', 'best'], lineterminator='\n')
    writer.writeheader()
    for i, row in enumerate(rows):
        won = ' '.join(metric for metric, index in best.items() if index == i)
        seconds = f'{row["seconds"]:.1f}'
        writer.writerow({**flat(row['settings']), **row['values'], 'seconds': seconds, 'best': won})
    write_atomically(paths[0], table.getvalue().encode())
    write_atomically(paths[1], charts_png([charts[start : start + 3] for start in range(0, len(charts), 3)]))
    _page(rows, charts, contract, command).write(paths[2])
    return paths


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in flat(row['settings'])))


def _metrics(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row['values']))


def _table(rows: Rows) -> tuple[list[str], list[list[str]], list[tuple[int, int]]]:
    """Head, cells, and the positions of the best ones."""
    names, metrics = _names(rows), _metrics(rows)
    cells = []
    for row in rows:
        figures = {name: f'{value:.4g}' for name, value in row['values'].items()}
        texts = {**flat(row['settings']), **figures}
        cells.append([texts.get(name, '') for name in (*names, *metrics)])
    best = [(index, len(names) + metrics.index(metric)) for metric, index in best_rows(rows).items()]
    return [*names, *metrics], cells, best


def _charts(rows: Rows) -> list[Chart]:
    """A chart for each quality: against the guidance scale if that varies, else in the order of the rows."""
    scales = {row['settings'].get(_SCALE) for row in rows}
    swept = len(scales) > 1 and all(isinstance(scale, int | float) for scale in scales)
    lines = _lines(rows) if swept else {'rows, in their order': list(enumerate(rows, 1))}
    best, charts = best_rows(rows), []
    for metric in best or _metrics(rows):
        curves = []
        for number, (name, line) in enumerate(lines.items()):
            # A row may be of a sweep of other metrics
            measured = sorted([(x, row) for x, row in line if metric in row['values']], key=lambda pair: pair[0])
            marked = [i for i, (_, row) in enumerate(measured) if metric in best and row is rows[best[metric]]]
            points = [(x, row['values'][metric]) for x, row in measured]
            curves.append(Curve(name, points, number, marked[0] if marked else None))
        label = f'{metric} ({rows[best[metric]]["better"][metric]} is better)' if metric in best else metric
        charts.append(Chart('guidance scale' if swept else 'row of the table', label, curves))
    return charts


def _lines(rows: Rows) -> dict[str, list[tuple[float, Mapping[str, Any]]]]:
    """The rows of each line with their guidance scale: a line for each combination of the other settings."""
    settings = [flat(row['settings']) for row in rows]
    # A setting that is the same everywhere says nothing in a legend.
    varying = [name for name in _names(rows) if name != _SCALE and len({texts.get(name) for texts in settings}) > 1]
    lines: dict[str, list[tuple[float, Mapping[str, Any]]]] = {}
    members: dict[str, dict[str, str]] = {}  # settings of a row of each line
    # Without guidance all lines of the same weights meet: that row is a point of each. It comes behind the others.
    for row, texts in sorted(zip(rows, settings, strict=True), key=lambda pair: pair[1].get('guidance') == 'none'):
        common = {name: text for name, text in texts.items() if not name.startswith('guidance')}.items()
        meeting = [line for line, member in members.items() if common <= member.items()]
        line_name = ', '.join(f'{name} {texts[name]}' for name in varying if texts.get(name, 'none') != 'none')
        for line in meeting if meeting and texts.get('guidance') == 'none' else [line_name or 'all rows']:
            members.setdefault(line, texts)
            lines.setdefault(line, []).append((float(row['settings'][_SCALE]), row))
    return lines


def _page(rows: Rows, charts: Sequence[Chart], contract: Mapping[str, Any], command: str) -> Report:
    head, cells, best = _table(rows)
    page = Report('Sweep of sampling settings', f'{len(rows)} rows; the best of each metric is marked.')
    winners = [(metric, rows[i]) for metric, i in best_rows(rows).items()]
    page.tiles([(f'{row["values"][m]:.4g}', f'best {m}: {in_words(row["settings"])}') for m, row in winners])
    page.charts(charts).heading('All rows').table(head, cells, best)
    page.text(
        'The best of many rows is better than it would be on new samples: each row has an error of its own, and the '
        'luckiest is picked. Measure the chosen settings again with another seed before reporting them.',
        soft=True,
    )
    page.heading('The same for all rows').facts(contract)
    return page.heading('How to get this page again').command(command)
