"""Uncompressed tars, read in place: ImageNet's official ones (ILSVRC 2012), of one tar a class, and webdataset's.

In webdataset's, ``key.jpg`` stands beside ``key.cls`` (a number) or ``key.json`` with a ``label``.
"""

import functools
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.folders import Listing
from tread_composer.conversion.sources.labels import missing_truth
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.source import (
    Ignored,
    Images,
    IndexedFiles,
    Source,
    arranged,
    few,
    is_image,
    is_litter,
    member_parts,
    refusing,
)  # fmt: skip
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['holds_tars', 'open_ilsvrc', 'open_webdataset', 'scan_tars']

_LABELS = {'cls': 64, 'json': 2**20}
"""Extensions of files that say the label, and how large these may be."""


class _Member(NamedTuple):
    """A regular file in a tar: parts of its name, and where its bytes are in the file on disk."""

    parts: tuple[str, ...]
    offset: int
    size: int


def _members(file: io.FileIO, path: Path, outer: _Member | None = None) -> Iterator[_Member]:
    """The regular files in a tar at ``path``, or in the tar that is its member ``outer``; folders are left out.

    Refused is what is no tar, compressed, cut off or followed by other data, and a link, a device, a sparse file or a
    name that leads out of it.
    """
    place, start, end = path, 0, os.fstat(file.fileno()).st_size
    if outer is not None:
        place, start, end = Path(f'{path}: {"/".join(outer.parts)}'), outer.offset, outer.offset + outer.size
    remedy = '. Get it anew, or unpack it to a tar (images in a compressed one cannot be read at random)'
    damage = (OSError, ValueError, tarfile.TarError)
    with refusing(damage, f'{place}: not a tar, cut off, or compressed', remedy):
        file.seek(start)  # tarfile reads from there, and says offsets in the whole file
        with tarfile.open(fileobj=file, mode='r:') as archive:
            while (info := archive.next()) is not None and info.offset < end:
                archive.members.clear()  # type: ignore[attr-defined]  # a million of them would fill gigabytes
                parts = member_parts(place, info.name)
                if info.issparse() or not (info.isreg() or info.isdir()):
                    raise UserError(
                        f'{place}: member {info.name!r} is a link, a device or a sparse file. Refused: pack again '
                        f'with tar --dereference'
                    )
                if info.offset_data + info.size > end:
                    raise UserError(f'{place}: ends within {info.name!r}: it is cut off. Get it anew')
                if info.isreg() and parts:
                    yield _Member(parts, info.offset_data, info.size)
            _check_end(file, place, end if info else archive.offset, end)


def _check_end(file: io.FileIO, place: Path, offset: int, end: int) -> None:
    # A tar ends with zeros, at least a block of them; tarfile itself takes a damaged header for the end.
    mark = os.pread(file.fileno(), min(end - offset, 2**20), offset)
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        raise UserError(
            f'{place}: no header and no end at byte {offset:,}: it is damaged or cut off, or several tars were '
            f'joined. Get it anew, or pack it again'
        )


def holds_tars(path: Path) -> bool:
    """Whether a tar holds others, as ImageNet's training set does."""
    with refusing(OSError, f'{path}: cannot be read'), open(path, 'rb', buffering=0) as file:
        return any(member.parts[-1].endswith('.tar') for member in itertools.islice(_members(file, path), 64))


def open_ilsvrc(root: Path, settings: ImageSettings, split_of: Mapping[Path, str]) -> dict[str, Source]:
    """The splits of the official tars, of tars and flat: read as the folders that unpacking them would give."""
    tars = {split: tar for tar, split in split_of.items()}
    if len(tars) < len(split_of):
        names = few([tar.name for tar in split_of])
        raise UserError(f'{root}: {names}: one tar of each split is expected. Give the tar itself')
    listing = Listing(Progress(f'scanning {root}'))
    if test := tars.pop('test', None):
        listing.ignored.notes.append(f'{test.name} is not converted')
    if not tars:
        raise UserError(f'{root}: only a test set, which has no labels; the tar of train or val is missing')
    if 'val' in tars and settings.ground_truth is None:
        raise missing_truth(tars['val'])
    for split, path in tars.items():
        with refusing(OSError, f'{path}: cannot be read'), open(path, 'rb', buffering=0) as file:
            if split == 'train':
                _list_train(file, path, listing)
            else:
                _list(file, path, (split,), listing)
    branches = {split: replace(images, prefix='') for split, images in listing.branches(root, settings).items()}
    return {
        split: arranged('ILSVRC tars', tars[split], images, IndexedFiles([tars[split]]).read)
        for split, images in branches.items()
    }


def _list_train(file: io.FileIO, path: Path, listing: Listing) -> None:
    for outer in _members(file, path):
        name = outer.parts[-1]
        if is_litter(outer.parts) or not (name.endswith('.tar') or is_image(name)):
            listing.ignored.add(outer.parts)
            continue
        folder = ('train', name.removesuffix('.tar'))
        if is_image(name) or '/'.join(folder) in listing.folders:
            raise UserError(f'{path}: holds {name}, where each member should be the one tar of a class')
        listing.folders.add('/'.join(folder))
        _list(file, path, folder, listing, outer)


