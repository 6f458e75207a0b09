"""The official tars of ImageNet (ILSVRC 2012): the training tar of one tar a class, and the flat validation tar."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tread_composer.conversion.sources.base import (
    Ignored,
    Source,
    arrange,
    check_same_classes,
    few,
    in_label_order,
    is_image,
    is_litter,
)
from tread_composer.conversion.sources.ground_truth import assign_classes
from tread_composer.conversion.sources.ranges import OpenFiles, RangeSource
from tread_composer.conversion.sources.tars import Archive, Member
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['open_ilsvrc']

_LAYOUT = 'ILSVRC tars'


def open_ilsvrc(
    train: Path | None,
    val: Path | None,
    *,
    ground_truth: Path | None = None,
    notes: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Source]:
    """The splits of the official tars; see ``open_sources``.

    Args:
        train: The tar of tars.
        val: The flat tar.
        ground_truth: Classes of the validation images.
        notes: What else was seen, for the description.
        progress: Whether a long scan is reported.
    """
    sources: dict[str, Source] = {}
    if train:
        sources['train'] = _open_train(train, notes, progress)
    if val:
        classes = sources['train'].class_names if train else None
        sources['val'] = _open_val(val, ground_truth, classes, notes, progress)
    elif ground_truth:
        raise UserError(f'ground_truth={ground_truth}: labels validation images, and {train} has none. Leave it out')
    check_same_classes(train or val or '', {split: source.class_names for split, source in sources.items()})
    return sources


def _open_train(path: Path, notes: Sequence[str], progress: bool) -> RangeSource:
    ignored, counter = Ignored(notes=list(notes)), Progress(f'scanning {path}', show=progress)
    by_class: dict[str, list[Member]] = {}
    with Archive(path) as archive:
        for outer in archive.members():
            name = outer.parts[-1]
            if is_litter(outer.parts) or not (name.endswith('.tar') or is_image(name)):
                ignored.add(outer.parts)
            elif not name.endswith('.tar') or name.removesuffix('.tar') in by_class:
                raise UserError(f'{path}: holds {name}, where each member should be the one tar of a class')
            else:
                by_class[name.removesuffix('.tar')] = _of_class(path, archive, outer, ignored, counter)
    empty = [name for name, members in by_class.items() if not members]
    if empty:
        raise UserError(f'{path}: {len(empty):,} classes hold no image: {few(empty)}. Get it anew')
    class_names = in_label_order(by_class)
    rows = [(label, member) for label, name in enumerate(class_names) for member in by_class[name]]
    names = [f'{class_names[label]}/{member.parts[-1]}' for label, member in rows]
    facts, order = arrange(_LAYOUT, path, names, [label for label, _ in rows], class_names, ignored)
    return _source(path, facts, [member for _, member in rows], order)


def _of_class(path: Path, archive: Archive, outer: Member, ignored: Ignored, counter: Progress) -> list[Member]:
    images = []
    for member in archive.members(outer):
        counter.add()
        if is_litter(member.parts) or not is_image(member.parts[-1]):
            ignored.add(member.parts)
        elif len(member.parts) > 2 or (len(member.parts) == 2 and f'{member.parts[0]}.tar' != outer.parts[-1]):
            raise UserError(
                f'{path}: {"/".join(outer.parts)}: {"/".join(member.parts)!r} lies in a folder, where a class has none'
            )
        else:
            images.append(member)
    return images


def _open_val(
    path: Path, ground_truth: Path | None, known: tuple[str, ...] | None, notes: Sequence[str], progress: bool
) -> RangeSource:
    ignored, counter = Ignored(notes=list(notes)), Progress(f'scanning {path}', show=progress)
    members = []
    with Archive(path) as archive:
        for member in archive.members():
            counter.add()
            if is_litter(member.parts) or not is_image(member.parts[-1]):
                ignored.add(member.parts)
            else:
                members.append(member)
    files = [member.parts[-1] for member in members]
    class_names, labels = assign_classes(ground_truth, files, known, path)
    names = [f'{class_names[label]}/{file}' for label, file in zip(labels, files, strict=True)]
    facts, order = arrange(_LAYOUT, path, names, labels, class_names, ignored)
    return _source(path, facts, members, order)


def _source(path: Path, facts: dict, members: list[Member], order: np.ndarray) -> RangeSource:
    return RangeSource(
        **facts,
        files=OpenFiles([path]),
        numbers=np.zeros(len(order), dtype=np.uint8),
        offsets=np.array([member.offset for member in members], dtype=np.int64)[order],
        sizes=np.array([member.size for member in members], dtype=np.int64)[order],
    )
