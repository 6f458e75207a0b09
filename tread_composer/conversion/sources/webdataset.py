"""webdataset tars: ``key.jpg`` beside ``key.cls`` (a number) or ``key.json`` with a ``label``."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tread_composer.conversion.sources.base import (
    Ignored,
    Images,
    IndexedFiles,
    RangeSource,
    Request,
    Source,
    is_image,
    is_litter,
)
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.tars import Archive, Member
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_webdataset', 'scan_tars']

_LABELS = {'cls': 64, 'json': 2**20}
"""Extensions of files that say the label, and how large these may be."""


def open_webdataset(request: Request, tars: dict[str, list[Path]], notes: Sequence[str]) -> dict[str, Source]:
    """The splits of webdataset tars; ``notes``: what else was seen, for the description."""
    root = request.root
    splits = {split: scan_tars(root, paths, _is_image, Ignored(notes=list(notes))) for split, paths in tars.items()}
    unlabelled = [split for split, images in splits.items() if None in images.labels]
    if unlabelled and (request.class_names or len(unlabelled) < len(splits)):
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
        name_by_number(root, splits, request.class_names)
    return {
        split: RangeSource.arranged('webdataset tars', root, images, files=IndexedFiles(tars[split]))
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
        with Archive(path) as archive:
            members: dict[tuple[str, str], Member] = {}
            for member in archive.members():
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
                    samples.labels.append(_label(archive, key, members))  # type: ignore[arg-type]
                    samples.places.append((number, member.offset, member.size))
    if not samples.names:
        raise UserError(f'{root}: {tars[0].name} and the like hold no sample; {samples.ignored}')
    missing = samples.labels.count(None)  # type: ignore[arg-type]
    if 0 < missing < len(samples.labels) or (missing and ignored is None):
        example = samples.names[samples.labels.index(None)]  # type: ignore[arg-type]
        raise UserError(f'{root}: {missing:,} of {len(samples.labels):,} samples have no label, such as {example!r}')
    return samples


def _label(archive: Archive, key: str, members: Mapping[tuple[str, str], Member]) -> int | None:
    for kind, limit in _LABELS.items():  # .cls first: it says nothing else
        member = members.get((key, kind))
        if member is None:
            continue
        text = archive.read(member.offset, min(member.size, limit))
        try:
            label = int(text) if kind == 'cls' else json.loads(text).get('label')
        except (ValueError, AttributeError, RecursionError):
            label = text
        if label is None:
            continue  # json without a label: other facts about the image
        if type(label) is not int or abs(label) > 2**31 or member.size > limit:
            raise UserError(f'{archive.path}: the label of {key!r} in its .{kind} is {label!r:.60}, not a whole number')
        return label
    return None
