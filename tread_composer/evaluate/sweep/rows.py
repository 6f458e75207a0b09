"""One measurement for each combination of settings, whatever measures: finished rows are kept, the best are marked.

Every finished row is on the disk at once, so an interrupted sweep goes on; rows are independent, so a later sweep of
the same kind may add combinations.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.errors import ResumeError, UserError
from tread_composer.io.chart import Chart, Curve, charts_png
from tread_composer.io.files import read_json, write_atomically
from tread_composer.io.locks import locked
from tread_composer.io.page import Report, flat
from tread_composer.io.progress import duration
from tread_composer.io.ranks import Ranks
from tread_composer.io.table import text_table
from tread_composer.metrics.metric import direction

__all__ = ['best_rows', 'combinations', 'format_sweep', 'run_sweep', 'write_sweep']

Measure = Callable[[Mapping[str, Any]], Mapping[str, float]]  # from the settings of a row to its numbers, by name
Rows = Sequence[Mapping[str, Any]]

_STATE = 'sweep.json'
_FORMAT = 1
_SCALE = 'guidance_scale'


def combinations(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the values of each setting, the last name varying fastest; doubles are left out.

    Raises:
        UserError: A setting has no value.
    """
    empty = [name for name, values in choices.items() if not values]
    if empty:
        raise UserError(f'sweep: no values for {", ".join(empty)}')
    rows = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return list({_key(row): row for row in rows}.values())


def run_sweep(
    settings: Rows,
    measure: Measure,
    folder: str | Path,
    contract: Mapping[str, Any],
    log: Callable[[str], None] = print,
    ranks: Ranks = Ranks(),
) -> list[dict[str, Any]]:
    """Measure what has not been measured yet; all ranks call this, the first one's numbers count, and it writes.

    Args:
        settings: Plain JSON values for each row.
        measure: Gives a row's numbers.
        folder: Where ``sweep.json`` lies or will lie.
        contract: What all rows have in common: the model, the reference, the samples. Rows of another contract are not
            mixed with these.
        log: Prints a line.
        ranks: This process and its like.

    Returns:
        All rows of the folder, those of earlier sweeps first: ``settings``, ``values``, ``seconds``.

    Raises:
        ResumeError: The folder holds a sweep with another contract; lists the differences.
        UserError: The folder cannot be used, or another process is sweeping in it.
    """
    folder = Path(folder)
    contract = json.loads(json.dumps(contract))  # tuples as lists, as they come back from the file
    with contextlib.ExitStack() as stack:

        def begin() -> list[dict[str, Any]]:
            if not ranks.is_first:
                return []
            try:
                folder.mkdir(parents=True, exist_ok=True)
                # Each process writes all rows that it knows of
                busy = f'--out: another process is sweeping in {str(folder)!r}; wait, or choose another'
                stack.enter_context(locked(folder / '.lock', busy))
            except OSError as error:
                raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
            return _stored_rows(folder / _STATE, contract)

        rows = ranks.from_first(ranks.agreed(begin))
        done = {_key(row['settings']) for row in rows}
        # An earlier sweep of this folder has the others
        pending = [dict(setting) for setting in settings if _key(setting) not in done]
        if len(pending) < len(settings):
            log(f'{len(settings) - len(pending)} of {len(settings)} rows are finished, and kept')
        began = time.monotonic()
        for number, setting in enumerate(pending, 1):
            start = time.monotonic()
            values = {
                name: _checked(name, value, setting) for name, value in ranks.from_first(measure(setting)).items()
            }
            rows.append({'settings': setting, 'values': values, 'seconds': time.monotonic() - start})
            state = {'format': _FORMAT, 'contract': contract, 'rows': rows}
            if ranks.is_first:
                write_atomically(folder / _STATE, json.dumps(state, indent=1).encode())
            remaining = (time.monotonic() - began) / number * (len(pending) - number)
            figures = ', '.join(f'{name} {value:.4g}' for name, value in values.items())
            log(f'{number} of {len(pending)}: {_in_words(setting)}: {figures} (about {duration(remaining)} left)')
    return rows


def best_rows(rows: Rows) -> dict[str, int]:
    """The position of the best row for each metric whose better direction is known; the first of equals."""
    best = {}
    for metric in _metrics(rows):
        try:
            sign = 1 if direction(metric) == 'lower' else -1  # the smallest of sign * value is the best
        except ValueError:
            continue  # a cost, not a quality
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


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _stored_rows(path: Path, contract: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    state = read_json(path)
    if not isinstance(state, dict) or state.get('format') != _FORMAT:
        raise UserError(f'{path}: not written by this version of sweep; choose another --out')
    if state['contract'] != contract:
        raise ResumeError.from_differences(
            str(path), state['contract'], contract, 'Rows of different settings do not compare: choose another --out.'
        )
    return state['rows']


def _checked(name: str, value: float, settings: Mapping[str, Any]) -> float:
    if not math.isfinite(value):
        raise UserError(f'{_in_words(settings)}: {name} came out as {value}; leave these settings out of the sweep')
    return float(value)


def _in_words(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in flat(settings).items())


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
        label = f'{metric} ({direction(metric)} is better)' if metric in best else metric
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
    page.tiles([(f'{row["values"][m]:.4g}', f'best {m}: {_in_words(row["settings"])}') for m, row in winners])
    page.charts(charts).heading('All rows').table(head, cells, best)
    page.text(
        'The best of many rows is better than it would be on new samples: each row has an error of its own, and the '
        'luckiest is picked. Measure the chosen settings again with another seed before reporting them.',
        soft=True,
    )
    page.heading('The same for all rows').facts(contract)
    return page.heading('How to get this page again').command(command)
