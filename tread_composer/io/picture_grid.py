"""Images side by side with their names, as one picture.

Legend: N tiles, H x W pixels, 3 colours.
"""

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = ['class_grid', 'picture_grid', 'png_bytes', 'shown_classes', 'shown_in_grid']

_GAP, _SEAM, _LINE = 8, 2, 18
_NARROWEST = 320  # pixels, for the sake of the title
_SIZE, _SMALLEST = 14, 9  # of letters, in pixels
_FEW_CLASSES, _SHOWN_CLASSES, _COLUMNS = 10, 8, 10


def shown_classes(classes: Sequence[int]) -> Sequence[int]:
    """The classes that a grid shows: all if there are at most 10, else the first 8."""
    return classes if len(classes) <= _FEW_CLASSES else classes[:_SHOWN_CLASSES]


def shown_in_grid(labels: Sequence[int]) -> tuple[list[int], list[int | None]]:
    """Which of many images, of these classes, a grid shows: a row for each of the ``shown_classes``, at most 10 in it.

    Positions of the images, row after row; and the label of each row, None where the row above has the same: one class
    alone fills several rows.
    """
    of_class: dict[int, list[int]] = {}
    for index, label in enumerate(labels):
        of_class.setdefault(label, []).append(index)
    classes = sorted(of_class)
    if len(classes) == 1:
        positions = of_class[classes[0]]
        columns = min(_COLUMNS, len(positions))
        rows = min(_SHOWN_CLASSES, len(positions) // columns)
        return positions[: rows * columns], [classes[0], *[None] * (rows - 1)]
    classes = list(shown_classes(classes))
    columns = min([_COLUMNS, *(len(of_class[label]) for label in classes)])  # every row is full
    return [index for label in classes for index in of_class[label][:columns]], list(classes)


def class_grid(
    tiles_NHWC: np.ndarray, row_labels: Sequence[int | None], class_names: Sequence[str], title: str
) -> Image.Image:
    """A ``picture_grid`` with the name of a class at each row.

    Tiles are uint8, row after row; C is 1 for grey or 3. A row label of None repeats the class above. ``class_names``
    are those of all classes, in order; their numbers if empty. The label behind the last is no class.
    """
    words = dict(enumerate([*class_names, 'no class'])) if class_names else {}
    names = ['' if label is None else str(words.get(label, label)) for label in row_labels]
    tiles_NHW3 = np.broadcast_to(tiles_NHWC, (*tiles_NHWC.shape[:3], 3))
    return picture_grid(tiles_NHW3, title, columns=len(tiles_NHW3) // len(names), row_names=names)


def picture_grid(
    tiles_NHW3: np.ndarray,
    title: str,
    *,
    columns: int,
    row_names: Sequence[str] = (),
    captions: Sequence[Sequence[str]] = (),
    views: int = 1,
    smallest: int = 64,
) -> Image.Image:
    """Lay tiles out in rows, with a title above, and names at the left of the rows or lines of text below each cell.

    Args:
        tiles_NHW3: uint8, row after row. Small ones are enlarged by a whole number.
        title: Broken into as many lines as it needs.
        columns: Cells in a row; the last row may be shorter.
        row_names: One for each row.
        captions: Of each cell, its lines; those that are too long are cut, with dots.
        views: Tiles of one cell, close to each other.
        smallest: Pixels that a cell is wide at least, so that it can be seen.

    Raises:
        ValueError: The tiles do not fill the rows that have names.
    """
    count, height, width = len(tiles_NHW3) // views, *tiles_NHW3.shape[1:3]
    rows = math.ceil(count / columns)
    if row_names and (count != len(row_names) * columns):
        raise ValueError(f'{count} images do not fill {len(row_names)} rows of {columns}')
    scale = max(1, math.ceil(smallest / (views * width)))  # a whole number: all pixels are enlarged alike
    tile_size = width * scale, height * scale
    cell = views * tile_size[0] + (views - 1) * _SEAM  # pixels
    lines = max(map(len, captions), default=0)
    step_x, step_y = cell + _GAP, tile_size[1] + lines * _LINE + _GAP
    row_names = [_drawable(name) for name in row_names]
    left = _GAP + max((math.ceil(_font(_SIZE).getlength(name)) + _GAP for name in row_names), default=0)
    right = max(left + columns * step_x, _NARROWEST)
    title_lines = _wrapped(_drawable(title), right - 2 * _GAP)
    top = 2 * _GAP + _LINE * len(title_lines)
    picture = Image.new('RGB', (right, top + rows * step_y), 'white')
    pen = ImageDraw.Draw(picture)
    for number, line in enumerate(title_lines):
        pen.text((_GAP, _GAP + _LINE * number), line, fill='black', font=_font(_SIZE))
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = left + column * step_x, top + row * step_y
        for view in range(views):
            tile = Image.fromarray(tiles_NHW3[index * views + view])
            # Smooth: the eye reads strokes of a few pixels where it would see blocks.
            tile = tile.resize(tile_size, Image.Resampling.BICUBIC) if scale > 1 else tile
            picture.paste(tile, (x + view * (tile_size[0] + _SEAM), y))
        for number, text in enumerate(captions[index] if captions else ()):
            line, font = _fitted(_drawable(text), cell)
            place = x, y + tile_size[1] + 2 + number * _LINE
            pen.text(place, line, fill='black' if number == 0 else 'dimgrey', font=font)
    for row, name in enumerate(row_names):
        pen.text((left - _GAP, top + row * step_y + tile_size[1] // 2), name, 'black', _font(_SIZE), anchor='rm')
    return picture


def png_bytes(picture: Image.Image) -> bytes:
    """The content of a PNG file."""
    content = io.BytesIO()
    picture.save(content, format='PNG')
    return content.getvalue()


@functools.cache
def _font_file() -> str:
    """Matplotlib's DejaVu Sans: on every machine, with Latin, Greek, Cyrillic, Arabic and thousands of signs."""
    import matplotlib

    return str(Path(matplotlib.get_data_path(), 'fonts', 'ttf', 'DejaVuSans.ttf'))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(), size)


@functools.cache
def _letters() -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(_font_file()).get_charmap())


def _drawable(text: str) -> str:
    r"""A letter that the font lacks as its number, ``\u732b``: boxes would all be alike."""
    letters = (letter if ord(letter) in _letters() else ascii(letter)[1:-1] for letter in text)
    return ''.join(letters)


def _wrapped(text: str, width: int) -> list[str]:
    lines = ['']
    for word in text.split():
        longer = f'{lines[-1]} {word}'.strip()
        if lines[-1] and _font(_SIZE).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fitted(text: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """A line, made smaller until it fits; what does not fit at the smallest size is cut."""
    size, kept = _SIZE - 3, text
    while _font(size).getlength(text) > width and size > _SMALLEST:
        size -= 1
    while _font(size).getlength(text) > width and kept:
        kept = kept[:-1]
        text = f'{kept}…'
    return text, _font(size)
