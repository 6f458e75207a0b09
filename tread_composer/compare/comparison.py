"""Runs held against the first one, at equal cost and at equal quality, metric by metric.

Numbers that were measured by different protocols are not compared.

**Between measured points** a curve is a straight line, on every axis; what was read off such a line is said to be so.
Beyond its first and last point nothing is known, and nothing is made up.

**Speed-up at equal quality** is what TREAD's "14x" and "37x" are (arXiv 2501.04765, figure 1): the reference run has
its best value at the cost x_A; the other run reaches that value, for the first time, at the cost x_B; the speed-up is
x_A / x_B. So it is a ratio of costs to the same quality, not of the costs of a step. Where the other run does not reach
the reference's best value, the same can be asked for the best value of the other run, which both reach.
"""

import itertools
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tread_composer.compare.runs import AXES, Axis, Curve, Point, Run
from tread_composer.core.errors import UserError
from tread_composer.metrics.metric import Better
from tread_composer.metrics.protocol import differences

__all__ = [
    'Comparison', 'MetricTable', 'SpeedUp', 'Value', 'best_point', 'common_speed_up', 'compare', 'speed_up', 'value_at',
]  # fmt: skip


@dataclass(frozen=True)
class Value:
    """A value at a cost, and whether it was measured there or read off the line between two measurements."""

    value: float
    measured: bool


@dataclass(frozen=True)
class SpeedUp:
    """How much less one run needs for the best value of another; each number None if it is not known."""

    quality: float  # the reference's best value
    reference: float | None = None  # where the reference measured it
    reached: float | None = None  # where the other's curve reaches it first (between two points: on the straight line)
    measured: float | None = None  # where the other first measured a value as good: reached there at the latest
    at_least: bool = False  # the other was as good at its very first point: the ratio is only a lower bound
    reason: str = ''  # why there is no ratio, in words; empty if there is one

    @property
    def ratio(self) -> float | None:
        """``reference / reached``."""
        return None if self.reference is None or not self.reached else self.reference / self.reached


def best_point(points: Sequence[Point], better: Better) -> Point:
    """The measured point of best value, the earliest of equals; there must be a point."""
    sign = 1 if better == 'lower' else -1
    return min(points, key=lambda point: (sign * point.value, point.step))  # of equal values the cheapest


def value_at(points: Sequence[Point], axis: Axis, cost: float) -> Value | str:
    """The value at a cost, or why there is none: beyond the measured points, or no record of this cost."""
    recorded = [(x, point.value) for point in points if (x := point.cost(axis)) is not None]
    if not recorded:
        return 'not recorded'
    for x, value in recorded:
        if math.isclose(x, cost, rel_tol=1e-9):
            return Value(value, measured=True)
    for (x0, y0), (x1, y1) in itertools.pairwise(recorded):
        if x0 < cost < x1:
            return Value(y0 + (y1 - y0) * (cost - x0) / (x1 - x0), measured=False)
    return 'before its first' if cost < recorded[0][0] else 'beyond its last'


def speed_up(reference: Sequence[Point], run: Sequence[Point], better: Better, axis: Axis) -> SpeedUp:
    """The ratio of what the reference and another run need for the reference's best value; points ascend in step."""
    target = best_point(reference, better)
    cost, sign = target.cost(axis), 1 if better == 'lower' else -1
    index = next((i for i, point in enumerate(run) if sign * point.value <= sign * target.value), None)
    if cost is None:
        return SpeedUp(target.value, reason='not recorded for the reference')
    if index is None:
        return SpeedUp(target.value, cost, reason='not reached')
    at_index = run[index].cost(axis)
    if index == 0 and at_index is not None:
        return SpeedUp(target.value, cost, at_index, at_index, at_least=True)
    before = run[index - 1]
    x0 = before.cost(axis)
    if at_index is None or x0 is None:
        return SpeedUp(target.value, cost, reason='not recorded')
    # Of the way from the point before: a straight line
    share = (target.value - before.value) / (run[index].value - before.value)
    return SpeedUp(target.value, cost, x0 + (at_index - x0) * share, at_index)


def common_speed_up(reference: Sequence[Point], run: Sequence[Point], better: Better, axis: Axis) -> SpeedUp:
    """The ratio at the other run's best value: for where `speed_up` says "not reached"."""
    inverse = speed_up(run, reference, better, axis)
    if inverse.at_least:
        return SpeedUp(inverse.quality, reason='not known: the reference was better from its first measurement on')
    return SpeedUp(inverse.quality, inverse.reached, inverse.reference, inverse.reference, reason=inverse.reason)


@dataclass(frozen=True)
class MetricTable:
    """One metric, under one protocol that all runs share."""

    metric: str
    better: Better
    protocol: Mapping[str, Any]  # of runs with different objectives, `time_grid` has the grid of each by name
    points: tuple[tuple[Point, ...], ...]  # each run's measurements, the reference first

    def speed_ups(self, run: int) -> dict[Axis, SpeedUp]:
        """Of a run against the reference, at the reference's best value."""
        return {axis: speed_up(self.points[0], self.points[run], self.better, axis) for axis in AXES}

    def common(self, run: int) -> dict[Axis, SpeedUp]:
        """The same at the run's own best value, where it does not reach the reference's; else empty."""
        if self.speed_ups(run)['step'].reason != 'not reached':
            return {}
        return {axis: common_speed_up(self.points[0], self.points[run], self.better, axis) for axis in AXES}

    def rows(self, axis: Axis) -> list[tuple[float, list[Value | str]]]:
        """Costs, and the value of each run there or why there is none; empty where no run has a record of this cost.

        The costs are those at which the reference was measured, and the largest that all runs have reached.
        """
        costs = [[x for point in run if (x := point.cost(axis)) is not None] for run in self.points]
        recorded = [run for run in costs if run]
        if not recorded:
            return []
        rows: list[tuple[float, list[Value | str]]] = []
        for cost in sorted([*recorded[0], min(run[-1] for run in recorded)]):
            if not rows or not math.isclose(rows[-1][0], cost, rel_tol=1e-9):
                rows.append((cost, [value_at(points, axis, cost) for points in self.points]))
        return rows


@dataclass(frozen=True)
class Comparison:
    """Runs held against the first of them."""

    runs: tuple[Run, ...]
    names: tuple[str, ...]  # their own, told apart where two are equal
    tables: tuple[MetricTable, ...]  # one for each metric that all runs have under the same protocol
    left_out: tuple[str, ...]  # metrics that not all runs have, in words


def compare(runs: Sequence[Run], metrics: Sequence[str] = ()) -> Comparison:
    """Hold runs, two or more, against the first one, in all ``metrics`` that they share if none are given.

    Raises:
        UserError: A metric is in no common protocol (lists the differences), or there is none in common.
    """
    names = _names(runs)
    metrics_of = {name: {curve.metric for curve in run.curves} for name, run in zip(names, runs, strict=True)}
    measured = list(dict.fromkeys(curve.metric for run in runs for curve in run.curves))
    absent = [name for name in metrics if not any(_is(metric, name) for metric in measured)]
    if absent:
        raise UserError(f'--metrics: no run has {", ".join(absent)}; there are {", ".join(measured) or "none"}')
    asked = [metric for metric in measured if not metrics or any(_is(metric, name) for name in metrics)]
    shared = [metric for metric in asked if all(metric in owned_metrics for owned_metrics in metrics_of.values())]
    if not shared:
        owned = '\n'.join(
            f'  {name}: {", ".join(sorted(owned_metrics)) or "no metric"}' for name, owned_metrics in metrics_of.items()
        )
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
