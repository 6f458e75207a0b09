"""``python -m tread_composer compare A B [C ...]``: tables, a picture, a page, and the speed-up at equal quality.

A is the reference: its costs and its best value are what the others are held against. Numbers that were measured by
different protocols are not compared.
"""

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tread_composer.compare.curves import (
    AXES,
    Axis,
    Curve,
    Point,
    SpeedUp,
    Value,
    best_point,
    common_speed_up,
    speed_up,
    value_at,
)
from tread_composer.compare.runs import Run
from tread_composer.core.errors import UserError
from tread_composer.io.chart import short
from tread_composer.io.page import flat
from tread_composer.io.table import text_table
from tread_composer.metrics.protocol import by_protocol, differences
from tread_composer.metrics.quantity import Better

__all__ = [
    'RULES',
    'SPEED_UP_HEAD',
    'Comparison',
    'MetricTable',
    'Row',
    'cells_of',
    'compare',
    'figure',
    'format_comparison',
    'notes_of',
    'speed_up_rows',
]

RULES = (
    'A value marked with ≈ was not measured there: it is read off the straight line between the two neighbouring '
    "measurements. Beyond a run's first and last measurement nothing is assumed.",
    'Speed-up at equal quality: what the reference had spent when it measured its best value, divided by what the '
    'other run had spent when its curve first reached that value (on the straight line between two measurements; the '
    "figure at the first measurement that is as good stands beside it). This is how TREAD's 14x and 37x are defined; "
    'it is not the speed-up of a step. A run that never gets there is also held against the reference at its own best '
    'value, which both have reached; below 1x it needed more.',
    'One run each: differences between seeds are not in these numbers.',
)
SPEED_UP_HEAD = ['run', 'to reach', *(f'in {name}' for name in AXES.values())]
_OBJECTIVES_RULE = (
    'The runs have different objectives, so each was sampled on the time grid of its own (protocol, time_grid): the '
    'sampler and its number of steps are equal, the times are not.'
)


@dataclass(frozen=True)
class Row:
    """One cost, and each run's value there: a `Value`, or why there is none."""

    cost: float
    cells: tuple[Value | str, ...]


@dataclass(frozen=True)
class MetricTable:
    """One metric, under one protocol that all runs share.

    Args:
        metric: Its name.
        better: Which values are better.
        protocol: How it was measured; of runs with different objectives, ``time_grid`` has the grid of each by name.
        points: Each run's measurements, the reference first.
    """

    metric: str
    better: Better
    protocol: Mapping[str, Any]
    points: tuple[tuple[Point, ...], ...]

    def best(self, run: int) -> Point:
        """The best measurement of a run."""
        return best_point(self.points[run], self.better)

    def speed_ups(self, run: int) -> dict[Axis, SpeedUp]:
        """Of a run against the reference, at the reference's best value."""
        return {axis: speed_up(self.points[0], self.points[run], self.better, axis) for axis in AXES}

    def common(self, run: int) -> dict[Axis, SpeedUp]:
        """The same at the run's own best value, where it does not reach the reference's; else empty."""
        if self.speed_ups(run)['step'].reason != 'not reached':
            return {}
        return {axis: common_speed_up(self.points[0], self.points[run], self.better, axis) for axis in AXES}

    def rows(self, axis: Axis) -> list[Row]:
        """Values at the costs where the reference was measured, and at the largest that all runs have reached.

        Empty where no run has a record of this cost.
        """
        costs = [[x for point in run if (x := point.cost(axis)) is not None] for run in self.points]
        recorded = [run for run in costs if run]
        if not recorded:
            return []
        rows: list[Row] = []
        for cost in sorted([*recorded[0], min(run[-1] for run in recorded)]):
            if not rows or not math.isclose(rows[-1].cost, cost, rel_tol=1e-9):
                rows.append(Row(cost, tuple(_cell(run, axis, cost) for run in self.points)))
        return rows


@dataclass(frozen=True)
class Comparison:
    """Runs held against the first of them.

    Args:
        runs: As they were read.
        names: What to call them: their own names, told apart where two are equal.
        tables: One for each metric that all runs have under the same protocol.
        left_out: Metrics that not all runs have, in words.
    """

    runs: tuple[Run, ...]
    names: tuple[str, ...]
    tables: tuple[MetricTable, ...]
    left_out: tuple[str, ...]


