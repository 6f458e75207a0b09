"""``python -m tread_composer compare A B [C ...]``: tables, a picture, a page, and the speed-up at equal quality.

A is the reference: its costs and its best value are what the others are held against. Numbers that were measured by
different protocols are not compared.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tread_composer.compare.curves import (
    AXES,
    Axis,
    Point,
    SpeedUp,
    Value,
    best_point,
    common_speed_up,
    speed_up,
    value_at,
)
from tread_composer.compare.entries import Curve
from tread_composer.compare.runs import Run
from tread_composer.core.errors import UserError
from tread_composer.io.chart import short
from tread_composer.io.page import flat
from tread_composer.io.table import text_table
from tread_composer.metrics.protocol import differences
from tread_composer.metrics.quantity import Better

__all__ = [
    'LINES_RULE',
    'OBJECTIVES_RULE',
    'ONE_RUN_RULE',
    'SPEED_UP_HEAD',
    'SPEED_UP_RULE',
    'Comparison',
    'MetricTable',
    'Row',
    'cells_of',
    'compare',
    'figure',
    'format_comparison',
    'notes_of',
    'ratio_in_words',
    'speed_up_rows',
]

LINES_RULE = (
    'A value marked with ≈ was not measured there: it is read off the straight line between the two neighbouring '
    "measurements. Beyond a run's first and last measurement nothing is assumed."
)
SPEED_UP_RULE = (
    'Speed-up at equal quality: what the reference had spent when it measured its best value, divided by what the '
    'other run had spent when its curve first reached that value (on the straight line between two measurements; the '
    "figure at the first measurement that is as good stands beside it). This is how TREAD's 14x and 37x are defined; "
    'it is not the speed-up of a step. A run that never gets there is also held against the reference at its own best '
    'value, which both have reached; below 1x it needed more.'
)
OBJECTIVES_RULE = (
    'The runs have different objectives, so each was sampled on the time grid of its own (protocol, time_grid): the '
    'sampler and its number of steps are equal, the times are not.'
)
ONE_RUN_RULE = 'One run each: differences between seeds are not in these numbers.'


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
        rows: Values at equal cost, by what is counted; empty where no run has a record of it.
        speed_ups: Of each run but the reference, by what is counted.
        common: The same at the other run's best value, where it does not reach the reference's; else empty.
    """

    metric: str
    better: Better
    protocol: Mapping[str, Any]
    points: tuple[tuple[Point, ...], ...]
    rows: Mapping[Axis, tuple[Row, ...]]
    speed_ups: tuple[Mapping[Axis, SpeedUp], ...]
    common: tuple[Mapping[Axis, SpeedUp], ...]


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
    """Hold runs against the first one.

    Args:
        runs: Two or more.
        metrics: The metrics to compare; ``fid`` stands for ``fid_10000`` too. All that the runs share if empty.

    Raises:
        UserError: A metric is in no common protocol (lists the differences), or there is none in common.
    """
    if len(runs) < 2:
        raise UserError(f'compare: {len(runs)} run given; give two or more, the reference first')
    measured = list(dict.fromkeys(curve.metric for run in runs for curve in run.curves))
    absent = [name for name in metrics if not any(_is(metric, name) for metric in measured)]
    if absent:
        raise UserError(f'--metrics: no run has {", ".join(absent)}; there are {", ".join(measured) or "none"}')
    asked = [metric for metric in measured if not metrics or any(_is(metric, name) for name in metrics)]
    shared = [metric for metric in asked if all(any(c.metric == metric for c in run.curves) for run in runs)]
    names = _names(runs)
    if not shared:
        owned = '\n'.join(
            f'  {name}: {", ".join(sorted({c.metric for c in run.curves})) or "no metric"}'
            for name, run in zip(names, runs, strict=True)
        )
        raise UserError(f'compare: the runs have no metric in common.\n{owned}')
    tables = [table for metric in shared for table in _tables(metric, runs, names)]
    left_out = [f'{metric}: not in every run' for metric in asked if metric not in shared]
    for metric in shared:
        common = sum(table.metric == metric for table in tables)
        for name, run in zip(names, runs, strict=True):
            more = sum(curve.metric == metric for curve in run.curves) - common
            left_out += [f'{metric} of {name} by {more} further protocols, which not every run has'] if more > 0 else []
    return Comparison(tuple(runs), names, tuple(tables), tuple(left_out))


def _is(metric: str, asked: str) -> bool:
    """Whether this is the metric asked for, or that metric of fewer samples."""
    name, _, number = metric.rpartition('_')
    return metric == asked or (number.isdecimal() and name == asked)


def _names(runs: Sequence[Run]) -> tuple[str, ...]:
    names = [run.name for run in runs]
    return tuple(
        f'{name} ({"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i % 26]})' if names.count(name) > 1 else name
        for i, name in enumerate(names)
    )


def _tables(metric: str, runs: Sequence[Run], names: Sequence[str]) -> list[MetricTable]:
    """One for each protocol of the reference that every other run has too."""
    candidates = [[c for c in run.curves if c.metric == metric] for run in runs]
    tables = []
    for curve in candidates[0]:
        if differences(curve.protocol, curve.protocol):
            continue  # something of it is unknown
        equal = [curve]
        for curves in candidates[1:]:
            # With all that are chosen, not with the first alone: runs of another objective have grids of their own.
            fits = (c for c in curves if not any(differences(e.protocol, c.protocol) for e in equal))
            match = next(fits, None)
            equal += [] if match is None else [match]
        if len(equal) == len(candidates):
            tables.append(_table(metric, equal, names))
    if not tables:
        lines = []
        for i, j in itertools.combinations(range(len(candidates)), 2):
            if i and lines:
                break  # those of the reference say it
            pairs = itertools.product(candidates[i], candidates[j])
            nearest = min((differences(a.protocol, b.protocol) for a, b in pairs), key=len)
            lines += [f'  {names[i]} and {names[j]}:', *(f'    {line}' for line in nearest)] if nearest else []
        raise UserError(
            f'{metric}: was measured by different protocols, so the values do not compare.\n' + '\n'.join(lines) +
            '\nMeasure the runs again with one protocol, or choose other --metrics.'
        )  # fmt: skip
    return tables


