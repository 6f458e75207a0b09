"""Hugging Face's parquet files: a struct column of encoded images, and a column of labels.

Parquet cannot be read at random: one image costs the decoding of a row group of hundreds. So the image bytes are copied
once, in order, into a spool file for each parquet file.
"""

import hashlib
import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from tread_composer.conversion.sources.base import Ignored, Source, arrange
from tread_composer.conversion.sources.numbered import classes_of_numbers
from tread_composer.conversion.sources.ranges import OpenFiles, RangeSource
from tread_composer.core.errors import UserError
from tread_composer.io.files import whole_file
from tread_composer.io.locks import locked
from tread_composer.io.progress import Progress

__all__ = ['open_parquet']

_BATCH = 64
"""Rows that are in memory at once."""


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


def open_parquet(
    root: Path,
    files: dict[str, list[Path]],
    scratch: Path,
    *,
    class_names: tuple[str, ...] = (),
    notes: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Source]:
    """The splits of a folder of parquet files; see ``open_sources``.

    Args:
        root: The folder, for messages.
        files: Of each split.
        scratch: Folder for the spool. What is there from an earlier, interrupted call is used again.
        class_names: In label order; empty: those that the files themselves name, else the numbers.
        notes: What else was seen, for the description.
        progress: Whether the copying is reported.
    """
    everything = [file for split in files.values() for file in split]
    columns = _agreed_columns(everything)
    if class_names and columns.label is None:
        raise UserError(f'{root}: class names are given, but the files have no column of labels')
    spools = _spool_all(everything, columns, scratch / 'parquet', progress)
    by_split = {split: [spools[file] for file in paths] for split, paths in files.items()}
    labels = {
        split: np.concatenate([spool.labels for spool in split_spools]).tolist()
        for split, split_spools in by_split.items()
    }
    for split, values in labels.items():
        if not values:
            raise UserError(f'{root}: the files of {split} hold no row')
    lacking: dict[str, list[str]] = {}
    names: tuple[str, ...] = ()
    if columns.label is not None:
        names, lacking = classes_of_numbers(root, labels, class_names or columns.class_names)
    return {
        split: _source(root, split_spools, labels[split], names, Ignored(notes=[*notes, *lacking.get(split, [])]))
        for split, split_spools in by_split.items()
    }


def _source(
    root: Path, spools: list[_Spool], labels: list[int], class_names: tuple[str, ...], ignored: Ignored
) -> RangeSource:
    files = [file for spool in spools for file in spool.files]
    folders = [f'{class_names[label]}/' for label in labels] if class_names else [''] * len(labels)
    names = [folder + file for folder, file in zip(folders, files, strict=True)]
    if '' in files or len(set(names)) < len(names):
        ignored.notes.append('named by row, since the files do not name each image')
        names = [f'{folder}row-{row:08d}' for row, folder in enumerate(folders)]
    facts, order = arrange('parquet files', root, names, labels, class_names, ignored)
    counts = [len(spool.labels) for spool in spools]
    return RangeSource(
        **facts,
        files=OpenFiles([spool.path for spool in spools]),
        numbers=np.repeat(np.arange(len(spools), dtype=np.int32), counts)[order],
        offsets=np.concatenate([spool.starts[:-1] for spool in spools])[order],
        sizes=np.concatenate([np.diff(spool.starts) for spool in spools])[order],
    )


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
    features: dict[str, Any] = {}
    if text := (schema.metadata or {}).get(b'huggingface'):
        try:
            features = json.loads(text)['info']['features']
            named = {name: tuple(kind['names']) for name, kind in features.items() if kind.get('_type') == 'ClassLabel'}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file}: the metadata 'huggingface' of its schema is damaged: {error!r}") from error
    else:
        named = {}
    plain = [column.name for column in schema if column.name in ('label', 'labels')]
    candidates = list(named) or plain
    if len(candidates) > 1:
        raise UserError(f'{file}: {len(candidates)} columns of labels: {", ".join(candidates)}. Write files with one')
    label = candidates[0] if candidates else None
    if label is not None and (label not in schema.names or not pyarrow.types.is_integer(schema.field(label).type)):
        raise UserError(f'{file}: the column of labels, {label!r}, holds no whole numbers. Columns: {shown}')
    return _Columns(images[0], label, named.get(label, ()) if label else ())


def _is_image(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_struct(kind) and {'bytes', 'path'} <= {kind.field(i).name for i in range(kind.num_fields)}


def _spool_all(files: list[Path], columns: _Columns, folder: Path, progress: bool) -> dict[Path, _Spool]:
    """Copy what is not yet copied. Any number of processes may call this at once; one copies, the others wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / '.lock'):
        for left_over in folder.glob('.partial-*'):
            left_over.unlink(missing_ok=True)
        targets = {file: _target(file, columns, folder) for file in files}
        spools = {file: spool for file, target in targets.items() if (spool := _finished(target)) is not None}
        todo = [file for file in files if file not in spools]
        if todo:
            sizes = {file: _image_bytes(file, columns) for file in todo}
            _announce(folder, sum(sizes.values()), len(todo), progress)
            counter = Progress(f'copying to {folder}', sum(sizes.values()) // 2**20, 'MiB', show=progress)
            for file in todo:
                spools[file] = _copy(file, columns, targets[file])
                counter.add(sizes[file] // 2**20)
    return spools


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


def _image_bytes(file: Path, columns: _Columns) -> int:
    try:
        metadata = pyarrow.parquet.read_metadata(file)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
        chunks_of_image = [chunk for chunk in chunks if chunk.path_in_schema == f'{columns.image}.bytes']
        return sum(chunk.total_uncompressed_size for chunk in chunks_of_image)
    except _DAMAGE as error:
        raise UserError(f'{file}: not a parquet file, or damaged: {error}. Get it anew') from error


def _announce(folder: Path, size: int, count: int, progress: bool) -> None:
    free = shutil.disk_usage(folder).free
    text = (
        f'{folder}: {count} parquet files are copied here, {size / 2**30:.2f} GiB of images; '
        f'{free / 2**30:.2f} GiB are free'
    )
    if size > free:
        raise UserError(f'{text}. Choose a scratch folder with more space')
    if progress:
        print(text, file=sys.stderr, flush=True)


def _copy(file: Path, columns: _Columns, target: Path) -> _Spool:
    sizes, labels, files = [], [], []
    names = [columns.image] + ([columns.label] if columns.label else [])

    def write_images(stream: IO[bytes]) -> None:
        source = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        for batch in source.iter_batches(_BATCH, columns=names, use_threads=False):
            images = batch.column(columns.image)
            labels.extend(batch.column(columns.label).to_pylist() if columns.label else [0] * len(batch))
            for image in images:
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

    try:
        _write(target, write_images)
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        arrays = {'starts': starts, 'labels': np.array(labels, dtype=np.int64), 'files': np.array(files, dtype=np.str_)}
        _write(target.with_suffix('.npz'), lambda stream: np.savez(stream, **arrays))
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f'{file}: cannot be copied to {target}: {error}') from error
    return _Spool(target, starts, arrays['labels'], files)


def _write(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    with whole_file(path) as unfinished, unfinished.open('wb') as stream:
        write(stream)
