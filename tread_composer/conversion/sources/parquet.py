"""Hugging Face's parquet files: a struct column of encoded images, and a column of labels.

Parquet cannot be read at random: one image costs the decoding of a row group of hundreds. So the image bytes are copied
once, in order, into a spool file for each parquet file.
"""

import hashlib
import itertools
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from tread_composer.conversion.output import refuse_if_too_large, size_in_words
from tread_composer.conversion.sources.base import Ignored, Images, OpenFiles, RangeSource, Request, Source
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.core.errors import UserError
from tread_composer.io.files import UNFINISHED, whole_file
from tread_composer.io.locks import locked
from tread_composer.io.progress import Progress

__all__ = ['open_parquet']

_BATCH = 64  # rows that are in memory at once
# What reading raises; ValueError: texts that are not UTF-8.
_DAMAGE = (OSError, ValueError, pyarrow.ArrowException)


@dataclass(frozen=True)
class _Columns:
    """Which columns hold what; must be the same in all files of a data set."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class _Spool:
    """The images of one parquet file, one after the other in ``path``; image ``i`` ends at ``starts[i + 1]``."""

    path: Path
    starts: np.ndarray
    labels: np.ndarray
    files: list[str]


def open_parquet(request: Request, files: dict[str, list[Path]], notes: Sequence[str]) -> dict[str, Source]:
    """The splits of parquet files; what an earlier, interrupted call left in the scratch folder is used again."""
    root = request.root
    columns = _agreed_columns([file for split in files.values() for file in split])
    if request.class_names and columns.label is None:
        raise UserError(f'{root}: class names are given, but the files have no column of labels')
    spools = _spool_all(files, columns, request.scratch / 'parquet')
    splits = {split: _images(root, split, spools[split], notes) for split in files}
    if columns.label is not None:
        name_by_number(root, splits, request.class_names or columns.class_names)
    return {
        split: RangeSource.arranged(
            'parquet files', root, images, files=OpenFiles([spool.path for spool in spools[split]])
        )
        for split, images in splits.items()
    }


def _images(root: Path, split: str, spools: list[_Spool], notes: Sequence[str]) -> Images:
    images = Images(ignored=Ignored(notes=list(notes)))
    for number, spool in enumerate(spools):
        images.names += spool.files
        images.labels += spool.labels.tolist()
        starts = spool.starts.tolist()
        images.places += [(number, start, end - start) for start, end in itertools.pairwise(starts)]
    if not images.names:
        raise UserError(f'{root}: the files of {split} hold no row')
    if '' in images.names or len(set(zip(images.labels, images.names, strict=True))) < len(images.names):
        images.ignored.notes.append('named by row, since the files do not name each image')
        images.names = [f'row-{row:08d}' for row in range(len(images.names))]
    return images


def _agreed_columns(files: list[Path]) -> _Columns:
    columns_of = {file: _columns_of(file) for file in files}
    reference = files[0]
    for file, columns in columns_of.items():
        if columns != columns_of[reference]:
            raise UserError(
                f'{file}: columns or class names differ from those of {reference}. Give one data set at a time'
            )
    return columns_of[reference]


def _columns_of(file: Path) -> _Columns:
    try:
        schema = pyarrow.parquet.read_schema(file)
        shown = ', '.join(f'{column.name}: {column.type}' for column in schema)
    except _DAMAGE as error:
        raise UserError(f'{file}: not a parquet file, or damaged: {error}. Get it anew') from error
    images = [column.name for column in schema if _is_image(column.type)]
    if len(images) != 1:
        raise UserError(
            f'{file}: {len(images)} columns hold images (a struct with "bytes" and "path", as Hugging Face writes '
            f'them), 1 is expected. Columns: {shown}'
        )
    named: dict[str, tuple[str, ...]] = {}
    if text := (schema.metadata or {}).get(b'huggingface'):
        try:
            features = json.loads(text)['info']['features']
            named = {name: tuple(kind['names']) for name, kind in features.items() if kind.get('_type') == 'ClassLabel'}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: the metadata 'huggingface' of its schema is damaged: {error!r}") from error
    candidates = list(named) or [column.name for column in schema if column.name in ('label', 'labels')]
    if len(candidates) > 1:
        raise UserError(f'{file}: {len(candidates)} columns of labels: {", ".join(candidates)}. Write files with one')
    label = candidates[0] if candidates else None
    if label is not None and (label not in schema.names or not pyarrow.types.is_integer(schema.field(label).type)):
        raise UserError(f'{file}: the column of labels, {label!r}, holds no whole numbers. Columns: {shown}')
    return _Columns(images[0], label, named.get(label, ()) if label else ())


def _is_image(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_struct(kind) and {'bytes', 'path'} <= {kind.field(i).name for i in range(kind.num_fields)}


def _spool_all(files: dict[str, list[Path]], columns: _Columns, folder: Path) -> dict[str, list[_Spool]]:
    """Copy what is not yet copied. Any number of processes may call this at once; one copies, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / '.lock'):
        for abandoned in folder.glob(f'{UNFINISHED}*'):  # by a copy that was killed: only one runs at a time
            abandoned.unlink()
        targets = {file: _target(file, columns, folder) for split in files.values() for file in split}
        spools = {file: spool for file, target in targets.items() if (spool := _finished(target)) is not None}
        todo = [file for file in targets if file not in spools]
        if todo:
            # What is not image in such a file is less than what compression leaves of JPEGs.
            size = sum(file.stat().st_size for file in todo)
            free = refuse_if_too_large(folder, size, f'the images of {len(todo)} parquet files')
            print(
                f'{folder}: {len(todo)} parquet files are copied here, about {size_in_words(size)} of images; '
                f'{size_in_words(free)} are free',
                file=sys.stderr,
                flush=True,
            )
            progress = Progress(f'copying to {folder}', len(todo), 'files')
            for file in todo:
                spools[file] = _copy(file, columns, targets[file])
                progress.add()
    return {split: [spools[file] for file in paths] for split, paths in files.items()}


