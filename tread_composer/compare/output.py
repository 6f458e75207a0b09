"""The files of a comparison: numbers as JSON, a picture, a page."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tread_composer.compare.comparison import (
    RULES,
    SPEED_UP_HEAD,
    Comparison,
    MetricTable,
    cells_of,
    figure,
    notes_of,
    speed_up_rows,
)
from tread_composer.compare.curves import AXES, Axis, SpeedUp, Value
from tread_composer.core.errors import UserError
from tread_composer.io.chart import Chart, Curve, charts_png
from tread_composer.io.files import write_atomically
from tread_composer.io.page import Report
from tread_composer.metrics.protocol import by_protocol

__all__ = ['write_comparison']


def write_comparison(comparison: Comparison, folder: str | Path, command: str) -> list[Path]:
    """Write ``comparison.json``, ``comparison.png`` and ``comparison.html``; returns the files.

    Args:
        comparison: What to write.
        folder: Where; made if it is missing.
        command: How to get the same again.

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


def _as_json(comparison: Comparison, command: str) -> dict[str, Any]:
    names, metrics = comparison.names, []
    runs = [
        {'name': name, 'source': run.source, 'machine': run.machine, 'notes': run.notes}
        for name, run in zip(names, comparison.runs, strict=True)
    ]
    for table in comparison.tables:
        points = [[asdict(point) for point in run] for run in table.points]
        others = list(enumerate(names[1:], 1))
        metrics.append(
            {
                'metric': table.metric,
                'better': table.better,
                'protocol': dict(table.protocol),
                'points': dict(zip(names, points, strict=True)),
                'speed_ups': {name: _ratios(table.speed_ups(run)) for run, name in others},
                'at_the_best_of_the_other': {name: _ratios(table.common(run)) for run, name in others},
            }
        )
    return {'command': command, 'runs': runs, 'metrics': metrics}


def _ratios(by_axis: Mapping[Axis, SpeedUp]) -> dict[str, Any]:
    return {axis: {**asdict(speed), 'ratio': speed.ratio} for axis, speed in by_axis.items()}


def _charts(comparison: Comparison, table: MetricTable) -> dict[Axis, Chart]:
    """The curves against each cost that some run has recorded."""
    best = table.best(0).value
    level_label = f'best of {comparison.names[0]}: {figure(best)}'
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
    names = comparison.names
    page = Report(' vs '.join(names), f'{names[0]} is the reference. {RULES[-1]}')
    for table, by_axis in zip(comparison.tables, charts, strict=True):
        page.heading(f'{table.metric} ({table.better} is better)')
        page.charts(list(by_axis.values()))
        page.heading('Speed-up at equal quality', small=True)
        page.table(SPEED_UP_HEAD, speed_up_rows(comparison, table))
        page.tables(
            [
                (f'At equal {label}', [label, *names], cells_of(table, axis), _best_cells(table, axis))
                for axis, label in AXES.items()
                if axis in by_axis
            ]
        )
        for axis, label in AXES.items():
            if axis not in by_axis:
                page.text(f'At equal {label}: not recorded in any run.')
    for protocol, metrics in by_protocol((table.metric, table.protocol) for table in comparison.tables):
        page.heading(f'Protocol of {", ".join(metrics)}, the same for all runs').facts(protocol)
    page.heading('How to read this')
    for rule in RULES[:-1]:
        page.text(rule)
    grids = [(f'{name}: {run.source}', run.grid) for name, run in zip(names, comparison.runs, strict=True) if run.grid]
    if grids:
        page.heading('Samples').pictures(grids)
    page.heading('Where the numbers come from')
    page.facts({name: run.source for name, run in zip(names, comparison.runs, strict=True)})
    for note in notes_of(comparison):
        page.text(note, soft=True)
    return page.heading('How to get this page again').command(command)


def _best_cells(table: MetricTable, axis: Axis) -> list[tuple[int, int]]:
    """Row and column of the best values; a row in which only one run has a value has none."""
    best = []
    for i, row in enumerate(table.rows(axis)):
        # Column 0 is the cost
        values = {j: cell.value for j, cell in enumerate(row.cells, 1) if isinstance(cell, Value)}
        extreme = (min if table.better == 'lower' else max)(values.values(), default=None)
        best += [(i, j) for j, value in values.items() if len(values) > 1 and value == extreme]
    return best
