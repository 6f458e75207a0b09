"""A comparison as text for a terminal, as JSON, as a picture, as a page."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tread_composer.compare.comparison import Comparison, MetricTable, SpeedUp, Value, best_point
from tread_composer.compare.runs import AXES, Axis
from tread_composer.core.errors import UserError
from tread_composer.io.chart import Chart, Curve, charts_png, short
from tread_composer.io.files import write_atomically
from tread_composer.io.page import Report, in_words
from tread_composer.io.table import text_table
from tread_composer.metrics.protocol import by_protocol

__all__ = ['format_comparison', 'write_comparison']

_RULES = (
    'A value marked with ≈ was not measured there: it is read off the straight line between the two neighbouring '
    "measurements. Beyond a run's first and last measurement nothing is assumed.",
    'Speed-up at equal quality: what the reference had spent when it measured its best value, divided by what the '
    'other run had spent when its curve first reached that value (on the straight line between two measurements; the '
    "figure at the first measurement that is as good is in brackets). This is how TREAD's 14x and 37x are defined; "
    'it is not the speed-up of a step. A run that never gets there is also held against the reference at its own best '
    'value, which both have reached; below 1x it needed more.',
    'One run each: differences between seeds are not in these numbers.',
)
_SPEED_UP_HEAD = ['run', 'to reach', *(f'in {name}' for name in AXES.values())]
_OBJECTIVES_RULE = (
    'The runs have different objectives, so each was sampled on the time grid of its own (protocol, time_grid): the '
    'sampler and its number of steps are equal, the times are not.'
)


def format_comparison(comparison: Comparison) -> str:
    """The tables for a terminal; each protocol once, after the tables of what was measured by it."""
    lines = [f'{n}  =  {r.source}' for n, r in zip(comparison.names, comparison.runs, strict=True)]
    for table in comparison.tables:
        lines += ['', f'{table.metric} ({table.better} is better)']
        for axis, name in AXES.items():
            head, cells = [name, *comparison.names], _cells(table, axis)
            lines += ['', text_table(head, cells) if cells else f'{name}: not recorded']
        rows, notes = _speed_ups(comparison, table)
        lines += ['', text_table(_SPEED_UP_HEAD, rows), *notes]
    for protocol, metrics in by_protocol((table.metric, table.protocol) for table in comparison.tables):
        lines += ['', f'protocol of {", ".join(metrics)}: {in_words(protocol)}']
    return '\n'.join([*lines, '', *(f'- {note}' for note in (*_notes(comparison), *_RULES))])


def write_comparison(comparison: Comparison, folder: str | Path, command: str) -> list[Path]:
    """Write ``comparison.json``, ``comparison.png`` and ``comparison.html``; returns the files.

    ``command``, by which one gets the same again, stands in them.

    Raises:
        UserError: They cannot be written.
    """
    folder = Path(folder)
    paths = [folder / f'comparison.{ending}' for ending in ('json', 'png', 'html')]
    charts = [_charts(comparison, table) for table in comparison.tables]
    pictures = [[row.get(axis, f'{label}: not recorded') for axis, label in AXES.items()] for row in charts]
    try:
        write_atomically(paths[0], json.dumps(_as_json(comparison, command), indent=1).encode())
        write_atomically(paths[1], charts_png(pictures))
    except OSError as error:
        raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
    _page(comparison, charts, command).write(paths[2])
    return paths


def _cells(table: MetricTable, axis: Axis) -> list[list[str]]:
    """The table at equal cost: the cost, then each run's value."""

    def cell(value: Value | str) -> str:
        if isinstance(value, str):
            return value
        return short(value.value) if value.measured else f'≈ {short(value.value)}'

    return [[short(cost), *map(cell, values)] for cost, values in table.rows(axis)]


def _speed_ups(comparison: Comparison, table: MetricTable) -> tuple[list[list[str]], list[str]]:
    """The rows of the speed-up at equal quality, and below them what their signs mean."""
    rows, notes = [], list[str]()
    for run, name in enumerate(comparison.names[1:], 1):
        for owner, by_axis in ((0, table.speed_ups(run)), (run, table.common(run))):
            if by_axis:
                best = best_point(table.points[owner], table.better)
                quality = f'best of {comparison.names[owner]}: {short(best.value)} (step {best.step})'
                rows.append([name, quality, *(_ratio_in_words(by_axis[axis]) for axis in AXES)])
                notes += map(_note, by_axis.values())
    return rows, [note for note in dict.fromkeys(notes) if note]


def _ratio_in_words(speed: SpeedUp) -> str:
    """``1.43x`` with the figure at the measured point, or why there is none: a ? where that takes a sentence."""
    if speed.ratio is None:
        return '?' if _note(speed) else speed.reason
    if speed.at_least:
        return f'≥ {speed.ratio:.2f}x'
    assert speed.reference is not None and speed.measured
    at_point = speed.reference / speed.measured
    return f'{speed.ratio:.2f}x' + ('' if at_point == speed.ratio else f' ({at_point:.2f}x at the measurement)')