def compare(runs: Sequence[Run], metrics: Sequence[str] = ()) -> Comparison:
    """Hold runs, two or more, against the first one.

    Args:
        runs: As ``open_run`` reads them.
        metrics: The metrics to compare; ``fid`` stands for ``fid_10000`` too. All that the runs share if empty.

    Raises:
        UserError: A metric is in no common protocol (lists the differences), or there is none in common.
    """
    if len(runs) < 2:
        raise UserError(f'compare: {len(runs)} run given; give two or more, the reference first')
    names = _names(runs)
    metrics_of = {name: {curve.metric for curve in run.curves} for name, run in zip(names, runs, strict=True)}
    measured = list(dict.fromkeys(curve.metric for run in runs for curve in run.curves))
    absent = [name for name in metrics if not any(_is(metric, name) for metric in measured)]
    if absent:
        raise UserError(f'--metrics: no run has {", ".join(absent)}; there are {", ".join(measured) or "none"}')
    asked = [metric for metric in measured if not metrics or any(_is(metric, name) for name in metrics)]
    shared = [metric for metric in asked if all(metric in own for own in metrics_of.values())]
    if not shared:
        owned = '\n'.join(f'  {name}: {", ".join(sorted(own)) or "no metric"}' for name, own in metrics_of.items())
        raise UserError(f'compare: the runs have no metric in common.\n{owned}')
    tables = [table for metric in shared for table in _tables(metric, runs, names)]
    left_out = [f'{metric}: not in every run' for metric in asked if metric not in shared]
    for metric, (name, run) in itertools.product(shared, zip(names, runs, strict=True)):
        # Curves that are in no table
        more = len(_curves(run, metric)) - sum(table.metric == metric for table in tables)
        if more > 0:
            left_out.append(f'{metric} of {name} by {more} further protocols, which not every run has')
    return Comparison(tuple(runs), names, tuple(tables), tuple(left_out))


def _is(metric: str, asked: str) -> bool:
    """Whether this is the metric asked for, or that metric of fewer samples."""
    name, _, number = metric.rpartition('_')
    return metric == asked or (number.isdecimal() and name == asked)  # fid stands for fid_10000


def _curves(run: Run, metric: str) -> list[Curve]:
    return [curve for curve in run.curves if curve.metric == metric]


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    names = [run.name for run in runs]
    lettered = zip(names, itertools.cycle(string.ascii_uppercase), strict=False)
    return tuple(f'{name} ({letter})' if names.count(name) > 1 else name for name, letter in lettered)


def _tables(metric: str, runs: Sequence[Run], names: Sequence[str]) -> list[MetricTable]:
    """One for each protocol of the reference that every other run has too."""
    candidates = [_curves(run, metric) for run in runs]
    tables = []
    for curve in candidates[0]:
        if differences(curve.protocol, curve.protocol):
            continue  # something of it is unknown
        equal = [curve]
        for curves in candidates[1:]:
            # With all that are chosen, not with the first alone: runs of another objective have grids of their own.
            fits = (c for c in curves if not any(differences(e.protocol, c.protocol) for e in equal))
            equal += itertools.islice(fits, 1)
        if len(equal) == len(candidates):
            points = tuple(curve.points for curve in equal)
            tables.append(MetricTable(metric, curve.better, _common_protocol(equal, names), points))
    if not tables:
        raise UserError(
            f'{metric}: was measured by different protocols, so the values do not compare.\n'
            f'{_nearest(candidates, names)}\nMeasure the runs again with one protocol, or choose other --metrics.'
        )
    return tables


def _common_protocol(curves: Sequence[Curve], names: Sequence[str]) -> Mapping[str, Any]:
    protocol, grids = curves[0].protocol, [curve.protocol['time_grid'] for curve in curves]
    if all(grid['objective'] == grids[0]['objective'] for grid in grids):
        return protocol
    return {**protocol, 'time_grid': dict(zip(names, grids, strict=True))}


