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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.errors import ResumeError, UserError
from tread_composer.io.chart import Chart, Curve, figure_png, new_figure
from tread_composer.io.files import write_atomically
from tread_composer.io.locks import locked
from tread_composer.io.page import Report, flat
from tread_composer.io.progress import duration
from tread_composer.io.ranks import Ranks
from tread_composer.io.table import text_table
from tread_composer.metrics.metric import direction
from tread_composer.samplers import GUIDANCE, guidance_defaults

__all__ = ['Measure', 'best_rows', 'combinations', 'format_sweep', 'run_sweep', 'write_sweep']

Measure = Callable[[Mapping[str, Any]], Mapping[str, float]]
"""From the settings of a row to its numbers, by name."""

_STATE = 'sweep.json'
_FORMAT = 1


def combinations(**choices: Sequence[Any]) -> list[dict[str, Any]]:
    """Every combination of the choices, the last name varying fastest; doubles are left out.

    Args:
        choices: The values of each setting.

    Raises:
        UserError: A setting has no value.
    """
    empty = [name for name, values in choices.items() if not values]
    if empty:
        raise UserError(f'sweep: no values for {", ".join(empty)}')
    rows = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    return list({_key(row): row for row in rows}.values())


def run_sweep(
    settings: Sequence[Mapping[str, Any]],
    measure: Measure,
    folder: str | Path,
    contract: Mapping[str, Any],
    log: Callable[[str], None] = print,
    ranks: Ranks = Ranks(),
) -> list[dict[str, Any]]:
    """Measure what has not been measured yet.

    Args:
        settings: Of each row, plain JSON values.
        measure: Gives a row's numbers.
        folder: Where ``sweep.json`` lies or will lie.
        contract: What all rows have in common: the model, the reference, the samples. Rows of another contract are not
            mixed with these.
        log: Prints a line.
        ranks: All of them call this and ``measure``; the first one's numbers count, and it writes.

    Returns:
        All rows of the folder, those of earlier sweeps first: ``settings``, ``values``, ``seconds``.

    Raises:
        ResumeError: The folder holds a sweep with another contract; lists the differences.
        UserError: The folder cannot be used, or another process is sweeping in it.
    """
    folder = Path(folder)
    contract = json.loads(json.dumps(contract))
    with contextlib.ExitStack() as stack:

        def begin() -> list[dict[str, Any]]:
            if not ranks.is_first:
                return []
            stack.enter_context(_alone(folder))
            return _stored_rows(folder / _STATE, contract)

        rows = ranks.from_first(ranks.agreed(begin))
        done = {_key(row['settings']) for row in rows}
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


def best_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The position of the best row for each metric whose better direction is known; the first of equals."""
    best = {}
    for metric in dict.fromkeys(name for row in rows for name in row['values']):
        try:
            sign = 1 if direction(metric) == 'lower' else -1
        except ValueError:
            continue  # a cost, not a quality
        measured = [(sign * row['values'][metric], i) for i, row in enumerate(rows) if metric in row['values']]
        best[metric] = min(measured)[1]
    return best


def format_sweep(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table for a terminal; ``*`` marks the best of each metric."""
    head, cells, best = _table(rows)
    marked = [[f'{"*" if (i, j) in best else ""}{cell}' for j, cell in enumerate(row)] for i, row in enumerate(cells)]
    return f'{text_table(head, marked, "r")}\n* best of its column'


def write_sweep(
    rows: Sequence[Mapping[str, Any]], folder: str | Path, contract: Mapping[str, Any], command: str
) -> list[Path]:
    """Write ``sweep.csv``, ``sweep.png`` and ``sweep.html``.

    Args:
        rows: What `run_sweep` returned, at least one.
        folder: Where.
        contract: What the rows have in common.
        command: How to get the same again.

    Returns:
        The files.
    """
    folder = Path(folder)
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    names, metrics, best = _names(rows), _metrics(rows), best_rows(rows)
    writer.writerow([*names, *metrics, 'seconds', 'best'])
    for i, row in enumerate(rows):
        won = ' '.join(metric for metric, index in best.items() if index == i)
        settings = flat(row['settings'])
        values = [row['values'].get(metric, '') for metric in metrics]
        writer.writerow([*(settings.get(name, '') for name in names), *values, f'{row["seconds"]:.1f}', won])
    paths = [folder / f'sweep.{ending}' for ending in ('csv', 'png', 'html')]
    write_atomically(paths[0], table.getvalue().encode())
    write_atomically(paths[1], draw(rows))
    _page(rows, contract, command).write(paths[2])
    return paths


# --- state ---