def _list(file: io.FileIO, path: Path, folder: tuple[str, ...], listing: Listing, outer: _Member | None = None) -> None:
    for member in _members(file, path, outer):
        read = functools.partial(os.pread, file.fileno(), member.size, member.offset)
        listing.add((*folder, *member.parts), read, (0, member.offset, member.size))


def open_webdataset(
    root: Path, settings: ImageSettings, tars: dict[str, list[Path]], notes: Sequence[str]
) -> dict[str, Source]:
    """The splits of webdataset tars; ``notes``: what else was seen, for the description."""
    splits = {split: scan_tars(root, paths, _is_image, Ignored(notes=list(notes))) for split, paths in tars.items()}
    unlabelled = [split for split, images in splits.items() if None in images.labels]
    if unlabelled and (settings.given_names or len(unlabelled) < len(splits)):
        raise UserError(
            f'{root}: {unlabelled[0]} has no labels (key.cls or key.json), but the other split or --class-names says '
            f'that there are classes. Give one split alone, or leave the names'
        )
    for split in unlabelled:
        if all('/' in name for name in splits[split].names) or re.fullmatch(r'n\d{8}\.tar', tars[split][0].name):
            raise UserError(
                f'{root}: {tars[split][0].name} holds folders of images, or those of one class, whose labels would be '
                f'lost. Unpack each such tar into a folder of its name, or give the tar that they come from '
                f'(ILSVRC2012_img_train.tar)'
            )
    for images in splits.values():
        images.names = [name.rpartition('/')[2] for name in images.names]
        if unlabelled:
            images.labels = [0] * len(images.names)
    if not unlabelled:
        name_by_number(root, splits, settings.given_names)
    return {
        split: arranged('webdataset tars', root, images, IndexedFiles(tars[split]).read)
        for split, images in splits.items()
    }


def _is_image(extension: str) -> bool:
    return '.' not in extension and is_image(f'.{extension}')


def scan_tars(
    root: Path, tars: Sequence[Path], is_sample: Callable[[str], bool], ignored: Ignored | None = None
) -> Images:
    """The samples in tars, in their order, named by their path in a tar; all labels are numbers, or all are None.

    ``is_sample`` says whether a member with this extension (all behind the first dot of its name) is one; ``ignored``
    counts other members, which are refused without it, as are keys that occur twice and labels without samples.
    """
    samples, progress = Images(ignored=ignored or Ignored()), Progress(f'scanning {root}')
    for number, path in enumerate(tars):
        with refusing(OSError, f'{path}: cannot be read'), open(path, 'rb', buffering=0) as file:
            members: dict[tuple[str, str], _Member] = {}
            for member in _members(file, path):
                progress.add()
                stem, _, extension = member.parts[-1].partition('.')  # webdataset: a key ends at the first dot
                key = '/'.join((*member.parts[:-1], stem))
                kind = 'sample' if is_sample(extension) else extension.lower()
                if is_litter(member.parts) or kind not in ('sample', *_LABELS):
                    if ignored is None:
                        raise UserError(f'{path}: member {"/".join(member.parts)!r} does not belong to this layout')
                    ignored.add(member.parts)
                elif members.setdefault((key, kind), member) is not member:
                    raise UserError(f'{path}: two {kind} files of key {key!r}. Each sample needs its own key')
            for (key, kind), member in members.items():
                if (key, 'sample') not in members:
                    raise UserError(f'{path}: key {key!r} has a label and no sample. Get the tar anew')
                if kind == 'sample':
                    samples.names.append('/'.join(member.parts))
                    samples.labels.append(_label(file, path, key, members))  # type: ignore[arg-type]
                    samples.places.append((number, member.offset, member.size))
    if not samples.names:
        raise UserError(f'{root}: {tars[0].name} and the like hold no sample; {samples.ignored}')
    missing = samples.labels.count(None)  # type: ignore[arg-type]
    if 0 < missing < len(samples.labels) or (missing and ignored is None):
        example = samples.names[samples.labels.index(None)]  # type: ignore[arg-type]
        raise UserError(f'{root}: {missing:,} of {len(samples.labels):,} samples have no label, such as {example!r}')
    return samples


def _label(file: io.FileIO, path: Path, key: str, members: Mapping[tuple[str, str], _Member]) -> int | None:
    for kind, limit in _LABELS.items():  # .cls first: it says nothing else
        member = members.get((key, kind))
        if member is None:
            continue
        text = os.pread(file.fileno(), min(member.size, limit), member.offset)
        try:
            label = int(text) if kind == 'cls' else json.loads(text).get('label')
        except (ValueError, AttributeError, RecursionError):
            label = text
        if label is None:
            continue  # json without a label: other facts about the image
        if type(label) is not int or abs(label) > 2**31 or member.size > limit:
            raise UserError(f'{path}: the label of {key!r} in its .{kind} is {label!r:.60}, not a whole number')
        return label
    return None
