"""What every source of samples promises, and the rules that all layouts share: names, litter, order, labels.

A layout is one file with a function ``open_<layout>(root, ...)``, which ``detect`` calls: it finds out what the
samples are called, how they are labelled and where their bytes are, and hands that to ``arranged``.
"""

import collections
import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tread_composer.core.errors import UserError

__all__ = [
    'SPLITS', 'Ignored', 'Images', 'IndexedFiles', 'Source', 'arranged', 'check_names', 'check_splits',
    'few', 'in_label_order', 'is_image', 'is_litter', 'member_parts', 'refusing', 'source_of_files',
]  # fmt: skip

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.avif')
"""What makes a file an image, in small or capital letters. What is inside is found out by decoding it."""

SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
"""Folder and file names that mean a split, and which."""


@dataclass
class Ignored:
    """What lies beside the images: counted and reported, so that nothing is left out silently."""

    files: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)

    def add(self, parts: Sequence[str]) -> None:
        """Count a file that is not an image."""
        suffix = PurePosixPath(parts[-1]).suffix.lower() or 'no extension'
        self.files['hidden or system' if is_litter(parts) else suffix] += 1

    def __str__(self) -> str:
        kinds = ', '.join(f'{kind} {count:,}' for kind, count in sorted(self.files.items()))
        files = [f'ignored {self.files.total():,} files that are not images ({kinds})'] if kinds else []
        return '; '.join(files + self.notes)


@dataclass
class Images:
    """The images of one split as a layout lists them, in any order."""

    names: list[str] = field(default_factory=list)  # <class>/<file>; without classes, or before they are known, <file>
    labels: list[int] = field(default_factory=list)
    class_names: tuple[str, ...] = ()  # in label order; empty without labels
    ignored: Ignored = field(default_factory=Ignored)
    places: list[tuple[int, ...]] = field(default_factory=list)  # rows of the source's
    prefix: str = ''  # of their paths below the root: empty, or with ``/`` at its end
    form: str = '{name}'  # path below the prefix; of the name also {label} and {file}, around its first slash

    def label(self, classes: Sequence[str]) -> None:
        """Take the classes in label order, and each image's label, of the names of their classes."""
        self.class_names = in_label_order(classes)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self.labels = [label_of[name] for name in classes]

    def in_classes(self, class_names: tuple[str, ...]) -> None:
        """Put the class before the name of each file."""
        self.class_names = class_names
        self.names = [f'{class_names[label]}/{file}' for label, file in zip(self.labels, self.names, strict=True)]


@dataclass(eq=False)
class Source:
    """The samples of one split, read at random, with their labels. Can be pickled; read in any process.

    Attributes:
        description: One line for the log: layout, location, how many images and classes, what was ignored.
        class_names: In label order; empty without labels.
        names: No two alike. Images: ``<class>/<file>`` (without classes ``<file>``), sorted by (label,
            name): equal for equal images, whatever the layout.
        labels: int64, in the same order; zeros without labels.
        places: int64, a row for each; says where the sample is.
        load: Gives the sample, an image file's bytes, of a name and a place.
    """

    description: str
    class_names: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    places: np.ndarray
    load: Callable[..., Any]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> Any:
        """The sample as it is stored; ``UserError`` if the file has changed, ``UnreadableImage`` for damage inside."""
        return self.load(self.names[position], *self.places[position].tolist())


def arranged(layout: str, root: Path, images: Images, load: Callable[..., Any]) -> Source:
    """A source of the images in ``root`` in the order of every layout, by (label, name).

    The description travels, so it leaves out where on this machine it is. Names are refused as by ``check_names``.
    """
    names, labels, class_names, ignored = images.names, images.labels, images.class_names, str(images.ignored)
    check_names(root / images.prefix, names)
    order = sorted(range(len(names)), key=lambda position: (labels[position], names[position]))
    classes = f'{len(class_names):,} classes' if class_names else 'no classes (unconditional)'
    description = f'{layout} at {Path(root.name, images.prefix)}: {len(names):,} images, {classes}'
    return Source(
        f'{description}; {ignored}' if ignored else description,
        class_names,
        [names[position] for position in order],
        np.array(labels, dtype=np.int64)[order],
        np.array(images.places, np.int64)[order],
        load,
    )


