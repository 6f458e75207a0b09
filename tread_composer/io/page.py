"""One HTML file with everything in it: no script, no address, nothing to load.

All text is escaped here, and only here: callers hand over plain text, numbers and the bytes of PNGs.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.flatten import flatten
from tread_composer.io.chart import Chart, figure
from tread_composer.io.files import write_atomically

__all__ = ['Report']

TitledTable = tuple[str, Sequence[str], Sequence[Sequence[str]], Sequence[tuple[int, int]]]

_PNG = b'\x89PNG\r\n\x1a\n'

_STYLE = """
:root { color-scheme: light dark; --paper: #fdfdfc; --ink: #1d2126; --soft: #5d656e; --line: #d9dce0; --band: #f1f3f5;
  --good: #e3f1e5; --c0: #0b62a4; --c1: #c2540a; --c2: #14805a; --c3: #a23b84; --c4: #7a6a00; --c5: #4b55c4; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181c; --ink: #e6e8ea; --soft: #a0a8b1; --line: #363c43;
  --band: #1f2429; --good: #1f3a28; --c0: #6cb6f5; --c1: #f59a55; --c2: #57c99b; --c3: #e58cc9; --c4: #d9c34a;
  --c5: #a3abff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
p { max-width: 48rem; margin: .4rem 0 .8rem; }
.soft { color: var(--soft); }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { background: var(--band); font-weight: 600; }
th:first-child, td:first-child, .facts th, .facts td { text-align: left; }
.facts th { font-weight: 500; color: var(--soft); background: none; vertical-align: top; }
.facts td { white-space: normal; overflow-wrap: anywhere; min-width: 10rem; }
td.best { background: var(--good); font-weight: 600; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: .8rem 0; }
.tile { background: var(--band); border-radius: .5rem; padding: .7rem 1rem; min-width: 9rem; flex: 1 1 9rem;
  max-width: 18rem; }
.tile b { display: block; font-size: 1.55rem; line-height: 1.3; }
.tile span { display: block; font-size: .85rem; color: var(--soft); }
.charts, .pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(19rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; }
figure img { max-width: 100%; height: auto; background: #fff; border-radius: .4rem; display: block; }
figcaption { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; margin-top: .3rem; }
.side { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.side > section { min-width: 0; max-width: 100%; }
.chart { width: 100%; max-width: 34rem; height: auto; display: block; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .2rem 0 0; padding: 0;
  font-size: .85rem; }
.key { width: 22px; height: 12px; margin-right: .35rem; }
.grid { stroke: var(--line); stroke-width: 1; }
.axis { stroke: var(--soft); stroke-width: 1; fill: none; }
.level { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; }
.tick { fill: var(--soft); font-size: 11px; }
.label { fill: var(--ink); font-size: 12px; }
.curve { fill: none; stroke-width: 2; }
pre { background: var(--band); border-radius: .5rem; padding: .8rem 1rem; overflow-x: auto; font-size: .85rem; }
@media print { main { max-width: none; } h2 { break-after: avoid; } figure, tr { break-inside: avoid; } }
""" + '\n'.join(f'.curve.c{i} {{ stroke: var(--c{i}); }} .dot.c{i} {{ fill: var(--c{i}); }}' for i in range(6))


class Report:
    """A page that grows section by section; every method returns the page, so that calls can be chained.

    Args:
        title: The heading, and the name of the browser's tab.
        lead: One or two sentences below it.
    """

    def __init__(self, title: str, lead: str = '') -> None:
        self._title = title
        self._parts = [f'<h1>{html.escape(title)}</h1>']
        if lead:
            self._parts.append(f'<p class="soft">{html.escape(lead)}</p>')

    def heading(self, text: str, *, small: bool = False) -> 'Report':
        """Begin a section, or a part of one."""
        level = 'h3' if small else 'h2'
        return self._add(f'<{level}>{html.escape(text)}</{level}>')

    def text(self, text: str, *, soft: bool = False) -> 'Report':
        """A paragraph."""
        return self._add(f'<p{" class=soft" if soft else ""}>{html.escape(text)}</p>')

    def tiles(self, tiles: Sequence[tuple[str, str]]) -> 'Report':
        """The figures that a reader should see first: each a short value and what it is."""
        cells = ''.join(
            f'<div class="tile"><b>{html.escape(a)}</b><span>{html.escape(b)}</span></div>' for a, b in tiles
        )
        return self._add(f'<div class="tiles">{cells}</div>')

    def facts(self, facts: Mapping[str, Any]) -> 'Report':
        """Names and values, one a line; nested mappings by dotted names. For protocols and settings."""
        rows = ''.join(
            f'<tr><th scope="row">{html.escape(name)}</th><td>{html.escape(value)}</td></tr>'
            for name, value in flat(facts).items()
        )
        return self._add(f'<div class="scroll" tabindex="0"><table class="facts">{rows}</table></div>')

    def table(
        self, head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[tuple[int, int]] = ()
    ) -> 'Report':
        """A table that scrolls sideways on its own where the screen is narrow.

        Args:
            head: Names of the columns.
            rows: As many cells each.
            best: Row and column of the cells to point out.

        Raises:
            ValueError: A row has not one cell for each column.
        """
        return self._add(_table(head, rows, best))

    def tables(self, tables: Sequence[TitledTable]) -> 'Report':
        """Tables side by side where there is room: of each the heading, and what `table` takes.

        Raises:
            ValueError: A row has not one cell for each column.
        """
        parts = [
            f'<section><h3>{html.escape(text)}</h3>{_table(head, rows, best)}</section>'
            for text, head, rows, best in tables
        ]
        return self._add(f'<div class="side">{"".join(parts)}</div>')

    def charts(self, charts: Sequence[Chart]) -> 'Report':
        """Charts side by side, below each other where the screen is narrow."""
        return self._add(f'<div class="charts">{"".join(figure(chart) for chart in charts)}</div>')

    def pictures(self, pictures: Sequence[tuple[str, bytes]]) -> 'Report':
        """Pictures side by side.

        Args:
            pictures: Caption, and the content of a PNG.

        Raises:
            ValueError: The content is no PNG.
        """
        figures = []
        for caption, content in pictures:
            if not content.startswith(_PNG):
                raise ValueError(f'the picture {caption!r} is no PNG')
            data, text = base64.b64encode(content).decode(), html.escape(caption, quote=True)
            figures.append(
                f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
            )
        return self._add(f'<div class="pictures">{"".join(figures)}</div>')

    def command(self, command: str) -> 'Report':
        """A command to type."""
        return self._add(f'<pre tabindex="0">{html.escape(command)}</pre>')

    def html(self) -> str:
        """The whole page."""
        return '\n'.join(
            [
                '<!DOCTYPE html>',
                '<html lang="en"><head><meta charset="utf-8">',
                '<meta name="viewport" content="width=device-width, initial-scale=1">',
                f'<title>{html.escape(self._title)}</title>',
                f'<style>{_STYLE}</style></head>',
                '<body><main>',
                *self._parts,
                '</main></body></html>',
                '',
            ]
        )

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            UserError: The file cannot be written.
        """
        try:
            write_atomically(path, self.html().encode())
        except OSError as error:
            raise UserError(f'{path}: cannot be written: {error}') from None

    def _add(self, part: str) -> 'Report':
        self._parts.append(part)
        return self


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[tuple[int, int]]) -> str:
    if any(len(row) != len(head) for row in rows):
        raise ValueError(f'a table of {len(head)} columns has rows of {sorted({len(row) for row in rows})} cells')
    marked = set(best)
    lines = [''.join(f'<th scope="col">{html.escape(name)}</th>' for name in head)]
    for i, row in enumerate(rows):
        classes = [' class=best' if (i, j) in marked else '' for j in range(len(row))]
        lines.append(''.join(f'<td{c}>{html.escape(cell)}</td>' for c, cell in zip(classes, row, strict=True)))
    body = ''.join(f'<tr>{line}</tr>' for line in lines)
    return f'<div class="scroll" tabindex="0"><table>{body}</table></div>'


def flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """A tree of settings as dotted names and texts."""
    return {name: 'none' if value in (None, {}) else str(value) for name, value in flatten(tree).items()}
