"""What every source of images promises, and the rules that all layouts share: names, litter, order, progress."""

import collections
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from tread_composer.core.errors import UserError

__all__ = [
    'IMAGE_SUFFIXES',
    'SPLITS',
    'Ignored',
    'Listed',
    'Source',
    'arrange',
    'canonical_order',
    'check_member',
    'check_same_classes',
    'few',
    'in_label_order',
    'is_image',
    'is_litter',
    'read_class_names',
]

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm')
"""What makes a file an image, in small or capital letters. What is inside is found out by decoding it."""

SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
"""Folder and file names that mean a split, and which."""


class Source(Protocol):
    """The encoded images of one split, read at random, with their labels. Can be pickled; read in any process.

    Attributes:
        layout: ``'class folders'``, ``'flat folder'``, ``'ILSVRC tars'``, ``'zip'``, ``'webdataset tars'`` or
            ``'parquet files'``.
        description: One line for the log: layout, where, how many images and classes, what was ignored.
        class_names: In label order; empty without labels.
        names: ``<class>/<file>`` (without classes ``<file>``), sorted by (label, name): equal for equal images,
            whatever the layout.
        labels: int64, in the same order; zeros without labels.
        ignored: How many files beside the images were left out; ``description`` says which.
    """

    layout: str
    description: str
    class_names: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    ignored: int

    def __len__(self) -> int:
        """Number of images."""
        ...

    def read(self, position: int) -> bytes:
        """The image file at ``names[position]``, as it is.

        Raises:
            UserError: The file is gone, or has changed since the source was opened.
            UnreadableImage: This one is damaged within its archive, or too large to be an image.
        """
        ...


def is_image(name: str) -> bool:
    """Whether a file with this name counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_litter(parts: Sequence[str]) -> bool:
    """Whether a path is what systems leave behind: hidden files and folders, ``__MACOSX``, ``Thumbs.db``."""
    return parts[-1].lower() == 'thumbs.db' or any(part.startswith('.') or part == '__MACOSX' for part in parts)


def few(names: Collection[str], shown: int = 5) -> str:
    """The first few names in order and how many more there are."""
    text = ', '.join(sorted(names)[:shown])
    return text if len(names) <= shown else f'{text} and {len(names) - shown} more'


def check_member(archive: Path, name: str) -> tuple[str, ...]:
    """The parts of an archive member's name.

    Nothing is ever extracted by its name; an archive with such names is still not what it seems to be.

    Raises:
        UserError: The name leads out of the archive, or is not a plain relative path.
    """
    reason = None
    if name.startswith('/') or name[1:3] == ':/':
        reason = 'is an absolute path'
    elif '..' in name.split('/'):
        reason = "leads out of the archive ('..')"
    elif '\\' in name or '\0' in name:
        reason = 'holds a backslash or a zero byte'
    if reason:
        raise UserError(f'{archive}: member {name!r} {reason}. Refused: get the archive anew, or pack it again')
    return PurePosixPath(name).parts


@dataclass
class Ignored:
    """What lies beside the images: counted and told, so that nothing is left out silently."""

    litter: int = 0
    others: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, parts: Sequence[str]) -> None:
        """Count a file that is not an image."""
        if is_litter(parts):
            self.litter += 1
        else:
            self.others[PurePosixPath(parts[-1]).suffix.lower() or 'no extension'] += 1

    def __int__(self) -> int:
        return self.litter + self.others.total()

    def __str__(self) -> str:
        texts = []
        if self.litter:
            texts.append(f'{self.litter:,} hidden or system files')
        if self.others:
            kinds = ', '.join(f'{kind} {count:,}' for kind, count in sorted(self.others.items()))
            texts.append(f'{self.others.total():,} files that are not images ({kinds})')
        texts = [f'ignored {" and ".join(texts)}'] if texts else []
        return '; '.join(texts + self.notes)


@dataclass(eq=False)
class Listed:
    """The part of a source that does not depend on where its bytes are."""

    layout: str
    description: str
    class_names: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    ignored: int

    def __len__(self) -> int:
        return len(self.names)


def arrange(
    layout: str,
    where: Path | str,
    names: Sequence[str],
    labels: Sequence[int],
    class_names: tuple[str, ...],
    ignored: Ignored,
) -> tuple[dict[str, Any], np.ndarray]:
    """What ``Listed`` holds, in canonical order, and that order: positions in ``names`` as given.

    Raises:
        UserError: No image at all, two of one name, or a name that is not UTF-8.
    """
    if not names:
        raise UserError(f'{where}: no image ({" ".join(IMAGE_SUFFIXES)}) in it; {str(ignored) or "it is empty"}')
    order = canonical_order(where, names, labels)
    classes = f'{len(class_names):,} classes' if class_names else 'no classes (unconditional)'
    description = f'{layout} at {where}: {len(names):,} images, {classes}'
    facts = {
        'layout': layout,
        'description': f'{description}; {ignored}' if str(ignored) else description,
        'class_names': class_names,
        'names': [names[position] for position in order],
        'labels': np.array(labels, dtype=np.int64)[order],
        'ignored': int(ignored),
    }
    return facts, np.array(order)


def canonical_order(where: Path | str, names: Sequence[str], labels: Sequence[int]) -> list[int]:
    """Positions sorted by (label, name): the order of every layout.

    Raises:
        UserError: Two images of one name, or a name that is not UTF-8.
    """
    if len(set(names)) != len(names):
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        raise UserError(f'{where}: {len(twice):,} names occur more than once: {few(twice)}. Each image needs its own')
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f'{where}: the name {name!r} is not UTF-8. Rename the file') from error
    return sorted(range(len(names)), key=lambda position: (labels[position], names[position]))


def in_label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names by label: 0 to n - 1 by their value, all other names as texts, which is torchvision's order."""
    classes = sorted(set(names))
    numbers = [str(number) for number in range(len(classes))]
    return tuple(numbers if sorted(numbers) == classes else classes)


def check_same_classes(where: Path | str, classes: dict[str, Iterable[str]]) -> None:
    """Train and val must have the same class folders: a missing one means an incomplete copy.

    Raises:
        UserError: They have not; says which are missing where.
    """
    if set(classes) != {'train', 'val'}:
        return
    train, val = set(classes['train']), set(classes['val'])
    for split, counterpart, missing in (('train', 'val', train - val), ('val', 'train', val - train)):
        if missing:
            raise UserError(
                f'{where}: {split} has {len(missing):,} classes that {counterpart} lacks: {few(missing)}. '
                f'Complete the data, or give the folder of one split alone'
            )


def read_class_names(path: Path) -> tuple[str, ...]:
    """A text file with one class name a line, in label order.

    Raises:
        UserError: No such file, not a text, an empty line, or a name that occurs twice.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding='utf-8').splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'class names {path}: cannot be read as a text: {error}') from error
    if not lines or '' in lines or len(set(lines)) != len(lines):
        raise UserError(
            f'class names {path}: {len(lines)} lines; each needs a name, and each name once, in label order'
        )
    return tuple(lines)
