"""The one reader of ``index.json``, and whether files are what it says.

Streaming's own data set hides faults (it drops what it cannot read, and never compares local sizes or hashes). Its
description of a shard is sound and is used here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash, is_hash

from tread_composer.core.errors import UserError

__all__ = ['Shard', 'file_faults', 'read_index']


def _within(name: str) -> str:
    # An index may come from elsewhere, and shards are fetched to the places that it names.
    if {'', '.', '..'} & set(name.split('/')) or '\\' in name or '\0' in name:
        raise ValueError('leads out of the folder of the index, where shards lie')
    return name


class _File(BaseModel):
    model_config = ConfigDict(strict=True)

    basename: Annotated[str, AfterValidator(_within)]
    bytes: Annotated[int, Field(ge=1)]
    hashes: dict[str, str]


class _Entry(BaseModel):
    """What is read of a shard here and by streaming."""

    model_config = ConfigDict(strict=True)

    format: Literal['mds']
    samples: Annotated[int, Field(ge=1)]
    raw_data: _File
    zip_data: _File | None
    compression: str | None
    column_names: list[str]
    column_encodings: list[str]
    column_sizes: list[int | None]


@dataclass(frozen=True)
class Shard:
    """One entry of ``index.json``."""

    folder: Path  # of the split
    start: int  # position of its first sample in the split
    reader: MDSReader  # streaming's description of it

    @property
    def samples(self) -> int:
        """How many the index says there are."""
        return self.reader.samples

    @property
    def path(self) -> Path:
        """Where it should lie, uncompressed."""
        return self.folder / self.reader.raw_data.basename

    @property
    def encodings(self) -> dict[str, str]:
        """Column -> MDS encoding."""
        return dict(zip(self.reader.column_names, self.reader.column_encodings, strict=False))

    @property
    def forms(self) -> list[FileInfo]:
        """Its files: uncompressed, then compressed where the index knows such a form. Any of them is enough."""
        return [info for info in (self.reader.raw_data, self.reader.zip_data) if info is not None]


def read_index(folder: Path) -> list[Shard]:
    """The shards of a split, in order.

    Raises:
        UserError: ``index.json`` is missing, broken or of another format than MDS, or names a file elsewhere.
    """
    path = folder / 'index.json'
    shards: list[Shard] = []
    begin = 0
    try:
        for number, entry in enumerate(json.loads(path.read_bytes())['shards']):
            place = f'shard {number}: '
            _Entry.model_validate(entry)
            shards.append(Shard(folder, begin, MDSReader.from_json(str(folder), None, entry)))
            begin += shards[-1].samples
    except FileNotFoundError as error:
        raise UserError(
            f'{path}: no such file, so this is no finished data set; give the folder of one split'
        ) from error
    except ValidationError as error:
        fault = error.errors()[0]
        text = f'{".".join(map(str, fault["loc"]))}: {fault["input"]!r}: {fault["msg"].removeprefix("Value error, ")}'
        raise UserError(f'{path}: {place}{text}; copy or prepare the data again') from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f'{path}: empty or broken, or not an index of MDS shards ({error!r}); copy or prepare the data again'
        ) from error
    return shards


def file_faults(name: object, info: FileInfo, size: int, data: bytes | None = None) -> list[str]:
    """What is wrong with a file, in words; with its content, every hash of the index is compared."""
    if size != info.bytes:  # then the hash says nothing more
        return [f'{name}: {size} bytes, the index says {info.bytes}']
    if data is None:
        return []
    faults = []
    for kind, value in info.hashes.items():
        if not is_hash(kind):
            faults.append(f'{name}: the index knows its {kind}, which streaming cannot compute')
        elif get_hash(kind, data) != value:
            faults.append(f'{name}: its {kind} is not the one of the index, so bytes have changed')
    return faults
