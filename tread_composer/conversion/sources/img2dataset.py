"""What img2dataset writes: numbered folders of images, which are no classes, or numbered tars; a table beside each.

The table, ``00000.parquet``, has a row for each address that was tried, also of those that failed; with images inside
(its ``--output_format parquet``) it is read as any parquet file.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from tread_composer.conversion.sources.base import Images, Request, Source, few, is_image, refusing
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.tree import source_of_files
from tread_composer.core.errors import UserError

__all__ = ['is_table', 'numbered_folders', 'open_img2dataset']


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


def open_img2dataset(request: Request) -> dict[str, Source]:
    """The images of all folders, with their labels where the tables have a column ``label``."""
    root, images, labels = request.root, Images(), {}
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
        name_by_number(root, {'train': images}, request.names)
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
