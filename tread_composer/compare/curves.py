"""Quality against cost: values at equal cost, and the cost of equal quality. Plain arithmetic on measured points.

**Between measured points** a curve is a straight line, on every axis; what was read off such a line is said to be so.
Beyond its first and last point nothing is known, and nothing is made up.

**Speed-up at equal quality** is what TREAD's "14x" and "37x" are (arXiv 2501.04765, figure 1): the reference run has
its best value at the cost x_A; the other run reaches that value, for the first time, at the cost x_B; the speed-up is
x_A / x_B. So it is a ratio of costs to the same quality, not of the costs of a step. Where the other run does not reach
the reference's best value, the same can be asked for the best value of the other run, which both reach.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tread_composer.metrics.metric import Better

__all__ = [
    'AXES', 'Axis', 'Curve', 'Point', 'SpeedUp', 'Value', 'best_point', 'common_speed_up', 'speed_up', 'value_at',
]  # fmt: skip

Axis = Literal['step', 'teraflops', 'seconds']
AXES: dict[Axis, str] = {'step': 'training steps', 'teraflops': 'training TFLOPs', 'seconds': 'seconds of training'}


@dataclass(frozen=True)
class Point:
    """One measurement: batches trained, the metric's value, what training had cost until then; None if not recorded."""

    step: int
    value: float
    teraflops: float | None = None
    seconds: float | None = None

    def cost(self, axis: Axis) -> float | None:
        """What training had cost."""
        return getattr(self, axis)


@dataclass(frozen=True)
class Curve:
    """A metric of a run under one protocol; its points ascend in ``step``."""

    metric: str
    protocol: Mapping[str, Any]
    points: tuple[Point, ...]
    better: Better


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