def _table(metric: str, curves: Sequence[Curve], names: Sequence[str]) -> MetricTable:
    points, better = tuple(curve.points for curve in curves), curves[0].better
    assert better is not None
    rows: dict[Axis, tuple[Row, ...]] = {axis: _rows(points, axis) for axis in AXES}
    speed_ups, common = [], []
    for run in points[1:]:
        at_best: dict[Axis, SpeedUp] = {axis: speed_up(points[0], run, better, axis) for axis in AXES}
        instead: dict[Axis, SpeedUp] = {}
        if at_best['step'].reason == 'not reached':
            instead = {axis: common_speed_up(points[0], run, better, axis) for axis in AXES}
        speed_ups.append(at_best)
        common.append(instead)
    protocol = curves[0].protocol
    grids = [curve.protocol['time_grid'] for curve in curves]
    if any(grid['objective'] != grids[0]['objective'] for grid in grids):
        protocol = {**protocol, 'time_grid': dict(zip(names, grids, strict=True))}
    return MetricTable(metric, better, protocol, points, rows, tuple(speed_ups), tuple(common))


def _rows(points: Sequence[Sequence[Point]], axis: Axis) -> tuple[Row, ...]:
    """At the costs where the reference was measured, and at the largest that all runs have reached."""
    costs = [[x for point in run if (x := getattr(point, axis)) is not None] for run in points]
    recorded = [run for run in costs if run]
    if not recorded:
        return ()
    at = recorded[0] + ([min(run[-1] for run in recorded)] if len(recorded) > 1 else [])
    rows: list[Row] = []
    for cost in sorted(at):
        if not rows or not math.isclose(rows[-1].cost, cost, rel_tol=1e-9):
            rows.append(Row(cost, tuple(_cell(run, axis, cost) for run in points)))
    return tuple(rows)


def _cell(points: Sequence[Point], axis: Axis, cost: float) -> Value | str:
    recorded = [x for point in points if (x := getattr(point, axis)) is not None]
    value = value_at(points, axis, cost)
    if value is not None:
        return value
    return 'not recorded' if not recorded else 'before its first' if cost < recorded[0] else 'beyond its last'


# --- as text ---


def _shown(cell: Value | str) -> str:
    return cell if isinstance(cell, str) else f'{"" if cell.measured else "≈ "}{figure(cell.value)}'


def figure(value: float) -> str:
    """A metric's value: four digits."""
    return f'{value:.4g}' if abs(value) < 1000 else f'{value:,.0f}'


def ratio_in_words(speed: SpeedUp) -> str:
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
    return [[short(row.cost), *map(_shown, row.cells)] for row in table.rows[axis]]


def speed_up_rows(comparison: Comparison, table: MetricTable) -> list[list[str]]:
    """The table of speed-ups; its head is `SPEED_UP_HEAD`."""
    rows = []
    for index, (speed_ups, common) in enumerate(zip(table.speed_ups, table.common, strict=True), 1):
        for owner, by_axis in ((0, speed_ups), (index, common)):
            if by_axis:
                best = best_point(table.points[owner], table.better)
                quality = f'best of {comparison.names[owner]}: {figure(best.value)} (step {best.step})'
                rows.append([comparison.names[index], quality, *(ratio_in_words(by_axis[axis]) for axis in AXES)])
    return rows


SPEED_UP_HEAD = ['run', 'to reach', *(f'in {name}' for name in AXES.values())]


def notes_of(comparison: Comparison) -> list[str]:
    """What a reader has to know of single runs."""
    notes = [
        f'{name}: {note}' for name, run in zip(comparison.names, comparison.runs, strict=True) for note in run.notes
    ]
    machines = {run.machine for run in comparison.runs if run.machine}
    if len(machines) > 1:
        listed = '; '.join(f'{n}: {r.machine}' for n, r in zip(comparison.names, comparison.runs, strict=True))
        notes.insert(0, f'Seconds do not compare: the runs were on different machines ({listed})')
    if any(isinstance(grid, Mapping) for t in comparison.tables for grid in t.protocol['time_grid'].values()):
        notes.insert(0, OBJECTIVES_RULE)
    return [*notes, *(f'left out: {text}' for text in comparison.left_out)]


def format_comparison(comparison: Comparison) -> str:
    """The tables for a terminal; a protocol that several metrics share is printed once."""
    lines = [f'{n}  =  {r.source}' for n, r in zip(comparison.names, comparison.runs, strict=True)]
    shown = None
    for table in comparison.tables:
        lines += ['', f'{table.metric} ({table.better} is better)']
        if table.protocol != shown:
            shown = table.protocol
            lines.append(_protocol_line(table.protocol))
        for axis, name in AXES.items():
            head = [name, *comparison.names]
            cells = cells_of(table, axis)
            lines += ['', text_table(head, cells) if cells else f'{name}: not recorded']
        lines += ['', text_table(SPEED_UP_HEAD, speed_up_rows(comparison, table))]
    notes = [f'- {note}' for note in (*notes_of(comparison), LINES_RULE, SPEED_UP_RULE, ONE_RUN_RULE)]
    return '\n'.join([*lines, '', *notes])


def _protocol_line(protocol: Mapping[str, Any]) -> str:
    return 'protocol: ' + ', '.join(f'{name} {value}' for name, value in flat(protocol).items())