def _target(file: Path, columns: _Columns, folder: Path) -> Path:
    """A changed parquet file, or another choice of columns, is another spool."""
    status = file.stat()
    facts = repr((str(file), status.st_size, status.st_mtime_ns, columns.image, columns.label))
    return folder / f'{file.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.images'


def _finished(target: Path) -> _Spool | None:
    index = target.with_suffix('.npz')  # written last: it is the mark that the copy is complete
    if not index.exists() or not target.exists():
        return None
    try:
        with np.load(index, allow_pickle=False) as arrays:
            spool = _Spool(target, arrays['starts'], arrays['labels'], arrays['files'].tolist())
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None  # damaged by whatever: copied again
    return spool if target.stat().st_size == spool.starts[-1] else None


def _copy(file: Path, columns: _Columns, target: Path) -> _Spool:
    try:
        with whole_file(target) as unfinished, unfinished.open('wb') as stream:
            arrays = _write_images(file, columns, stream)
        with whole_file(target.with_suffix('.npz')) as unfinished, unfinished.open('wb') as stream:
            np.savez(stream, **arrays)
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f'{file}: cannot be copied to {target}: {error}') from error
    return _Spool(target, arrays['starts'], arrays['labels'], arrays['files'].tolist())


def _write_images(file: Path, columns: _Columns, stream: IO[bytes]) -> dict[str, Any]:
    sizes, labels, files = [], [], []
    names = [columns.image] + ([columns.label] if columns.label else [])
    source = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
    for batch in source.iter_batches(_BATCH, columns=names, use_threads=False):
        labels += batch.column(columns.label).to_pylist() if columns.label else [0] * len(batch)
        for image in batch.column(columns.image):
            content, path = image['bytes'].as_buffer() if image.is_valid else None, image['path'].as_py()
            if content is None:
                raise UserError(
                    f'{file}: row {len(sizes)} holds no bytes (path {path!r}). Write files with embedded images'
                )
            stream.write(content)
            sizes.append(len(content))
            files.append((path or '').rpartition('/')[2])
    if None in labels:
        raise UserError(f'{file}: row {labels.index(None)} has no label')
    return {
        'starts': np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        'labels': np.array(labels, dtype=np.int64),
        'files': np.array(files, dtype=np.str_),
    }
