"""The official tars of ImageNet (ILSVRC 2012): the training tar of one tar a class, and the flat validation tar."""

import functools
from collections.abc import Mapping
from pathlib import Path

from tread_composer.conversion.sources.base import IndexedFiles, RangeSource, Request, Source, few, is_image, is_litter
from tread_composer.conversion.sources.ground_truth import missing_truth
from tread_composer.conversion.sources.tars import Archive, Member
from tread_composer.conversion.sources.tree import Listing
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_ilsvrc']


def open_ilsvrc(request: Request, split_of: Mapping[Path, str]) -> dict[str, Source]:
    """The splits of the official tars, of tars and flat: read as the folders that unpacking them would give."""
    tars = {split: tar for tar, split in split_of.items()}
    if len(tars) < len(split_of):
        names = few([tar.name for tar in split_of])
        raise UserError(f'{request.root}: {names}: one tar of each split is expected. Give the tar itself')
    listing = Listing(Progress(f'scanning {request.root}'))
    if test := tars.pop('test', None):
        listing.ignored.notes.append(f'{test.name} is not converted')
    if not tars:
        raise UserError(f'{request.root}: only a test set, which has no labels; the tar of train or val is missing')
    if 'val' in tars and not request.ground_truth:
        raise missing_truth(tars['val'])
    for split, path in tars.items():
        with Archive(path) as archive:
            if split == 'train':
                _list_train(archive, listing)
            else:
                _list(archive, (split,), listing)
    return {
        split: RangeSource.arranged('ILSVRC tars', tars[split], branch, files=IndexedFiles([tars[split]]))
        for split, branch in listing.branches(request).items()
    }


def _list_train(archive: Archive, listing: Listing) -> None:
    for outer in archive.members():
        name = outer.parts[-1]
        if is_litter(outer.parts) or not (name.endswith('.tar') or is_image(name)):
            listing.ignored.add(outer.parts)
            continue
        folder = ('train', name.removesuffix('.tar'))
        if is_image(name) or '/'.join(folder) in listing.folders:
            raise UserError(f'{archive.path}: holds {name}, where each member should be the one tar of a class')
        listing.folders.add('/'.join(folder))
        _list(archive, folder, listing, outer)


def _list(archive: Archive, folder: tuple[str, ...], listing: Listing, outer: Member | None = None) -> None:
    for member in archive.members(outer):
        read = functools.partial(archive.read, member.offset, member.size)
        listing.add((*folder, *member.parts), read, (0, member.offset, member.size))