def _key(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _stored_rows(path: Path, contract: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        state = json.loads(path.read_bytes())
        if state['format'] != _FORMAT:
            raise ValueError(f'format {state["format"]}')
        saved, rows = state['contract'], state['rows']
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not written by this version of sweep ({error}); choose another --out') from None
    if saved != contract:
        raise ResumeError.from_differences(
            str(path), saved, contract, 'Rows of different settings do not compare: choose another --out.'
        )
    return rows


def _checked(name: str, value: float, settings: Mapping[str, Any]) -> float:
    if not math.isfinite(value):
        raise UserError(f'{_in_words(settings)}: {name} came out as {value}; leave these settings out of the sweep')
    return float(value)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process at a time: each writes all rows that it knows of. A dead one's lock is gone with it."""
    busy = f'--out: another process is sweeping in {str(folder)!r}; wait, or choose another'
    lock = contextlib.ExitStack()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.enter_context(locked(folder / '.lock', busy))
    except OSError as error:
        raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
    with lock:
        yield


# --- to look at ---


def _in_words(settings: Mapping[str, Any]) -> str:
    return ', '.join(f'{name} {value}' for name, value in flat(settings).items())


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in flat(row['settings'])))


def _metrics(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row['values']))


def _table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], list[tuple[int, int]]]:
    """Head, cells, and the positions of the best ones."""
    names, metrics = _names(rows), _metrics(rows)
    cells = []
    for row in rows:
        settings = flat(row['settings'])
        figures = [f'{row["values"][metric]:.4g}' if metric in row['values'] else '' for metric in metrics]
        cells.append([*(settings.get(name, '') for name in names), *figures])
    best = [(index, len(names) + metrics.index(metric)) for metric, index in best_rows(rows).items()]
    return [*names, *metrics], cells, best


def _unguided(row: Mapping[str, Any]) -> bool:
    return row['settings'].get('guidance') == 'none'


def _of_guidance(name: str) -> bool:
    return name.startswith('guid') or any(name in guidance_defaults(kind) for kind in GUIDANCE)


def _lines(rows: Sequence[Mapping[str, Any]], metric: str) -> tuple[str, list[Curve]]:
    """What is on the x axis, and a line for each combination of all else; the best point marked."""
    swept = 'guidance_scale'
    scales = {row['settings'].get(swept) for row in rows}
    along = len(scales) > 1 and all(isinstance(scale, int | float) for scale in scales)
    names = [name for name in _names(rows) if not (along and name == swept)]
    # A setting that is the same everywhere says nothing in a legend.
    varying = [name for name in names if len({flat(row['settings']).get(name) for row in rows}) > 1]
    best = best_rows(rows).get(metric)
    groups: dict[str, list[tuple[float, float, bool]]] = {}
    members: dict[str, str] = {}  # of each line: its weights, or whatever else is not of the guidance
    # Without guidance all lines meet: that row is a point of each. It comes last, when the lines are known.
    for i, row in sorted(enumerate(rows), key=lambda pair: _unguided(pair[1])):
        if metric not in row['values']:
            continue
        settings = flat(row['settings'])
        group = (
            ', '.join(f'{name} {settings.get(name, "none")}' for name in varying) if along else 'rows, in their order'
        )
        common = ', '.join(f'{name} {settings.get(name, "none")}' for name in varying if not _of_guidance(name))
        point = float(row['settings'][swept] if along else i + 1), row['values'][metric], i == best
        lines = [line for line, owner in members.items() if owner == common] if along and _unguided(row) else []
        for line in lines or [group or metric]:
            members.setdefault(line, common)
            groups.setdefault(line, []).append(point)
    curves = []
    for number, (name, found) in enumerate(groups.items()):
        found.sort()
        marked = next((i for i, point in enumerate(found) if point[2]), None)
        curves.append(Curve(name, [(x, y) for x, y, _ in found], number, marked))
    return ('guidance scale' if along else 'row of the table'), curves


def _label(metric: str) -> str:
    try:
        return f'{metric} ({direction(metric)} is better)'
    except ValueError:
        return metric


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    charts = []
    for metric in _metrics(rows):
        x_label, curves = _lines(rows, metric)
        charts.append(Chart(x_label, _label(metric), curves))
    return charts


def draw(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A PNG with a panel for each metric; the best point is ringed."""
    charts = _charts(rows)
    columns = min(3, len(charts))
    lines = -(-len(charts) // columns)
    figure = new_figure(1 + 4.3 * columns, 4.2 * lines)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, chart in zip(panels, charts, strict=False):
        chart.plot(axes)
        chart.legend(axes, fontsize=8)
    for axes in panels[len(charts) :]:
        axes.set_axis_off()
    return figure_png(figure)


def _page(rows: Sequence[Mapping[str, Any]], contract: Mapping[str, Any], command: str) -> Report:
    head, cells, best = _table(rows)
    page = Report('Sweep of sampling settings', f'{len(rows)} rows; the best of each metric is marked.')
    found = best_rows(rows)
    page.tiles(
        [(f'{rows[i]["values"][m]:.4g}', f'best {m}: {_in_words(rows[i]["settings"])}') for m, i in found.items()]
    )
    page.charts(_charts(rows)).heading('All rows').table(head, cells, best)
    page.text(
        'The best of many rows is better than it would be on new samples: each row has an error of its own, and the '
        'luckiest is picked. Measure the chosen settings again with another seed before reporting them.',
        soft=True,
    )
    page.heading('The same for all rows').facts(contract)
    return page.heading('How to get this page again').command(command)
