"""The files of a comparison: numbers as JSON, a picture, a page."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tread_composer.compare.comparison import (
    LINES_RULE,
    ONE_RUN_RULE,
    SPEED_UP_HEAD,
    SPEED_UP_RULE,
    Comparison,
    MetricTable,
    Row,
    cells_of,
    figure,
    notes_of,
    ratio_in_words,
    speed_up_rows,
)
from tread_composer.compare.curves import AXES, Axis, SpeedUp, Value, best_point
from tread_composer.core.errors import UserError
from tread_composer.io.chart import Chart, Curve, figure_png, new_figure
from tread_composer.io.files import write_atomically
from tread_composer.io.page import Report
from tread_composer.metrics.quantity import Better

__all__ = ['draw', 'write_comparison']


def write_comparison(comparison: Comparison, folder: str | Path, command: str) -> list[Path]:
    """Write ``comparison.json``, ``comparison.png`` and ``comparison.html``.

    Args:
        comparison: What to write.
        folder: Where; made if it is missing.
        command: How to get the same again.

    Returns:
        The files.

    Raises:
        UserError: They cannot be written.
    """
    folder = Path(folder)
    paths = [folder / f'comparison.{ending}' for ending in ('json', 'png', 'html')]
    try:
        write_atomically(paths[0], json.dumps(_as_json(comparison, command), indent=1).encode())
        write_atomically(paths[1], draw(comparison))
    except OSError as error:
        raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
    _page(comparison, command).write(paths[2])
    return paths


def _as_json(comparison: Comparison, command: str) -> dict[str, Any]:
    runs = [
        {'name': name, 'source': run.source, 'machine': run.machine, 'notes': run.notes}
        for name, run in zip(comparison.names, comparison.runs, strict=True)
    ]
    metrics = []
    for table in comparison.tables:
        points = [[asdict(point) for point in run] for run in table.points]
        metrics.append(
            {
                'metric': table.metric,
                'better': table.better,
                'protocol': dict(table.protocol),
                'points': dict(zip(comparison.names, points, strict=True)),
                'speed_ups': _ratios(comparison, table.speed_ups),
                'at_the_best_of_the_other': _ratios(comparison, table.common),
            }
        )
    return {'command': command, 'runs': runs, 'metrics': metrics}


def _ratios(comparison: Comparison, group: tuple[Mapping[Axis, SpeedUp], ...]) -> dict[str, Any]:
    return {
        name: {axis: {**asdict(speed), 'ratio': speed.ratio} for axis, speed in by_axis.items()}
        for name, by_axis in zip(comparison.names[1:], group, strict=True)
    }


def _curve(table: MetricTable, axis: Axis, index: int) -> list[tuple[float, float]]:
    return [(x, point.value) for point in table.points[index] if (x := getattr(point, axis)) is not None]


def draw(comparison: Comparison) -> bytes:
    """A PNG: a row of panels for each metric, against steps, FLOPs and seconds."""
    drawing = new_figure(13, 0.6 + 3.7 * len(comparison.tables))
    grid = drawing.subplots(len(comparison.tables), len(AXES), squeeze=False)
    for row, table in zip(grid, comparison.tables, strict=True):
        charts = _charts(comparison, table)
        for axes, axis in zip(row, AXES, strict=True):
            if axis in charts:
                charts[axis].plot(axes)
            else:
                axes.text(0.5, 0.5, f'{AXES[axis]}: not recorded', ha='center', transform=axes.transAxes)
        charts['step'].legend(row[0], fontsize=9)  # steps are always known
    return figure_png(drawing)


def _page(comparison: Comparison, command: str) -> Report:
    names = comparison.names
    page = Report(' vs '.join(names), f'{names[0]} is the reference. {ONE_RUN_RULE}')
    for table in comparison.tables:
        page.heading(f'{table.metric} ({table.better} is better)')
        page.tiles(_tiles(comparison, table)).charts(list(_charts(comparison, table).values()))
        page.heading('Speed-up at equal quality', small=True)
        page.table(SPEED_UP_HEAD, speed_up_rows(comparison, table))
        page.tables(
            [
                (f'At equal {label}', [label, *names], cells_of(table, axis), _best_cells(table, axis))
                for axis, label in AXES.items()
                if table.rows[axis]
            ]
        )
        for axis, label in AXES.items():
            if not table.rows[axis]:
                page.text(f'At equal {label}: not recorded in any run.')
    for protocol, metrics in _protocols(comparison):
        page.heading(f'Protocol of {", ".join(metrics)}, the same for all runs').facts(protocol)
    page.heading('How to read this').text(SPEED_UP_RULE).text(LINES_RULE)
    grids = [(f'{name}: {run.source}', run.grid) for name, run in zip(names, comparison.runs, strict=True) if run.grid]
    if grids:
        page.heading('Samples').pictures(grids)
    page.heading('Where the numbers come from')
    page.facts({name: run.source for name, run in zip(names, comparison.runs, strict=True)})
    for note in notes_of(comparison):
        page.text(note, soft=True)
    return page.heading('How to get this page again').command(command)


def _protocols(comparison: Comparison) -> list[tuple[Mapping[str, Any], list[str]]]:
    """Each protocol with the metrics that were measured by it."""
    protocols: list[tuple[Mapping[str, Any], list[str]]] = []
    for table in comparison.tables:
        metrics = next((names for protocol, names in protocols if protocol == table.protocol), None)
        if metrics is None:
            protocols.append((table.protocol, [table.metric]))
        else:
            metrics.append(table.metric)
    return protocols


def _tiles(comparison: Comparison, table: MetricTable) -> list[tuple[str, str]]:
    """The speed-ups that a reader looks for: at the reference's best value, else at the best that both reach."""
    tiles = []
    for index, (speed_ups, common) in enumerate(zip(table.speed_ups, table.common, strict=True), 1):
        owner, by_axis = (index, common) if common else (0, speed_ups)
        quality = figure(best_point(table.points[owner], table.better).value)
        pair = f'{comparison.names[0]} / {comparison.names[index]} at {quality} (the best of {comparison.names[owner]})'
        for axis, label in AXES.items():
            ratio, sign = by_axis[axis].ratio, '≥ ' if by_axis[axis].at_least else ''
            reason = '' if ratio else f' ({ratio_in_words(by_axis[axis])})'
            tiles.append((f'{sign}{ratio:.2f}x' if ratio else '-', f'{label}: {pair}{reason}'))
    return tiles


def _best_cells(table: MetricTable, axis: Axis) -> list[tuple[int, int]]:
    return [(i, j + 1) for i, row in enumerate(table.rows[axis]) for j in _best(row, table.better)]


def _best(row: Row, better: Better) -> list[int]:
    values = [(cell.value, i) for i, cell in enumerate(row.cells) if isinstance(cell, Value)]
    if len(values) < 2:
        return []
    pick = min if better == 'lower' else max
    best = pick(value for value, _ in values)
    return [i for value, i in values if value == best]


def _charts(comparison: Comparison, table: MetricTable) -> dict[Axis, Chart]:
    """The curves against each cost that some run has recorded."""
    reference = best_point(table.points[0], table.better)
    level_label = f'best of {comparison.names[0]}: {figure(reference.value)}'
    charts: dict[Axis, Chart] = {}
    for axis, label in AXES.items():
        curves = [Curve(name, _curve(table, axis, i), i) for i, name in enumerate(comparison.names)]
        if any(curve.points for curve in curves):
            y_label = f'{table.metric} ({table.better} is better)'
            charts[axis] = Chart(label, y_label, curves, reference.value, level_label)
    return charts
