"""Tables for a terminal."""

from collections.abc import Sequence

from tabulate import tabulate

from tread_composer.core.masking import printable

__all__ = ['text_table']

_SIDES = {'l': 'left', 'r': 'right'}


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]], sides: str = 'l') -> str:
    """Columns of text below their names, if they have some, without lines or trailing blanks.

    ``sides`` has ``l`` or ``r`` for each column; where it is too short, the other columns are aligned to the right.
    """
    # The head as a row: tabulate 0.9 fails on a table that has no other. Its parser of numbers would rewrite figures.
    cells = [list(map(str, row)) for row in (head, *rows) if row]
    alignment = [_SIDES[side] for side in sides.ljust(len(cells[0]), 'r')]
    text = tabulate(cells, tablefmt='plain', colalign=alignment, disable_numparse=True)
    return '\n'.join(printable(line.rstrip()) for line in text.split('\n'))
