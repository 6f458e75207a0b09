"""The official tars of ImageNet (ILSVRC 2012): the training tar of one tar a class, and the flat validation tar."""

import functools
from collections.abc import Sequence
from pathlib import Path

from tread_composer.conversion.sources.base import OpenFiles, RangeSource, Request, Source, is_image, is_litter
from tread_composer.conversion.sources.ground_truth import missing_truth
from tread_composer.conversion.sources.tars import Archive, Member
from tread_composer.conversion.sources.tree import Listing
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_ilsvrc']


def open_ilsvrc(request: Request, train: Path | None, val: Path | None, notes: Sequence[str]) -> dict[str, Source]:
    """The splits of the official tars, of tars and flat: read as the folders that unpacking them would give."""
    if val and not request.ground_truth:
        raise missing_truth(val)
    listing = Listing()
    listing.ignored.notes += notes
    if train:
        _list_train(train, listing)
    if val:
        with Archive(val) as archive:
            _list(archive, ('val',), listing, Progress(f'scanning {val}'))
    tars = {split: path for split, path in (('train', train), ('val', val)) if path}
    return {
        split: RangeSource.arranged('ILSVRC tars', tars[split], branch, files=OpenFiles([tars[split]]))
        for split, branch in listing.branches(request).items()
    }


def _list_train(path: Path, listing: Listing) -> None:
    progress = Progress(f'scanning {path}')
    with Archive(path) as archive:
        for outer in archive.members():
            name = outer.parts[-1]
            if is_litter(outer.parts) or not (name.endswith('.tar') or is_image(name)):
                listing.ignored.add(outer.parts)
                continue
            folder = ('train', name.removesuffix('.tar'))
            if is_image(name) or '/'.join(folder) in listing.folders:
                raise UserError(f'{path}: holds {name}, where each member should be the one tar of a class')
            listing.folders.add('/'.join(folder))
            _list(archive, folder, listing, progress, outer)


def _list(
    archive: Archive, folder: tuple[str, ...], listing: Listing, progress: Progress, outer: Member | None = None
) -> None:
    for member in archive.members(outer):
        progress.add()
        *folders, name = member.parts
        if outer and folders and folders != [folder[-1]] and is_image(name):
            raise UserError(
                f'{archive.path}: {"/".join(outer.parts)}: {"/".join(member.parts)!r} lies in a folder, where a class '
                f'has none'
            )
        read = functools.partial(archive.read, member.offset, member.size)
        listing.add((*folder, name), read, (0, member.offset, member.size))
