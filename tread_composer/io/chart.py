"""Line charts, drawn once by matplotlib: PNG for a file, SVG for a page, where the colours follow light and dark."""

import io
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ['Chart', 'Curve', 'charts_png', 'logarithmic_y', 'short']

_LOGARITHMIC_FROM = 20.0  # largest over smallest value
_MARKERS = 'os^D'
_LEGEND_WIDTH = 50  # letters that fit beside a marker
_LIGHT = {'ink': '#1d2126', 'soft': '#5d656e', 'line': '#d9dce0', 'paper': '#fdfdfc'}
_DARK = {'ink': '#e6e8ea', 'soft': '#a0a8b1', 'line': '#363c43', 'paper': '#15181c'}
# At least 4.5:1 against the paper of the same scheme.
_CURVES = ['#0b62a4', '#c2540a', '#14805a', '#a23b84', '#7a6a00', '#4b55c4']
_CURVES_DARK = ['#6cb6f5', '#f59a55', '#57c99b', '#e58cc9', '#d9c34a', '#a3abff']


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str  # in the legend
    points: Sequence[tuple[float, float]]  # x and y, x ascending
    colour: int = 0  # number of its colour and marker; the same run has the same one in all charts of a page
    marked: int | None = None  # index in `points` of the point to ring


@dataclass(frozen=True)
class Chart:
    """Curves over a common axis, with one point at least; all are finite."""

    x_label: str  # name and unit
    y_label: str  # name and direction, for example 'FID (lower is better)'
    curves: Sequence[Curve]
    level: float | None = None  # a y value to draw a dashed line at
    level_label: str = ''

    def logarithmic(self) -> bool:
        """Whether the y axis is logarithmic: positive values that differ by more than a factor of 20."""
        values = [y for curve in self.curves for _, y in curve.points]
        return min(values) > 0 and max(values) / min(values) > _LOGARITHMIC_FROM

    def plot(self, axes: Any) -> list[tuple[Any, str]]:
        """Draw into axes of matplotlib, in the colours of light paper; returns lines and names for a legend."""
        named = []
        for curve in self.curves:
            if curve.points:
                colour, marker = _CURVES[curve.colour % len(_CURVES)], _MARKERS[curve.colour % len(_MARKERS)]
                (line,) = axes.plot(*zip(*curve.points, strict=True), color=colour, marker=marker, markersize=4)
                named.append((line, curve.name))
            if curve.marked is not None:
                axes.plot(*curve.points[curve.marked], 'o', markersize=12, mfc='none', mec=_LIGHT['ink'])
        if self.logarithmic():  # else the first values would hide all later ones
            logarithmic_y(axes)
        if self.level is not None and (self.level > 0 or not self.logarithmic()):
            line = axes.axhline(self.level, color=_LIGHT['soft'], linestyle='--', linewidth=1)
            named.append((line, self.level_label))
        axes.set_xlim(left=min(0.0, *(x for curve in self.curves for x, _ in curve.points)))
        # Above instead of turned by 90 degrees: a long name of a metric has more room there.
        for label in (axes.set_xlabel(self.x_label), axes.set_title(self.y_label, loc='left', fontsize=10)):
            label.set(parse_math=False, color=_LIGHT['ink'])  # names are the users': a dollar sign is none of TeX
        axes.grid(color=_LIGHT['line'])
        axes.set_axisbelow(True)
        axes.tick_params(which='both', colors=_LIGHT['soft'])
        axes.spines[:].set_color(_LIGHT['soft'])
        axes.set_facecolor(_LIGHT['paper'])
        return named

    def svg(self) -> str:
        """The chart with its legend below, as an SVG file of its own, whose colours follow the reader's scheme."""
        import matplotlib

        content = io.StringIO()
        # Text stays text, in the reader's fonts; a fixed salt makes equal charts equal files.
        with matplotlib.rc_context({'svg.fonttype': 'none', 'svg.hashsalt': 'chart', 'font.family': 'sans-serif'}):
            _figure([[self]]).savefig(content, format='svg', metadata={'Date': None, 'Creator': None})
        return _in_both_schemes(content.getvalue())


def charts_png(rows: Sequence[Sequence[Chart | str]]) -> bytes:
    """The content of a PNG of charts in rows; a text stands where there is no chart."""
    content = io.BytesIO()
    _figure(rows).savefig(content, format='png', dpi=110)
    return content.getvalue()


def _figure(rows: Sequence[Sequence[Chart | str]]) -> Any:
    """Charts on light paper, each with its legend below."""
    from matplotlib.figure import Figure  # takes a second: not before there is something to draw

    columns, lines = max(map(len, rows)), 1
    figure = Figure(figsize=(4.4 * columns, 3), layout='constrained', facecolor=_LIGHT['paper'])
    grid = figure.subfigures(len(rows), columns, squeeze=False, facecolor='none')
    for row, places in zip(rows, grid, strict=True):
        for chart, place in zip(row, places, strict=False):
            if isinstance(chart, str):
                place.text(0.5, 0.5, chart, ha='center', color=_LIGHT['ink'])
                continue
            named = [(line, textwrap.fill(name, _LEGEND_WIDTH)) for line, name in chart.plot(place.subplots())]
            lines_drawn, names = zip(*named, strict=True)
            labels = [str(number) for number in range(len(names))]
            legend = place.legend(lines_drawn, labels, frameon=False, loc='outside lower center', fontsize=9)
            # Set afterwards: matplotlib leaves out labels that begin with an underscore, and reads dollars as TeX.
            for text, name in zip(legend.get_texts(), names, strict=True):
                text.set(parse_math=False, color=_LIGHT['ink'], text=name)
            lines = max(lines, sum(1 + name.count('\n') for _, name in named))
    figure.set_figheight((3.1 + 0.2 * lines) * len(rows))  # inches; two tenths for a line of a legend
    return figure


def _in_both_schemes(svg: str) -> str:
    """Colours as CSS variables with a light and a dark value."""
    light = _LIGHT | {f'c{i}': colour for i, colour in enumerate(_CURVES)}
    dark = _DARK | {f'c{i}': colour for i, colour in enumerate(_CURVES_DARK)}
    for name, colour in light.items():  # matplotlib writes colours as `fill: #...`
        svg = re.sub(rf'(fill|stroke): {colour}', rf'\1: var(--{name})', svg)
    values = [''.join(f'--{name}: {colour}; ' for name, colour in scheme.items()) for scheme in (light, dark)]
    style = f'svg {{ {values[0]}}} @media (prefers-color-scheme: dark) {{ svg {{ {values[1]}}} }}'
    return re.sub(
        r'(<svg [^>]*>)', rf'\1<style>{style} text {{ font-family: system-ui, sans-serif; }}</style>', svg, count=1
    )


def logarithmic_y(axes: Any) -> None:
    """A logarithmic axis that reads 10, 20, 50, where matplotlib has 10^1 and 2 x 10^1."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale('log')
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: short(value))
    axes.yaxis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number for an axis or a cell: four digits, thousands and millions as k and M."""
    for factor, letter in ((1e9, 'G'), (1e6, 'M'), (1e4, 'k')):
        if abs(value) >= factor:
            unit = 1e3 if letter == 'k' else factor
            return f'{value / unit:.4g}{letter}'
    return f'{value:.4g}'
