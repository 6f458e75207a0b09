"""What every source of samples promises, and the rules that all layouts share: names, litter, order, labels.

A layout is one file with a function ``open_<layout>(request, ...)``, which ``detect`` calls: it finds out what the
samples are called, how they are labelled and where their bytes are, and hands that to ``Source.arranged``.
"""

import collections
import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tread_composer.core.errors import UserError

__all__ = [
    'IMAGE_SUFFIXES', 'SPLITS', 'Ignored', 'Images', 'IndexedFiles', 'RangeSource', 'Request', 'Source', 'check_names',
    'check_splits', 'few', 'in_label_order', 'is_image', 'is_litter', 'member_parts',
]  # fmt: skip

IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.gif', '.tif', '.tiff', '.ppm', '.avif')
"""What makes a file an image, in small or capital letters. What is inside is found out by decoding it."""

SPLITS = {'train': 'train', 'val': 'val', 'valid': 'val', 'validation': 'val', 'test': 'test'}
"""Folder and file names that mean a split, and which."""


@dataclass(frozen=True)
class Request:
    """What a layout is opened with; ``root`` is the folder or file, absolute."""

    root: Path
    scratch: Path  # for a copy of images that cannot be read at random
    ground_truth: Path | None = None  # labels of validation images that lie in no class folders
    class_names: tuple[str, ...] = ()  # of labels that are numbers, in their order; empty: the numbers are the names
    image_column: str | None = None  # of a table with several
    label_column: str | None = None
    use_test: bool = True  # as the evaluation split, where there is no other


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

    def in_classes(self, class_names: tuple[str, ...]) -> None:
        """Put the class before the name of each file."""
        self.class_names = class_names
        self.names = [f'{class_names[label]}/{file}' for label, file in zip(self.labels, self.names, strict=True)]


@dataclass(eq=False)
class Source(ABC):
    """The samples of one split, read at random, with their labels. Can be pickled; read in any process.

    Attributes:
        description: One line for the log: layout, location, how many images and classes, what was ignored.
        class_names: In label order; empty without labels.
        names: No two alike. Images: ``<class>/<file>`` (without classes ``<file>``), sorted by (label,
            name): equal for equal images, whatever the layout.
        labels: int64, in the same order; zeros without labels.
        places: int64, a row for each; says where the sample is, as the class reads it.
    """

    description: str
    class_names: tuple[str, ...]
    names: Sequence[str]
    labels: np.ndarray
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, position: int) -> Any:
        """The sample at ``names[position]`` as it is stored: an image file's bytes.

        Raises:
            UserError: The file is gone, or has changed since the source was opened.
            UnreadableImage: This one is damaged within its archive.
        """

    @classmethod
    def arranged(cls, layout: str, root: Path, images: Images, *, inside: Path | str = '', **facts: Any) -> 'Source':
        """The images in the order of every layout, by (label, name).

        They lie in ``root``, or ``inside`` of it. The description travels, so it leaves out where on this machine that
        is. ``facts`` are further attributes. Names are refused as by ``check_names``.
        """
        names, labels, class_names, ignored = images.names, images.labels, images.class_names, str(images.ignored)
        check_names(root / inside, names)
        order = sorted(range(len(names)), key=lambda position: (labels[position], names[position]))
        classes = f'{len(class_names):,} classes' if class_names else 'no classes (unconditional)'
        description = f'{layout} at {Path(root.name, inside)}: {len(names):,} images, {classes}'
        return cls(
            description=f'{description}; {ignored}' if ignored else description,
            class_names=class_names,
            names=[names[position] for position in order],
            labels=np.array(labels, dtype=np.int64)[order],
            places=np.array(images.places, np.int64)[order],
            **facts,
        )


class IndexedFiles:
    """Files by number, which must stay as they were when they were indexed."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = list(paths)
        self._stamps = [_stamp(os.stat(path)) for path in self.paths]

    def read(self, number: int, offset: int, size: int) -> bytes:
        """``size`` bytes of file ``number`` from ``offset``; refused if it is not the one that was indexed."""
        path = self.paths[number]
        try:
            # Opened each time, as a file of a folder is: no process inherits the position of another.
            with open(path, 'rb') as file:
                if _stamp(os.fstat(file.fileno())) != self._stamps[number]:
                    raise UserError(f'{path}: has changed since it was indexed. Start again')
                file.seek(offset)
                data = file.read(size)
        except OSError as error:
            raise UserError(f'{path}: cannot be read: {error}') from error
        if len(data) < size:
            raise UserError(f'{path}: ends before an image that it should hold. Get it anew')
        return data


def _stamp(status: os.stat_result) -> tuple[int, int]:
    return status.st_size, status.st_mtime_ns


@dataclass(eq=False)
class RangeSource(Source):
    """A place is the number of a file, an offset and a size."""

    files: IndexedFiles

    def read(self, position: int) -> bytes:
        """The bytes at that position; see ``Source.read``."""
        return self.files.read(*self.places[position].tolist())


def check_names(location: Path | str, names: Sequence[str]) -> None:
    """Refuse two samples of one name, and a name that is not UTF-8, which no shard can hold."""
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise UserError(
            f'{location}: {len(repeated):,} names occur more than once: {few(repeated)}. Each sample needs its own'
        )
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


def few(names: Collection[str], shown: int = 5) -> str:
    """The first few names in order and how many more there are."""
    text = ', '.join(sorted(names)[:shown])
    return text if len(names) <= shown else f'{text} and {len(names) - shown} more'


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
