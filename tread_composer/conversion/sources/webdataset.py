"""webdataset tars: ``key.jpg`` beside ``key.cls`` (a number) or ``key.json`` with a ``label``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tread_composer.conversion.sources.base import Ignored, Source, arrange, is_image, is_litter
from tread_composer.conversion.sources.numbered import classes_of_numbers
from tread_composer.conversion.sources.ranges import OpenFiles, RangeSource
from tread_composer.conversion.sources.tars import Archive, Member
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_webdataset']

_LABELS = {'cls': 64, 'json': 2**20}
"""Extensions of files that say the label, and how large these may be."""


@dataclass
class _Images:
    """One split, in the order of its files."""

    files: list[str] = field(default_factory=list)
    labels: list[int | None] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ignored: Ignored = field(default_factory=Ignored)


def open_webdataset(
    root: Path,
    tars: dict[str, list[Path]],
    *,
    class_names: tuple[str, ...] = (),
    notes: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Source]:
    """The splits of a folder of webdataset tars; see ``open_sources``.

    Args:
        root: The folder, for messages.
        tars: Files of each split.
        class_names: In label order; empty: the numbers are the names.
        notes: What else was seen, for the description.
        progress: Whether a long scan is reported.
    """
    splits = {split: _scan(root, split, files, notes, progress) for split, files in tars.items()}
    unlabelled = [split for split, images in splits.items() if None in images.labels]
    if unlabelled and len(unlabelled) < len(splits):
        raise UserError(f'{root}: {unlabelled[0]} has no labels, the other split has. Give one split alone')
    labels = {split: [label or 0 for label in images.labels] for split, images in splits.items()}
    if unlabelled and class_names:
        raise UserError(f'{root}: class names are given, but the images have no labels (key.cls or key.json)')
    lacking = {}
    if not unlabelled:
        class_names, lacking = classes_of_numbers(root, labels, class_names)
    sources: dict[str, Source] = {}
    for split, images in splits.items():
        names = images.files
        if class_names:
            names = [f'{class_names[label]}/{file}' for label, file in zip(labels[split], names, strict=True)]
        images.ignored.notes += lacking.get(split, [])
        facts, order = arrange('webdataset tars', root, names, labels[split], class_names, images.ignored)
        sources[split] = RangeSource(
            **facts,
            files=OpenFiles(tars[split]),
            numbers=np.array(images.numbers, dtype=np.int32)[order],
            offsets=np.array(images.offsets, dtype=np.int64)[order],
            sizes=np.array(images.sizes, dtype=np.int64)[order],
        )
    return sources


def _scan(root: Path, split: str, tars: list[Path], notes: Sequence[str], progress: bool) -> _Images:
    images, counter = (
        _Images(ignored=Ignored(notes=list(notes))),
        Progress(f'scanning {split} of {root}', show=progress),
    )
    for number, path in enumerate(tars):
        with Archive(path) as archive:
            _scan_tar(archive, number, images, counter)
    if not images.files:
        raise UserError(f'{root}: the tars of {split} hold no image; {images.ignored}')
    without = images.labels.count(None)
    if 0 < without < len(images.labels):
        example = images.files[images.labels.index(None)]
        raise UserError(f'{root}: {without:,} of {len(images.labels):,} images have no label, such as {example!r}')
    return images


def _scan_tar(archive: Archive, number: int, images: _Images, counter: Progress) -> None:
    members: dict[str, Member] = {}
    labels: dict[str, dict[str, Member]] = {}
    for member in archive.members():
        counter.add()
        name = member.parts[-1]
        stem, _, extension = name.partition('.')  # webdataset: a key ends at the first dot
        key = '/'.join((*member.parts[:-1], stem))
        if is_litter(member.parts):
            images.ignored.add(member.parts)
        elif extension.lower() in _LABELS:
            if labels.setdefault(key, {}).setdefault(extension.lower(), member) is not member:
                raise UserError(f'{archive.path}: {name!r} occurs twice. Each sample needs its own key')
        elif is_image(f'.{extension}') and '.' not in extension:
            if members.setdefault(key, member) is not member:
                raise UserError(f'{archive.path}: two images of key {key!r}. Each sample needs its own key')
        else:
            images.ignored.others[f'.{extension}' if extension else 'no extension'] += 1
    alone = [key for key in labels if key not in members]
    if alone:
        raise UserError(f'{archive.path}: {len(alone):,} keys have a label and no image, such as {alone[0]!r}')
    for key, member in members.items():
        images.files.append(member.parts[-1])
        images.labels.append(_label(archive, key, labels.get(key, {})))
        images.numbers.append(number)
        images.offsets.append(member.offset)
        images.sizes.append(member.size)


def _label(archive: Archive, key: str, members: dict[str, Member]) -> int | None:
    for kind, limit in _LABELS.items():  # .cls first: it says nothing else
        if kind not in members:
            continue
        _, offset, size = members[kind]
        text = archive.read(offset, min(size, limit))
        try:
            if size > limit:
                raise ValueError('too long to be a label')
            label = int(text.decode('ascii')) if kind == 'cls' else json.loads(text).get('label')
        except (ValueError, AttributeError, RecursionError):
            label = text
        if label is None:
            continue  # json without a label: other facts about the image
        if type(label) is not int or abs(label) > 2**31:
            raise UserError(f'{archive.path}: the label of {key!r} in its .{kind} is {label!r:.60}, not a whole number')
        return label
    return None
