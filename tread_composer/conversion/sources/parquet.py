"""Hugging Face's parquet files, and the Arrow files that ``datasets`` keeps: a column of images, a column of labels.

Parquet cannot be read at random: one image costs the decoding of a row group of hundreds; Arrow streams have no table
of contents. So each file is copied once into an uncompressed Arrow file, of which small batches are mapped into memory.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from tread_composer.conversion.destination import refuse_if_too_large, size_in_words
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.source import SPLITS, Ignored, Images, Source, arranged, few, refusing
from tread_composer.core.errors import UserError
from tread_composer.io.files import UNFINISHED, read_json, whole_file
from tread_composer.io.progress import Progress, to_stderr

__all__ = ['open_tables', 'saved_files']

_BATCH = 64  # rows that are in memory at once
_COPY = pyarrow.schema({'bytes': pyarrow.binary(), 'path': pyarrow.string(), 'label': pyarrow.int64()})
# What reading raises; ValueError: texts that are not UTF-8.
_DAMAGE = (OSError, ValueError, pyarrow.ArrowException)


class _Columns(NamedTuple):
    """Which columns hold what; must be the same in all files of a data set."""

    image: str
    label: str | None
    class_names: tuple[str, ...]


def saved_files(root: Path, files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """Of Arrow files those that ``save_to_disk`` has written, where it has; and what to report about other things.

    ``map`` leaves files of its own beside them, which may hold anything.
    """
    kept, notes = list(files), []
    for folder in {file.parent for file in files if (file.parent / 'state.json').is_file()}:
        with _saved(folder / 'state.json') as state:
            listed = {folder / entry['filename'] for entry in state.get('_data_files') or []}
        if missing := [file.name for file in listed if file not in files]:
            raise UserError(f'{folder}: {few(missing)} listed in state.json but not there. Copy the data completely')
        if state.get('_indices_data_files'):
            raise UserError(f'{folder}: rows chosen by a file of indices; save it anew with newer datasets')
        kept = [file for file in kept if file.parent != folder or file in listed]
    if unlisted := len(files) - len(kept):
        notes.append(f'{unlisted} arrow files that state.json does not list are left out')
    if (root / 'dataset_dict.json').is_file():
        with _saved(root / 'dataset_dict.json') as named:
            unread = [name for name in named['splits'] if name not in SPLITS]
        notes += [f'the split {name} is not converted' for name in unread]
    return kept, notes


@contextlib.contextmanager
def _saved(path: Path) -> Iterator[Any]:
    with refusing((KeyError, TypeError, AttributeError), f'{path}: not what save_to_disk writes', '. Get it anew'):
        yield read_json(path)


def open_tables(
    root: Path, settings: ImageSettings, scratch: Path, files: dict[str, list[Path]], notes: Sequence[str]
) -> dict[str, Source]:
    """The splits of such files; what an earlier, interrupted call left in the scratch folder is used again."""
    columns = {file: _columns_of(file, settings) for split in files.values() for file in split}
    reference, *remaining = columns
    for file in remaining:
        if columns[file] != columns[reference]:
            raise UserError(f'{file}: columns or class names differ from those of {reference}. Give one data set')
    label, class_names = columns[reference].label, columns[reference].class_names
    if settings.given_names and label is None:
        raise UserError(f'{root}: class names are given, but the files have no column of labels')
    copies = _copy_all(columns, scratch / 'parquet')
    kind = f'{reference.suffix[1:].lower()} files'
    splits = {}
    for split, members in files.items():
        splits[split] = images = Images(ignored=Ignored(notes=list(notes)))
        for number, file in enumerate(members):
            _list(copies[file], number, images)
        if not images.names:
            raise UserError(f'{root}: the files of {split} hold no row. Get them anew')
        if '' in images.names or len(set(zip(images.labels, images.names, strict=True))) < len(images.names):
            images.ignored.notes.append('named by row, since the files do not name each image')
            images.names = [f'row-{row:08d}' for row in range(len(images.names))]
    if label is not None:
        name_by_number(root, splits, settings.given_names or class_names)
    copies_of = {split: [str(copies[file]) for file in members] for split, members in files.items()}
    return {
        split: arranged(kind, root, images, functools.partial(_load, copies_of[split]))
        for split, images in splits.items()
    }


def _load(copies: list[str], name: str, number: int, index: int, row: int) -> bytes:
    """Of a copy, a batch of it, and a row of that."""
    with pyarrow.memory_map(copies[number]) as file:
        return pyarrow.ipc.open_file(file).get_batch(index).column('bytes')[row].as_py()


def _columns_of(file: Path, settings: ImageSettings) -> _Columns:
    with refusing(_DAMAGE, f'{file}: not a {file.suffix[1:]} file, or damaged', '. Get it anew'):
        schema = _schema(file)
        shown = ', '.join(f'{column.name}: {column.type}' for column in schema)
    images = [column.name for column in schema if _is_image(column.type)]
    if settings.image_column is not None:
        images = [name for name in schema.names if name == settings.image_column]
        if not images or not (_is_image(schema.field(images[0]).type) or _is_binary(schema.field(images[0]).type)):
            raise UserError(f'{file}: --image-column {settings.image_column}: no column of images. Columns: {shown}')
    if len(images) != 1:
        raise UserError(
            f'{file}: {len(images)} columns hold images (a struct with "bytes" and "path", as Hugging Face writes '
            f'them), 1 is expected; --image-column says which. Columns: {shown}'
        )
    named: dict[str, list[str]] = {}
    if text := (schema.metadata or {}).get(b'huggingface'):
        damage = (ValueError, KeyError, TypeError, AttributeError)
        with refusing(damage, f"{file}: the metadata 'huggingface' of its schema is damaged"):
            features = json.loads(text)['info']['features']
            named = {name: kind['names'] for name, kind in features.items() if kind.get('_type') == 'ClassLabel'}
            for names in named.values():
                if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                    raise ValueError('the names of classes are no list of texts')
    candidates = list(named) or [column.name for column in schema if column.name in ('label', 'labels')]
    if settings.label_column is not None:
        candidates = [settings.label_column]
        if settings.label_column not in schema.names:
            raise UserError(f'{file}: --label-column {settings.label_column}: no such column. Columns: {shown}')
    if len(candidates) > 1:
        raise UserError(
            f'{file}: {len(candidates)} columns of labels: {", ".join(candidates)}. Say which with --label-column'
        )
    label = candidates[0] if candidates else None
    if label is not None and (label not in schema.names or not pyarrow.types.is_integer(schema.field(label).type)):
        raise UserError(f'{file}: the column of labels, {label!r}, holds no whole numbers. Columns: {shown}')
    return _Columns(images[0], label, tuple(named.get(label, ())) if label else ())


def _schema(file: Path) -> pyarrow.Schema:
    if file.suffix.lower() == '.parquet':
        return pyarrow.parquet.read_schema(file)
    with pyarrow.memory_map(str(file)) as content, pyarrow.ipc.open_stream(content) as stream:
        return stream.schema


def _is_binary(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _is_image(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_struct(kind) and {'bytes', 'path'} <= {kind.field(i).name for i in range(kind.num_fields)}


def _copy_all(columns: dict[Path, _Columns], folder: Path) -> dict[Path, Path]:
    """Copy the files that are not yet copied. A conversion does this on its first rank, under its lock."""
    folder.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.glob(f'{UNFINISHED}*'):  # by a copy that was killed
        abandoned.unlink()
    targets = {}
    for file, kinds in columns.items():  # a changed file, or another choice of columns, is another copy
        facts = repr((str(file), file.stat().st_size, file.stat().st_mtime_ns, kinds.image, kinds.label))
        targets[file] = folder / f'{file.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.arrow'
    todo = [file for file, target in targets.items() if not target.exists()]
    if todo:
        # What is not image in such a file is less than what compression leaves of JPEGs.
        size = sum(file.stat().st_size for file in todo)
        free = refuse_if_too_large(folder, size, f'the images of {len(todo)} files')
        to_stderr(
            f'{folder}: {len(todo)} {todo[0].suffix[1:].lower()} files are copied here, about {size_in_words(size)}; '
            f'{size_in_words(free)} are free'
        )
        progress = Progress(f'copying to {folder}', len(todo), 'files')
        for file in todo:
            with (
                refusing(_DAMAGE, f'{file}: cannot be copied to {targets[file]}'),
                whole_file(targets[file]) as unfinished,
                pyarrow.ipc.new_file(str(unfinished), _COPY) as writer,
            ):
                for batch in _rows(file, columns[file]):
                    writer.write_batch(batch)
            progress.add()
    return targets


def _batches(file: Path, columns: _Columns) -> Iterator[pyarrow.RecordBatch]:
    if file.suffix.lower() == '.parquet':
        source = pyarrow.parquet.ParquetFile(file, page_checksum_verification=True)
        names = [columns.image] + ([columns.label] if columns.label else [])
        yield from source.iter_batches(_BATCH, columns=names, use_threads=False)
        return
    with pyarrow.memory_map(str(file)) as content, pyarrow.ipc.open_stream(content) as stream:
        for batch in stream:
            yield from (batch.slice(start, _BATCH) for start in range(0, len(batch), _BATCH))


def _rows(file: Path, columns: _Columns) -> Iterator[pyarrow.RecordBatch]:
    for number, batch in enumerate(_batches(file, columns)):
        image = batch.column(columns.image)
        if _is_binary(image.type):
            content, paths = image, pyarrow.nulls(len(image), pyarrow.string())
        else:
            content, paths = (image.flatten()[image.type.get_field_index(name)] for name in ('bytes', 'path'))
        paths = pyarrow.compute.fill_null(paths.cast(pyarrow.string()), '')
        labels = batch.column(columns.label) if columns.label else pyarrow.array(np.zeros(len(batch), np.int64))
        for column, fault in ((content, 'holds no bytes'), (labels, 'has no label')):
            if column.null_count:
                row = pyarrow.compute.index(column.is_null(), True).as_py()
                raise UserError(
                    f'{file}: row {number * _BATCH + row} {fault} (path {paths[row].as_py()!r}). Write files with '
                    f'embedded images and a label for each'
                )
        paths.validate(full=True)  # texts that are not UTF-8
        arrays = [content.cast(pyarrow.binary()), paths, labels.cast(pyarrow.int64())]
        yield pyarrow.record_batch(arrays, schema=_COPY)


def _list(copy: Path, number: int, images: Images) -> None:
    """Take the images of a copy in."""
    with pyarrow.memory_map(str(copy)) as file:
        reader = pyarrow.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            images.names += [path.rpartition('/')[2] for path in batch.column('path').to_pylist()]
            images.labels += batch.column('label').to_pylist()
            images.places += [(number, index, row) for row in range(len(batch))]