def source_of_files(root: Path, images: Images, layout: str = '') -> Source:
    """Images that are files below ``root``."""
    layout = layout or ('class folders' if images.class_names else 'flat folder')
    return arranged(layout, root, images, functools.partial(_load_file, str(root / images.prefix), images.form))


def _load_file(folder: str, form: str, name: str) -> bytes:
    label, _, file = name.partition('/')
    path = Path(folder, form.format(name=name, label=label, file=file))
    with refusing(OSError, f'{path}: was there when the source was opened and cannot be read now'):
        return path.read_bytes()


class IndexedFiles:
    """Files by number, which must stay as they were when they were indexed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._paths = list(paths)
        self._stamps = [_stamp(os.stat(path)) for path in self._paths]

    def read(self, name: str, number: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file ``number`` from ``offset``; refused if it is not the one that was indexed."""
        path = self._paths[number]
        # Opened each time, as a file of a folder is: no process inherits the position of another.
        with refusing(OSError, f'{path}: cannot be read'), open(path, 'rb') as file:
            if _stamp(os.fstat(file.fileno())) != self._stamps[number]:
                raise UserError(f'{path}: has changed since it was indexed. Start again')
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise UserError(f'{path}: ends before {name}, which it should hold. Get it anew')
        return data


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def refusing(errors: type[Exception] | tuple[type[Exception], ...], words: str, remedy: str = '') -> Iterator[None]:
    """Faults of a file are for the user to put right: ``UserError`` of ``words``, the error and the remedy."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f'{words}: {str(error) or repr(error)}{remedy}') from error


def check_names(location: Path | str, names: Sequence[str]) -> None:
    """Refuse two samples of one name, and a name that is not UTF-8, which no shard can hold."""
    if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
        raise UserError(f'{location}: {len(repeated):,} names occur more than once: {few(repeated)}. Rename them')
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(f'{location}: the name {name!r} is not UTF-8. Rename the file') from error


def check_splits(location: Path, names: Collection[str]) -> None:
    """Refuse names out of ``SPLITS`` of which two mean one split, or all the test split."""
    splits = {SPLITS[name] for name in names}
    if len(splits) < len(names):
        raise UserError(f'{location}: {few(names)}: two folders for one split. Rename or move one of them')
    if splits == {'test'}:
        raise UserError(f'{location}: only a test split, which is no training data; train or val are missing')


def is_image(name: str) -> bool:
    """Whether a file with this name counts as an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def is_litter(parts: Sequence[str]) -> bool:
    """Whether a path is what systems leave behind: hidden files and folders, ``__MACOSX``, ``Thumbs.db``."""
    return parts[-1].lower() == 'thumbs.db' or any(part.startswith('.') or part == '__MACOSX' for part in parts)


def few(names: Collection[str]) -> str:
    """The first five names in order and how many more there are."""
    text = ', '.join(sorted(names)[:5])
    return text if len(names) <= 5 else f'{text} and {len(names) - 5} more'


def member_parts(archive: Path, name: str) -> tuple[str, ...]:
    """The parts of an archive member's name, which is never used to extract it; refused if it leads elsewhere."""
    path = PurePosixPath(name)
    if path.is_absolute() or '..' in path.parts or '\\' in name or '\0' in name:
        raise UserError(
            f'{archive}: member {name!r} is no plain relative path (absolute, with "..", a backslash or a zero byte). '
            f'Refused: get the archive anew, or pack it again'
        )
    return path.parts


def in_label_order(names: Iterable[str]) -> tuple[str, ...]:
    """Class names by label: 0 to n - 1 by their value, all other names as texts, which is torchvision's order."""
    classes = sorted(set(names))
    numbers = [str(number) for number in range(len(classes))]
    return tuple(numbers if sorted(numbers) == classes else classes)
