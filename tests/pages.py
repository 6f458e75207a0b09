"""Reads the pages that the commands write, as a strict browser would."""

import base64
import io
import re
from html.parser import HTMLParser

from PIL import Image

VOID = {'meta', 'img', 'br', 'link', 'input', 'hr'}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f'never closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ('td', 'th'):
            self.cells.append('')

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ('td', 'th'):
            self.cells[-1] += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def assert_self_contained(text: str) -> Page:
    """Nothing that a browser would load or run, and no address at all."""
    page = Page(text)
    assert not re.search(r'https?:|//[a-z]|@import|url\(', text), re.search(r'https?:|//[a-z]|@import|url\(', text)
    for name, attributes in page.tags:
        assert name not in ('script', 'link', 'iframe', 'object', 'base')
        assert not any(key.startswith('on') for key in attributes)
        for key in ('src', 'href', 'srcset', 'xlink:href'):
            address = attributes.get(key) or 'data:image/png;base64,'
            assert address.startswith(('data:image/png;base64,', 'data:image/svg+xml;base64,'))
    for svg in drawings(page):
        assert not re.search(r'<script|<foreignObject|@import|url\((?!#)|href="(?!#)', svg)
    return page


def drawings(page: Page) -> list[str]:
    """The charts of a page, each an SVG file."""
    prefix = 'data:image/svg+xml;base64,'
    sources = [attributes['src'] or '' for attributes in page.named('img')]
    return [base64.b64decode(source[len(prefix) :]).decode() for source in sources if source.startswith(prefix)]


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of the curves of a chart, in the drawing: y grows downwards."""
    paths = re.findall(r'<path d="([^"]*)"[^>]*clip-path[^>]*stroke: var\(--c\d\)', svg)
    return [[(float(x), float(y)) for x, y in re.findall(r'[ML] (\S+) (\S+)', path)] for path in paths]


def png() -> bytes:
    content = io.BytesIO()
    Image.new('RGB', (3, 2), 'red').save(content, format='PNG')
    return content.getvalue()
