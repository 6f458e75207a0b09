"""What an inspection leaves: a picture, the numbers as JSON, and lines for a terminal."""

import io
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from tread_composer.advisor.inspection import Inspection
from tread_composer.advisor.placement import SCORE_RULE, format_advice
from tread_composer.core.errors import UserError
from tread_composer.io.files import write_atomically
from tread_composer.io.table import text_table

__all__ = ['draw_inspection', 'format_inspection', 'write_inspection']

_HEAD = 'rank', 'blocks', 'similarity', 'over the times', 'score', 'ideal step ratio', ''
_COLUMNS = 4
_WIDTH = 110
_MOST_WRITTEN = 13  # depths up to which each cell has room for its number
_DARK = 0.45  # share of the colour scale below which white reads better than black


def write_inspection(inspection: Inspection, folder: str | Path, command: str) -> list[Path]:
    """Write ``similarity.png`` and ``inspection.json``, each whole or not at all, and return their paths.

    ``command`` is written down as the way to get the same again. ``UserError`` if they cannot be written.
    """
    numbers = json.dumps({'command': command, **inspection.facts}, indent=1).encode()
    contents = {'similarity.png': draw_inspection(inspection), 'inspection.json': numbers}
    files = {Path(folder, name): content for name, content in contents.items()}
    try:
        for path, content in files.items():
            write_atomically(path, content)
    except OSError as error:
        raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
    return list(files)


def format_inspection(inspection: Inspection) -> str:
    """The findings for a terminal."""
    facts, protocol = inspection.facts, inspection.facts['protocol']
    times = ', '.join(f'{time:g}' for time in protocol['times'])
    labels = 'with their labels' if protocol['labels'] != 'none' else 'without labels'
    lines = [
        f'{inspection.title}: {inspection.advice.depth} blocks',
        f'{protocol["samples"]} samples of {protocol["data"]}, {labels}; noise at t = {times} (0 is data)',
        '',
    ]
    for reading in facts['routes']:
        before = f'block {reading["start"] - 1}' if reading['start'] else 'the embedding'
        lines += [
            f'route of the run: blocks {reading["start"]} to {reading["end"]}',
            f'  where tokens leave it and where they return: similarity {reading["ends"]:.3f}',
            f'  outputs of its blocks and the output of {before}, just before it: {reading["outputs_mean"]:.3f} on '
            f'average, {reading["outputs_lowest"]:.3f} at least',
            f'  any two depths of the network: {reading["all_pairs"]:.3f} on average',
            '  (the paper: with a route these outputs become highly similar)',
        ]
    if not facts['routes']:
        lines.append('route of the run: none')
    lines += ['', format_advice(inspection.advice), '']
    rows = []
    for row in facts['candidates']:
        span = row['start'], row['end']
        places = {'proposed': span == inspection.advice.span, 'the run': span in inspection.routes}
        marks = ', '.join(word for word, holds in places.items() if holds)
        over_times = f'{row["lowest_over_times"]:.3f} to {row["highest_over_times"]:.3f}'
        figures = f'{row["similarity"]:.3f}', over_times, f'{row["score"]:.3f}', f'{row["ideal_step_ratio"]:.2f}x'
        rows.append((row['rank'], f'{span[0]} to {span[1]}', *figures, marks))
    if rows:
        lines += [
            f'what the map says of the {facts["num_candidates"]} routes that keep to the guidelines',
            text_table(_HEAD, rows, 'rrrrrrl'),
            SCORE_RULE,
            'evidence, not truth: nobody has trained these routes to test the score',
        ]
    lines += ['', *(textwrap.fill(f'note: {note}', _WIDTH, subsequent_indent='      ') for note in facts['notes'])]
    return '\n'.join(lines)


def draw_inspection(inspection: Inspection) -> bytes:
    """A PNG: one heat map for each time and one of their mean, with the run's routes and the proposed one."""
    from matplotlib.figure import Figure  # takes a second: not before there is something to draw

    panels = [(f't = {time:g}', similarity) for time, similarity in inspection.maps.items()]
    panels = [*panels, ('mean of the times', inspection.mean)] if len(panels) > 1 else panels
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.1 * columns + 1.2, 4.2 * rows + 1.0), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False)
    lowest = min(float(values.min()) for _, values in panels)
    lowest = min(math.floor(lowest * 20) / 20, 0.95)  # a scale that begins at 1 has no colours
    image: Any = None
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for (title, values), axes in zip(panels, grid.flat, strict=False):
        image = axes.imshow(values.numpy(), origin='lower', cmap='viridis', vmin=lowest, vmax=1.0)
        ticks = range(0, len(values), max(1, -(-len(values) // 10)))  # ten at most
        xlabel = 'depth (0: embedding, k: after block k - 1)'
        axes.set(title=title, xlabel=xlabel, ylabel='depth', xticks=ticks, yticks=ticks)
        for (row, column), value in np.ndenumerate(values.numpy()) if len(values) <= _MOST_WRITTEN else ():
            colour = 'white' if (value - lowest) / (1 - lowest) < _DARK else 'black'
            text = f'{value:.2f}'.replace('0.', '.')
            axes.text(column, row, text, ha='center', va='center', fontsize=7, color=colour)
        _outline_routes(axes, inspection)
    figure.colorbar(image, ax=list(grid.flat), label='cosine similarity of the same token', shrink=0.85)
    figure.suptitle(f'How alike tokens are at two depths: {inspection.title}')
    handles, labels = grid.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc='outside lower center', ncols=1, frameon=False)
    content = io.BytesIO()
    figure.savefig(content, format='png', dpi=110)
    return content.getvalue()


def _outline_routes(axes: Any, inspection: Inspection) -> None:
    """A square from the depth where tokens leave to the depth where they return; the score reads its corners."""
    from matplotlib import patheffects
    from matplotlib.patches import Rectangle

    squares = [(span, 'route of the run: blocks {} to {}', 'red', 'solid', 0.0) for span in inspection.routes]
    if inspection.advice.span is not None:
        rule = "the authors' rule" if inspection.advice.rule == 'authors' else 'our rule for few blocks'
        # Slightly wider, so that it can be seen around a route of the run that is the same.
        squares.append((inspection.advice.span, f'proposed: blocks {{}} to {{}} ({rule})', 'white', 'dashed', 0.12))
    for (start, end), label, colour, style, wider in squares:
        low, side = start - 0.5 - wider, end - start + 2 + 2 * wider
        outline: dict[str, Any] = {'edgecolor': colour, 'linestyle': style, 'label': label.format(start, end)}
        square = Rectangle((low, low), side, side, fill=False, linewidth=2, **outline)
        square.set_path_effects([patheffects.withStroke(linewidth=3.5, foreground='black')])
        axes.add_patch(square)
