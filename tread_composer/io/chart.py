"""Line charts as inline SVG, whose colours come from the page: readable in light and dark, sharp on every screen."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ['NUM_COLOURS', 'Chart', 'Curve', 'figure']

NUM_COLOURS = 6
_WIDTH, _HEIGHT = 380, 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 44
_LOGARITHMIC_FROM = 20.0  # largest over smallest value


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Args:
        name: For the legend.
        points: x and y, x ascending.
        colour: Number of its colour and marker; the same run has the same one in all charts of a page.
        marked: The point to point out, as its position in ``points``.
    """

    name: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    marked: int | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis.

    Args:
        x_label: With the unit.
        y_label: With the direction, for example ``'FID (lower is better)'``.
        curves: At least one, with at least one point.
        level: A y value to draw a dashed line at.
        level_label: What that line is.
    """

    x_label: str
    y_label: str
    curves: Sequence[Curve]
    level: float | None = None
    level_label: str = ''

    def __post_init__(self) -> None:
        if not any(curve.points for curve in self.curves):
            raise ValueError(f'a chart of {self.y_label!r} over {self.x_label!r} needs at least one point')
        if not all(math.isfinite(number) for curve in self.curves for point in curve.points for number in point):
            raise ValueError(f'a chart of {self.y_label!r} over {self.x_label!r} has points that are not finite')

    def logarithmic(self) -> bool:
        """Whether the y axis is logarithmic: positive values that differ by more than a factor of 20."""
        values = [y for curve in self.curves for _, y in curve.points]
        return min(values) > 0 and max(values) / min(values) > _LOGARITHMIC_FROM

    def svg(self) -> str:
        """The chart as an ``<svg>`` element that takes the width it is given."""
        return _Drawing(self).svg()


class _Drawing:
    """A chart with its scales."""

    def __init__(self, chart: Chart) -> None:
        self.chart, self.log = chart, chart.logarithmic()
        xs = [x for curve in chart.curves for x, _ in curve.points]
        ys = [y for curve in chart.curves for _, y in curve.points]
        ys += [chart.level] if chart.level is not None and (chart.level > 0 or not self.log) else []
        self.x_range = _widened(min([0.0, *xs]), max(xs))
        low, high = (math.log10(min(ys)), math.log10(max(ys))) if self.log else (min(ys), max(ys))
        margin = 0.06 * (high - low)
        self.y_range = _widened(low - margin, high + margin)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        value = math.log10(value) if self.log else value
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    def svg(self) -> str:
        """The picture as text that a page can hold."""
        label = html.escape(f'{self.chart.y_label} against {self.chart.x_label}', quote=True)
        parts = [f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
        parts += [*self._axes(), *self._level()]
        for curve in self.chart.curves:
            parts += self._curve(curve)
        return '\n'.join([*parts, '</svg>'])

    def _axes(self) -> list[str]:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        parts = []
        for value in _ticks(*self.x_range):
            at = self.x(value)
            parts.append(f'<line class="grid" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{bottom}"/>')
            parts.append(
                f'<text class="tick" x="{at:.1f}" y="{bottom + 15}" text-anchor="middle">{short(value)}</text>'
            )
        for value in _log_ticks(*self.y_range) if self.log else _ticks(*self.y_range):
            at = self.y(value)
            parts.append(f'<line class="grid" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>')
        middle = (_LEFT + right) / 2, (_TOP + bottom) / 2
        x_label, y_label = html.escape(self.chart.x_label), html.escape(self.chart.y_label)
        parts.append(f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>')
        parts.append(f'<text class="label" x="{middle[0]}" y="{_HEIGHT - 8}" text-anchor="middle">{x_label}</text>')
        turned = f'transform="rotate(-90 13 {middle[1]})"'
        parts.append(f'<text class="label" x="13" y="{middle[1]}" {turned} text-anchor="middle">{y_label}</text>')
        return parts

    def _level(self) -> list[str]:
        level = self.chart.level
        if level is None or (self.log and level <= 0):
            return []
        at, right = self.y(level), _WIDTH - _RIGHT
        text = html.escape(self.chart.level_label)
        # Above the line where there is room, else below it.
        label = at - 5 if at > _TOP + 16 else at + 13
        return [
            f'<line class="level" x1="{_LEFT}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}"/>',
            f'<text class="tick" x="{_LEFT + 5}" y="{label:.1f}">{text}</text>',
        ]

    def _curve(self, curve: Curve) -> list[str]:
        colour = f'c{curve.colour % NUM_COLOURS}'
        places = [(self.x(x), self.y(y)) for x, y in curve.points]
        line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in places)
        parts = [f'<polyline class="curve {colour}" points="{line}"/>'] if len(places) > 1 else []
        for index, ((x, y), (at_x, at_y)) in enumerate(zip(curve.points, places, strict=True)):
            text = html.escape(f'{curve.name}: {short(y)} at {short(x)} {self.chart.x_label}')
            size = 6.0 if index == curve.marked else 3.5
            parts.append(f'<g><title>{text}</title>{marker(curve.colour, at_x, at_y, size)}</g>')
        return parts


def figure(chart: Chart) -> str:
    """A chart with its legend below."""
    keys = ''.join(
        f'<li><svg class="key" viewBox="0 0 22 12" aria-hidden="true">'
        f'<line class="curve c{curve.colour % NUM_COLOURS}" x1="0" y1="6" x2="22" y2="6"/>'
        f'{marker(curve.colour, 11, 6, 3.5)}</svg>{html.escape(curve.name)}</li>'
        for curve in chart.curves
        if curve.points
    )
    return f'<figure>{chart.svg()}<ul class="legend">{keys}</ul></figure>'


def marker(number: int, x: float, y: float, size: float) -> str:
    """A filled shape: runs are told apart without colours too."""
    shapes = ((-1, -1, 1, -1, 1, 1, -1, 1), (0, -1.3, 1.2, 0.9, -1.2, 0.9), (0, -1.4, 1.4, 0, 0, 1.4, -1.4, 0))
    style = f'class="dot c{number % NUM_COLOURS}"'
    if number % (len(shapes) + 1) == 0:
        return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{size}"/>'
    shape = shapes[number % (len(shapes) + 1) - 1]
    corners = [f'{x + size * shape[i]:.1f},{y + size * shape[i + 1]:.1f}' for i in range(0, len(shape), 2)]
    return f'<polygon {style} points="{" ".join(corners)}"/>'


def short(value: float) -> str:
    """A number for an axis or a cell: four digits, thousands and millions as k and M."""
    for factor, letter in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= factor:
            unit = 1e3 if letter == 'k' else factor
            return f'{value / unit:.4g}{letter}'
    return f'{value:.4g}'


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that is not empty."""
    if high > low:
        return low, high
    half = abs(low) * 0.1 or 1.0
    return low - half, high + half


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers within a range: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    factors = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    return [f * 10.0**p for p in powers for f in factors if low <= math.log10(f * 10.0**p) <= high]
