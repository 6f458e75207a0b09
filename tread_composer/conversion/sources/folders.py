"""Images in folders: one folder for each class, with or without train/ and val/ above; or images alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tread_composer.conversion.sources.base import Listed, Source, arrange, is_image, is_litter
from tread_composer.conversion.sources.ranges import refuse_giant
from tread_composer.conversion.sources.tree import Branch, Listing, holds_labels, lay_out
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['FolderSource', 'holds_images', 'open_folders']


@dataclass(eq=False)
class FolderSource(Listed):
    """Image ``i`` is the file ``root / branch.path(names[i])``."""

    root: str
    branch: Branch

    def read(self, position: int) -> bytes:
        """The image file at that position; see ``Source.read``."""
        path = f'{self.root}/{self.branch.path(self.names[position])}'
        try:
            with open(path, 'rb', buffering=0) as file:
                refuse_giant(os.fstat(file.fileno()).st_size)
                return file.readall()
        except OSError as error:
            raise UserError(f'{path}: was there when the source was opened and cannot be read now: {error}') from error


def open_folders(root: Path, *, ground_truth: Path | None = None, progress: bool = True) -> dict[str, Source]:
    """The splits of a folder; see ``open_sources``."""
    listing, counter = Listing(), Progress(f'scanning {root}', show=progress)
    for parts, is_folder in _walk(root):
        counter.add()
        if not is_folder and holds_labels(parts):
            listing.label_files['/'.join(parts)] = _content(root.joinpath(*parts))
        else:
            listing.add(parts, is_folder)
    sources: dict[str, Source] = {}
    for split, branch in lay_out(root, listing, ground_truth).items():
        layout = 'class folders' if branch.class_names else 'flat folder'
        folder = root / branch.prefix
        facts, _ = arrange(layout, folder, branch.names, branch.labels, branch.class_names, listing.ignored)
        branch.names, branch.labels = [], []  # the facts hold them; workers get a copy of all that is here
        sources[split] = FolderSource(**facts, root=str(root), branch=branch)
    return sources


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f'{path}: cannot be read: {error}') from error


def holds_images(root: Path) -> bool:
    """Whether there is an image anywhere below."""
    return any(
        is_image(parts[-1]) and not is_litter(parts) for parts, is_folder in _walk(root) if not is_folder
    )  # fmt: skip


def _walk(root: Path) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Parts of the path of everything below, and whether it is a folder. Links are followed: people link data sets."""
    stack: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
    while stack:
        parts, ancestors = stack.pop()
        folder = root.joinpath(*parts)
        try:
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if identity in ancestors:
                raise UserError(f'{folder}: a link to a folder that it is in. Remove it')
            with os.scandir(folder) as entries:
                for entry in entries:
                    inner = (*parts, entry.name)
                    is_folder = entry.is_dir()
                    if not is_folder and not entry.is_file() and is_image(entry.name) and not is_litter(inner):
                        raise UserError(f'{entry.path}: a link to nothing, or no file at all. Repair or remove it')
                    hidden = is_folder and is_litter(inner)
                    yield inner, is_folder and not hidden  # a hidden folder is not entered and counts as one file
                    if is_folder and not hidden:
                        stack.append((inner, ancestors | {identity}))
        except OSError as error:
            raise UserError(f'{folder}: cannot be read: {error}') from error
