"""Data sets in many files of one kind, with numbers as labels: which files are which split, which classes there are."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tread_composer.conversion.sources.base import SPLITS, Images, few, is_litter
from tread_composer.core.errors import UserError

__all__ = ['PLACES', 'name_by_number', 'split_files']

PLACES = ('', 'data', *SPLITS)
"""Folders below the given one in which such files are looked for."""

_OF = re.compile(r'(\d+)-of-(\d+)')
_LAST_NUMBER = re.compile(r'(.*?)(\d+)$')


def split_files(root: Path, suffix: str) -> tuple[dict[str, list[Path]], list[str]]:
    """Files by split, sorted by name, and what to report about those left out.

    They lie in ``root``, in ``root/data`` or in folders named after splits. In one folder the split is a word of the
    name: ``train-00000-of-00294.parquet``, ``imagenet1k-validation-0003.tar``; without any such word all are ``train``.

    Raises:
        UserError: Files in several of these places, names that do not say their split, or a number missing.
    """
    filled = {'': [root]} if root.is_file() else {}
    for place in PLACES if root.is_dir() else ():
        names = sorted((root / place).glob('*')) if (root / place).is_dir() else []
        files = [file for file in names if file.name.lower().endswith(suffix) and not is_litter([file.name])]
        if files:
            filled[place] = files
    if len(filled) > 1 and not filled.keys() <= SPLITS.keys():
        raise UserError(
            f'{root}: *{suffix} in several places: {few([f"{root / place}" for place in filled])}. Give one'
        )
    by_split: dict[str, list[Path]] = {}
    for place, files in filled.items():
        unnamed = [file.name for file in files if _split_of(file) is None]
        if place not in SPLITS and 0 < len(unnamed) < len(files):
            raise UserError(f'{root / place}: some names say train or val, others do not: {few(unnamed)}. Rename them')
        for file in files:
            by_split.setdefault(SPLITS.get(place) or _split_of(file) or 'train', []).append(file)
    if sum(SPLITS.get(place) == 'val' for place in filled) > 1:
        raise UserError(f'{root}: {few(list(filled))}: two folders for one split. Rename or move one of them')
    test = by_split.pop('test', [])
    if not by_split:
        raise UserError(f'{root}: only files of a test split, which is never converted; train or val are missing')
    for files in by_split.values() if root.is_dir() else ():
        _check_numbers(root, files)
    return by_split, [f'{len(test)} files of the test split are not converted'] if test else []


def name_by_number(location: Path | str, splits: Mapping[str, Images], names: tuple[str, ...]) -> None:
    """Give images whose labels are numbers their class names, and note in which splits a class has no image.

    Args:
        location: The data set, for messages.
        splits: Images of each split, named by their files.
        names: Class names in label order; empty: the numbers are the names.

    Raises:
        UserError: A negative number or one without a name, or a class without a training image.
    """
    present = {split: np.unique(np.array(images.labels, np.int64)) for split, images in splits.items()}
    reference = present.get('train', next(iter(present.values())))
    lowest, highest = (pick([pick(numbers) for numbers in present.values()]) for pick in (min, max))
    total = len(names) or int(reference.max()) + 1
    if lowest < 0 or highest >= total:
        origin = 'there are names for' if names else 'train has'
        raise UserError(
            f'{location}: labels from {lowest} to {highest}, but {origin} {total} classes (0 to {total - 1})'
        )
    if len(reference) < total:
        # a wrong label can be any number: no table of that length
        used = set(reference.tolist())
        missing = itertools.islice((number for number in range(total) if number not in used), 5)
        listed = ', '.join(f'{number} ({names[number]})' if names else str(number) for number in missing)
        raise UserError(
            f'{location}: {total - len(reference):,} of {total:,} classes have no training image, such as {listed}. '
            f'Complete the data'
        )
    for split, images in splits.items():
        images.in_classes(names or tuple(str(number) for number in range(total)))
        if len(present[split]) < total:
            images.ignored.notes.append(f'{total - len(present[split]):,} classes have no image')


def _split_of(file: Path) -> str | None:
    words = {SPLITS[word] for word in re.split(r'[^a-z]+', file.stem.lower()) if word in SPLITS}
    if len(words) > 1:
        raise UserError(f'{file}: the name says {few(words)}. Rename it')
    return words.pop() if words else None


def _check_numbers(root: Path, files: list[Path]) -> None:
    """A gap in the numbers of the files is a file that was not copied."""
    series: dict[tuple[str, int | None], list[int]] = {}
    for file in files:
        if of := _OF.search(file.stem):
            series.setdefault(('', int(of[2])), []).append(int(of[1]))
        elif match := _LAST_NUMBER.match(file.stem):
            series.setdefault((match[1], None), []).append(int(match[2]))
    totals = {total for _, total in series if total is not None}
    if len(totals) > 1:
        raise UserError(f'{root}: files of two copies, <number>-of-{" and -of-".join(map(str, totals))}. Keep one')
    for (prefix, total), numbers in series.items():
        expected = range(total) if total is not None else range(min(numbers), max(numbers) + 1)
        if len(expected) > 100 * len(numbers):
            continue  # dates or the like, not a count
        missing = sorted(set(expected) - set(numbers))
        if missing or len(set(numbers)) < len(numbers) or not set(numbers) <= set(expected):
            pattern = f'{prefix}<number>' if total is None else f'<number>-of-{total:05d}'
            fault = f'{len(missing)} are missing, such as {missing[0]}' if missing else 'a number occurs twice'
            raise UserError(f'{root}: files {pattern}{files[0].suffix}: {fault}. Fetch the data completely')