def _note(speed: SpeedUp) -> str:
    """What explains a ? or a ≥, once below the table: three columns of sentences would not fit a screen."""
    if speed.ratio is None:
        reason = speed.reason or 'not known: it was as good before its first step'
        return f'?: {reason.replace(":", ",")}' if reason.startswith('not known') else ''
    return '≥: as good at its first measurement already' if speed.at_least else ''


def _notes(comparison: Comparison) -> list[str]:
    """What a reader has to know of single runs."""
    named = list(zip(comparison.names, comparison.runs, strict=True))
    notes = [f'{name}: {note}' for name, run in named for note in run.notes]
    if len({run.machine for _, run in named if run.machine}) > 1:
        listed = '; '.join(f'{name}: {run.machine}' for name, run in named)
        notes.insert(0, f'Seconds do not compare: the runs were on different machines ({listed})')
    if any(isinstance(grid, Mapping) for table in comparison.tables for grid in table.protocol['time_grid'].values()):
        notes.insert(0, _OBJECTIVES_RULE)
    return [*notes, *(f'left out: {text}' for text in comparison.left_out)]


def _as_json(comparison: Comparison, command: str) -> dict[str, Any]:
    names, metrics = comparison.names, []
    runs = [
        {'name': name, 'source': run.source, 'machine': run.machine, 'notes': run.notes}
        for name, run in zip(names, comparison.runs, strict=True)
    ]
    for table in comparison.tables:
        content, compared = asdict(table), list(enumerate(names[1:], 1))
        content['points'] = dict(zip(names, content['points'], strict=True))
        content['speed_ups'] = {name: _ratios(table.speed_ups(run)) for run, name in compared}
        content['at_the_best_of_the_other'] = {name: _ratios(table.common(run)) for run, name in compared}
        metrics.append(content)
    return {'command': command, 'runs': runs, 'metrics': metrics}


def _ratios(by_axis: Mapping[Axis, SpeedUp]) -> dict[str, Any]:
    return {axis: {**asdict(speed), 'ratio': speed.ratio} for axis, speed in by_axis.items()}


def _charts(comparison: Comparison, table: MetricTable) -> dict[Axis, Chart]:
    """The curves against each cost that some run has recorded."""
    best = best_point(table.points[0], table.better).value
    level_label = f'best of {comparison.names[0]}: {short(best)}'
    charts: dict[Axis, Chart] = {}
    for axis, label in AXES.items():
        curves = []
        for number, (name, run) in enumerate(zip(comparison.names, table.points, strict=True)):
            points = [(x, point.value) for point in run if (x := point.cost(axis)) is not None]
            curves.append(Curve(name, points, number))
        if any(curve.points for curve in curves):
            charts[axis] = Chart(label, f'{table.metric} ({table.better} is better)', curves, best, level_label)
    return charts


def _page(comparison: Comparison, charts: list[dict[Axis, Chart]], command: str) -> Report:
    names, named = comparison.names, list(zip(comparison.names, comparison.runs, strict=True))
    page = Report(' vs '.join(names), f'{names[0]} is the reference. {_RULES[-1]}')
    for table, by_axis in zip(comparison.tables, charts, strict=True):
        page.heading(f'{table.metric} ({table.better} is better)')
        page.charts(list(by_axis.values()))
        page.heading('Speed-up at equal quality', small=True)
        rows, notes = _speed_ups(comparison, table)
        page.table(_SPEED_UP_HEAD, rows)
        for note in notes:
            page.text(note, soft=True)
        tables = []
        for axis in by_axis:
            head = [AXES[axis], *names]
            tables.append((f'At equal {AXES[axis]}', head, _cells(table, axis), _best_cells(table, axis)))
        page.tables(tables)
        for label in (AXES[axis] for axis in AXES if axis not in by_axis):
            page.text(f'At equal {label}: not recorded in any run.')
    for protocol, metrics in by_protocol((table.metric, table.protocol) for table in comparison.tables):
        page.heading(f'Protocol of {", ".join(metrics)}, the same for all runs').facts(protocol)
    page.heading('How to read this')
    for rule in _RULES[:-1]:
        page.text(rule)
    grids = [(f'{name}: {run.source}', run.grid) for name, run in named if run.grid]
    if grids:
        page.heading('Samples').pictures(grids)
    page.heading('Where the numbers come from').facts({name: run.source for name, run in named})
    for note in _notes(comparison):
        page.text(note, soft=True)
    return page.heading('How to get this page again').command(command)


def _best_cells(table: MetricTable, axis: Axis) -> list[tuple[int, int]]:
    """Row and column of the best values; a row in which only one run has a value has none."""
    best = []
    for i, (_, cells) in enumerate(table.rows(axis)):
        # Column 0 is the cost
        values = {j: cell.value for j, cell in enumerate(cells, 1) if isinstance(cell, Value)}
        extreme = (min if table.better == 'lower' else max)(values.values(), default=None)
        best += [(i, j) for j, value in values.items() if len(values) > 1 and value == extreme]
    return best
