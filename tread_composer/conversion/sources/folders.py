"""Images in folders: one folder for each class, with or without train/ and val/ above; or images alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tread_composer.conversion.sources.base import Request, Source, is_image, is_litter, refuse_giant
from tread_composer.conversion.sources.tree import Listing
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['FolderSource', 'holds_images', 'open_folders']


@dataclass(eq=False)
class FolderSource(Source):
    """Image ``i`` is a file below ``folder``; ``bare``: the class in its name is no folder."""

    folder: str
    bare: bool

    def read(self, position: int) -> bytes:
        """The image file at that position; see ``Source.read``."""
        name = self.names[position]
        path = f'{self.folder}/{name.partition("/")[2] if self.bare else name}'
        try:
            with open(path, 'rb', buffering=0) as file:
                refuse_giant(os.fstat(file.fileno()).st_size)
                return file.readall()
        except OSError as error:
            raise UserError(f'{path}: was there when the source was opened and cannot be read now: {error}') from error


def open_folders(request: Request) -> dict[str, Source]:
    """The splits of a folder."""
    root, listing = request.root, Listing()
    progress = Progress(f'scanning {root}')
    for parts, is_folder in _walk(root):
        progress.add()
        if is_folder:
            listing.folders.add('/'.join(parts))
        else:
            listing.add(parts, root.joinpath(*parts).read_bytes)
    sources: dict[str, Source] = {}
    for split, branch in listing.branches(request).items():
        layout, folder = 'class folders' if branch.class_names else 'flat folder', root / branch.prefix
        sources[split] = FolderSource.arranged(layout, folder, branch, folder=str(folder), bare=branch.bare)
    return sources


def holds_images(root: Path) -> bool:
    """Whether there is an image anywhere below."""
    files = (parts for parts, is_folder in _walk(root) if not is_folder)
    return any(is_image(parts[-1]) and not is_litter(parts) for parts in files)


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
