"""Data sets in many files of one kind, with numbers as labels: which files are which split, which classes there are.

What img2dataset writes: numbered folders of images, which are no classes, or numbered tars; a table beside each. The
table, ``00000.parquet``, has a row for each address that was tried, also of those that failed; with images inside (its
``--output_format parquet``) it is read as any parquet file.
"""

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.source import (
    SPLITS,
    Images,
    Source,
    check_splits,
    few,
    is_image,
    refusing,
    source_of_files,
)
from tread_composer.core.errors import UserError

__all__ = [
    'PLACES', 'check_numbers', 'is_table', 'name_by_number', 'numbered_folders', 'open_img2dataset', 'split_files',
]  # fmt: skip

PLACES = ('', 'data', *SPLITS)
"""Folders below the given one in which such files are looked for."""


def split_files(root: Path, files: Sequence[Path], use_test: bool) -> tuple[dict[str, list[Path]], list[str]]:
    """Files by split, and what to report about those left out.

    They lie in one of ``PLACES`` or in folders named after splits. In one folder the split is a word of the
    name: ``train-00000-of-00294.parquet``, ``imagenet1k-validation-0003.tar``; without any such word all are ``train``.
    Where there is no val, test is it, if ``use_test``.
    Refused are files in several of these places, names that do not say their split, and missing numbers.
    """
    by_place: dict[str, list[Path]] = defaultdict(list)
    for file in files:
        by_place['' if root in (file, file.parent) else file.parent.name].append(file)
    if len(by_place) > 1 and not by_place.keys() <= SPLITS.keys():
        places = few([f'{root / place}' for place in by_place])
        raise UserError(f'{root}: {files[0].suffix} files in several places: {places}. Give one')
    check_splits(root, [place for place in by_place if place in SPLITS])
    by_split: dict[str, list[Path]] = defaultdict(list)
    for place, members in by_place.items():
        splits = {file: SPLITS.get(place) or _split_of(file) for file in members}
        unnamed = [file.name for file, split in splits.items() if split is None]
        if 0 < len(unnamed) < len(members):
            raise UserError(f'{root / place}: some names say train or val, others do not: {few(unnamed)}. Rename them')
        for file, split in splits.items():
            by_split[split or 'train'].append(file)
    check_splits(root, by_split)
    test = by_split.pop('test', [])
    for members in by_split.values() if root.is_dir() else ():
        check_numbers(root, members)
    if test and use_test and 'val' not in by_split:
        by_split['val'] = test
        return by_split, ['the test split is the evaluation split, for lack of another']
    return by_split, [f'{len(test)} files of the test split are not converted'] if test else []


