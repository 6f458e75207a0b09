"""What Tiny-ImageNet does otherwise than other folders: ``images/`` inside of classes, and a table of val's labels."""

import re
from collections.abc import Sequence

from tread_composer.conversion.sources.base import few
from tread_composer.core.errors import UserError

__all__ = ['ANNOTATIONS', 'annotated_classes', 'without_images_folder']

ANNOTATIONS = 'val_annotations.txt'
"""Lines of ``val_0.JPEG<TAB>n03444034<TAB>`` and a box: the classes of the images in ``images/`` beside it."""


def without_images_folder(names: Sequence[str]) -> list[str] | None:
    """``<class>/<file>`` of names that are all ``<class>/images/<file>``; else None."""
    parts = [name.split('/') for name in names]
    if any(len(part) != 3 or part[1] != 'images' for part in parts):
        return None
    return [f'{part[0]}/{part[2]}' for part in parts]


def annotated_classes(place: str, files: Sequence[str], content: bytes) -> list[str]:
    """The class of each file by the table at ``place``, which must name just these."""
    rows = [line.split('\t') for line in content.decode(errors='replace').splitlines() if line.strip()]
    if any(len(row) < 2 or not re.fullmatch(r'\S+', row[1]) for row in rows):
        raise UserError(f'{place}: not the table of Tiny-ImageNet (file, class and box, with tabs). Get it anew')
    class_of = {row[0]: row[1] for row in rows}
    for fault, wrong in (
        ('lists more than once', [row[0] for row in rows] if len(class_of) < len(rows) else []),
        ('has no class for', set(files) - class_of.keys()),
        ('has classes for images that are missing', class_of.keys() - set(files)),
    ):
        if wrong:
            raise UserError(f'{place}: {fault}: {few(set(wrong))}. Complete the data')
    return [class_of[file] for file in files]
