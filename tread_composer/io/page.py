"""One HTML file with everything in it: no script, no address, nothing to load.

All text is escaped by the template, and only there: callers hand over plain text, numbers, charts and PNGs.
"""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.core.flatten import flatten
from tread_composer.io.chart import Chart
from tread_composer.io.files import write_atomically

__all__ = ['Report', 'flat', 'in_words']

Cells = Sequence[tuple[int, int]]
TitledTable = tuple[str, Sequence[str], Sequence[Sequence[str]], Cells]


class Report:
    """A page that grows section by section; every method returns the page, so that calls can be chained.

    ``title`` is the name of the browser's tab too; ``lead`` are one or two sentences below it.
    """

    def __init__(self, title: str, lead: str = '') -> None:
        self._title, self._lead = title, lead
        self._parts: list[dict[str, Any]] = []

    def heading(self, text: str, *, small: bool = False) -> 'Report':
        """Begin a section, or a part of one."""
        return self._add('small' if small else 'heading', text=text)

    def text(self, text: str, *, soft: bool = False) -> 'Report':
        """A paragraph."""
        return self._add('text', text=text, soft=soft)

    def command(self, command: str) -> 'Report':
        """A command to type."""
        return self._add('command', text=command)

    def tiles(self, tiles: Sequence[tuple[str, str]]) -> 'Report':
        """The figures that a reader should see first: each a short value and what it is."""
        return self._add('tiles', tiles=tiles)

    def facts(self, facts: Mapping[str, Any]) -> 'Report':
        """Names and values, one a line; nested mappings by dotted names. For protocols and settings."""
        return self._add('facts', facts=flat(facts))

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]], best: Cells = ()) -> 'Report':
        """A table that scrolls sideways on its own where the screen is narrow; ``best`` cells are pointed out."""
        return self.tables([('', head, rows, best)])

    def tables(self, tables: Sequence[TitledTable]) -> 'Report':
        """Tables side by side where there is room: the heading of each, and what ``table`` takes."""
        names = 'title', 'head', 'rows', 'best'  # as the template calls them
        return self._add('tables', tables=[dict(zip(names, table, strict=True)) for table in tables])

    def charts(self, charts: Sequence[Chart]) -> 'Report':
        """Charts side by side, below each other where the screen is narrow."""
        images = [
            # As an image of its own: ids of one SVG do not meet those of another, and nothing in it can run.
            {'data': _data('svg+xml', chart.svg().encode()), 'alt': f'{chart.y_label} against {chart.x_label}'}
            for chart in charts
        ]
        return self._add('images', style='charts', images=images)

    def pictures(self, pictures: Sequence[tuple[str, bytes]]) -> 'Report':
        """Pictures side by side: caption and PNG of each."""
        images = [{'data': _data('png', png), 'alt': caption, 'caption': caption} for caption, png in pictures]
        return self._add('images', style='pictures', images=images)

    def html(self) -> str:
        """The whole page."""
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        loader = FileSystemLoader(Path(__file__).parent)
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        environment.trim_blocks = environment.lstrip_blocks = True  # without the blank lines of the template
        return environment.get_template('page.html').render(title=self._title, lead=self._lead, parts=self._parts)

    def write(self, path: str | Path) -> None:
        """Write the page, whole or not at all; ``UserError`` if it cannot be written."""
        try:
            write_atomically(path, self.html().encode())
        except OSError as error:
            raise UserError(f'{path}: cannot be written: {error}') from None

    def _add(self, kind: str, **content: Any) -> 'Report':
        self._parts.append({'kind': kind, **content})
        return self


def flat(tree: Mapping[str, Any]) -> dict[str, str]:
    """A tree of settings as dotted names and texts."""
    return {name: 'none' if value in (None, {}) else str(value) for name, value in flatten(tree).items()}


def in_words(tree: Mapping[str, Any]) -> str:
    """The same in one line."""
    return ', '.join(f'{name} {value}' for name, value in flat(tree).items())


def _data(kind: str, content: bytes) -> str:
    return f'data:image/{kind};base64,{base64.b64encode(content).decode()}'