def name_by_number(location: Path | str, splits: Mapping[str, Images], names: tuple[str, ...]) -> None:
    """Give images whose labels are numbers their class names, and note in which splits a class has no image.

    ``names`` are in label order; if empty, the numbers are the names. Refused are a negative number, one without a
    name, and a class without a training image.
    """
    present = {split: set(images.labels) for split, images in splits.items()}
    reference = present.get('train', next(iter(present.values())))
    labels = set().union(*present.values())
    total = len(names) or max(reference) + 1
    if min(labels) < 0 or max(labels) >= total:
        origin = 'there are names for' if names else 'train has'
        raise UserError(
            f'{location}: labels from {min(labels)} to {max(labels)}, but {origin} {total} classes (0 to {total - 1}). '
            f'If these are of a test split without labels, --splits train leaves it out'
        )
    if len(reference) < total:
        # A wrong label can be any number: no table of that length.
        missing = next(number for number in range(total) if number not in reference)
        name = f' ({names[missing]})' if names else ''
        raise UserError(
            f'{location}: {total - len(reference):,} of {total:,} classes have no training image, such as '
            f'{missing}{name}. Complete the data'
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


def check_numbers(root: Path, files: Sequence[Path]) -> None:
    """Refuse a gap in the numbers of the files: one was not copied."""
    series: dict[tuple[str, int], list[int]] = defaultdict(list)
    for file in files:
        if of := re.search(r'(\d+)-of-(\d+)', file.stem):
            series['', int(of[2])].append(int(of[1]))
        elif match := re.match(r'(.*?)(\d+)$', file.stem):
            series[match[1], 0].append(int(match[2]))
    totals = {total for _, total in series if total}
    if len(totals) > 1:
        raise UserError(f'{root}: files of two copies, <number>-of-{" and -of-".join(map(str, totals))}. Keep one')
    for (prefix, total), numbers in series.items():
        expected = range(total) if total else range(min(numbers), max(numbers) + 1)
        if not total and len(expected) > 100 * len(numbers):
            continue  # dates or the like, not a count
        present = set(numbers).intersection(expected)
        missing = len(expected) - len(present)
        if missing or len(present) < len(numbers):
            pattern = f'<number>-of-{total:05d}' if total else f'{prefix}<number>'
            fault = 'a number occurs twice, or is beyond their count'
            if missing:
                fault = f'{missing} are missing, such as {next(n for n in expected if n not in present)}'
            raise UserError(f'{root}: files {pattern}{files[0].suffix}: {fault}. Fetch the data completely')


def _shards(root: Path) -> Iterator[Path]:
    """``root/00000`` and so on, whether they are folders or names of tars: those with ``00000_stats.json``."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    return (root / match[1] for name in names if (match := re.fullmatch(r'(\d+)_stats\.json', name)))


def is_table(file: Path) -> bool:
    """Whether a parquet file only describes the images in the folder or the tar of its name."""
    shard = file.with_suffix('')
    is_described = Path(f'{shard}_stats.json').is_file()
    return file.suffix == '.parquet' and is_described and (shard.is_dir() or Path(f'{shard}.tar').is_file())


def numbered_folders(root: Path) -> list[Path]:
    """The folders with its images; empty where something else wrote ``root``."""
    return [shard for shard in _shards(root) if shard.is_dir()]


def open_img2dataset(root: Path, settings: ImageSettings) -> dict[str, Source]:
    """The images of all folders, with their labels where the tables have a column ``label``."""
    images, labels = Images(), {}
    _check_complete(root)
    for folder in numbered_folders(root):
        labels |= _labels(folder.with_suffix('.parquet'))
        for file in sorted(os.listdir(folder)):
            if is_image(file):
                images.names.append(f'{folder.name}/{file}')
            else:
                images.ignored.add((folder.name, file))
    if not images.names:
        raise UserError(f'{root}: no image is in its folders; img2dataset has loaded none')
    keys = [name.rpartition('/')[2].partition('.')[0] for name in images.names]
    if missing := sum(key not in labels for key in keys) if labels else 0:
        raise UserError(f'{root}: {missing:,} images have no label in the tables (NNNNN.parquet). Complete the data')
    images.labels, images.places = [labels.get(key, 0) for key in keys], [()] * len(keys)
    if labels:
        name_by_number(root, {'train': images}, settings.given_names)
        images.form = '{file}'
    return {'train': source_of_files(root, images, 'img2dataset folders')}


def _check_complete(root: Path) -> None:
    """Refuse a folder without its ``NNNNN_stats.json``, which comes last, and the reverse: half of a copy."""
    shards = set(_shards(root))
    folders = {path for path in root.iterdir() if path.is_dir() and re.fullmatch(r'\d+', path.name)}
    if incomplete := sorted(path.name for path in shards ^ folders):
        raise UserError(
            f'{root}: {few(incomplete)} without its folder, or without the NNNNN_stats.json that img2dataset writes '
            f'when it is done. Complete the data'
        )


def _labels(table: Path) -> dict[str, int]:
    import pyarrow  # here: slow to import
    import pyarrow.parquet

    damage = (OSError, ValueError, pyarrow.ArrowException)
    with refusing(damage, f'{table}: not a table of img2dataset with whole numbers as labels'):
        if 'label' not in pyarrow.parquet.read_schema(table).names:
            return {}
        rows = pyarrow.parquet.read_table(table, columns=['key', 'label'])
        keys, labels = rows.column('key').to_pylist(), rows.column('label').cast(pyarrow.int64()).to_pylist()
    return {key: label for key, label in zip(keys, labels, strict=True) if label is not None}