def _nearest(candidates: Sequence[Sequence[Curve]], names: Sequence[str]) -> str:
    """The differences of the protocols that are most alike: of the reference and another run, else of two others."""
    lines = []
    for i, j in itertools.combinations(range(len(candidates)), 2):
        if i and lines:
            break  # those of the reference say it
        pairs = itertools.product(candidates[i], candidates[j])
        nearest = min((differences(a.protocol, b.protocol) for a, b in pairs), key=len)
        lines += [f'  {names[i]} and {names[j]}:', *(f'    {line}' for line in nearest)] if nearest else []
    return '\n'.join(lines)


def _cell(points: Sequence[Point], axis: Axis, cost: float) -> Value | str:
    value = value_at(points, axis, cost)
    if value is not None:
        return value
    recorded = [x for point in points if (x := point.cost(axis)) is not None]
    if not recorded:
        return 'not recorded'
    return 'before its first' if cost < recorded[0] else 'beyond its last'


# --- as text ---


def figure(value: float) -> str:
    """A metric's value: four digits."""
    return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.0f}'


def _ratio_in_words(speed: SpeedUp) -> str:
    """``1.43x`` with the figure at the measured point, or why there is none."""
    if speed.ratio is None:
        return speed.reason or 'not known: it was as good before its first step'
    if speed.at_least:
        return f'at least {speed.ratio:.2f}x (as good at its first measurement)'
    assert speed.reference is not None and speed.measured
    at_point = speed.reference / speed.measured
    return f'{speed.ratio:.2f}x' + ('' if at_point == speed.ratio else f' ({at_point:.2f}x at the measurement)')


def cells_of(table: MetricTable, axis: Axis) -> list[list[str]]:
    """The table at equal cost: the cost, then each run's value."""
    rows = []
    for row in table.rows(axis):
        values = [cell if isinstance(cell, str) else figure(cell.value) for cell in row.cells]
        read_off = [isinstance(cell, Value) and not cell.measured for cell in row.cells]
        cells = [f'≈ {value}' if between else value for value, between in zip(values, read_off, strict=True)]
        rows.append([short(row.cost), *cells])
    return rows


def speed_up_rows(comparison: Comparison, table: MetricTable) -> list[list[str]]:
    """The table of speed-ups; its head is `SPEED_UP_HEAD`."""
    rows = []
    for run, name in enumerate(comparison.names[1:], 1):
        for owner, by_axis in ((0, table.speed_ups(run)), (run, table.common(run))):
            if by_axis:
                best = table.best(owner)
                quality = f'best of {comparison.names[owner]}: {figure(best.value)} (step {best.step})'
                rows.append([name, quality, *(_ratio_in_words(by_axis[axis]) for axis in AXES)])
    return rows


def notes_of(comparison: Comparison) -> list[str]:
    """What a reader has to know of single runs."""
    named = list(zip(comparison.names, comparison.runs, strict=True))
    notes = [f'{name}: {note}' for name, run in named for note in run.notes]
    if len({run.machine for _, run in named if run.machine}) > 1:
        listed = '; '.join(f'{name}: {run.machine}' for name, run in named)
        notes.insert(0, f'Seconds do not compare: the runs were on different machines ({listed})')
    if any(isinstance(grid, Mapping) for table in comparison.tables for grid in table.protocol['time_grid'].values()):
        notes.insert(0, _OBJECTIVES_RULE)
    return [*notes, *(f'left out: {text}' for text in comparison.left_out)]


def format_comparison(comparison: Comparison) -> str:
    """The tables for a terminal; each protocol stands once, behind the tables of what was measured by it."""
    lines = [f'{n}  =  {r.source}' for n, r in zip(comparison.names, comparison.runs, strict=True)]
    for table in comparison.tables:
        lines += ['', f'{table.metric} ({table.better} is better)']
        for axis, name in AXES.items():
            head, cells = [name, *comparison.names], cells_of(table, axis)
            lines += ['', text_table(head, cells) if cells else f'{name}: not recorded']
        lines += ['', text_table(SPEED_UP_HEAD, speed_up_rows(comparison, table))]
    for protocol, metrics in by_protocol((table.metric, table.protocol) for table in comparison.tables):
        facts = ', '.join(f'{name} {value}' for name, value in flat(protocol).items())
        lines += ['', f'protocol of {", ".join(metrics)}: {facts}']
    return '\n'.join([*lines, '', *(f'- {note}' for note in (*notes_of(comparison), *RULES))])
