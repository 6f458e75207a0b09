"""The shards of a split, byte by byte from the local disk: for tools that must not trust what they read.

Streaming's own data set hides faults (stack.md 6: it drops what it cannot read, and never compares local sizes or
hashes). Its classes that decode one sample are sound and are used here; files, headers and offsets are looked at first.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from streaming.base.compression import decompress
from streaming.base.format.base.reader import FileInfo
from streaming.base.format.mds.reader import MDSReader
from streaming.base.hashing import get_hash, is_hash

from tread_composer.core.errors import UserError

__all__ = ['Content', 'Shard', 'read_index', 'sample_numbers']


@dataclass(frozen=True)
class Shard:
    """One entry of ``index.json``.

    Attributes:
        folder: Of the split.
        first: Position of its first sample in the split.
        reader: Streaming's description of it.
    """

    folder: Path
    first: int
    reader: MDSReader

    @property
    def samples(self) -> int:
        """How many the index says there are."""
        return self.reader.samples

    @property
    def path(self) -> Path:
        """Where it should lie, uncompressed."""
        return self.folder / self.reader.raw_data.basename

    def read(self) -> tuple[bytes | None, list[str]]:
        """Its bytes, uncompressed, and what is wrong with the files, in words.

        All forms that lie there are compared with the index: size and every hash. The bytes are None if none can be
        had; bytes with a fault are handed out all the same, so that the samples in them can be named.
        """
        faults: list[str] = []
        raw = self._file(self.reader.raw_data, faults)
        zipped = self._file(self.reader.zip_data, faults) if self.reader.zip_data else None
        if raw is None and zipped is None:
            return None, faults or [f'{self.path}: this shard is missing']
        if raw is None and zipped is not None and self.reader.zip_data:
            name = self.folder / self.reader.zip_data.basename
            try:
                raw = decompress(self.reader.compression, zipped)
            except Exception as error:  # every compressor has exceptions of its own
                return None, [*faults, f'{name}: cannot be decompressed: {error}']
            faults += self._differences(f'{name}, decompressed', raw, self.reader.raw_data)
        return raw, faults

    def _file(self, info: FileInfo, faults: list[str]) -> bytes | None:
        path = self.folder / info.basename
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            faults.append(f'{path}: cannot be read: {error}')
            return None
        faults += self._differences(str(path), data, info)
        return data

    def _differences(self, name: str, data: bytes, info: FileInfo) -> list[str]:
        if len(data) != info.bytes:  # then the hash says nothing more
            return [f'{name}: {len(data)} bytes, the index says {info.bytes}']
        wrong = [
            f'the index knows its {kind}, which streaming cannot compute' for kind in info.hashes if not is_hash(kind)
        ]
        wrong += [
            f'its {kind} is not the one of the index, so bytes have changed'
            for kind, value in info.hashes.items()
            if is_hash(kind) and get_hash(kind, data) != value
        ]
        return [f'{name}: {words}' for words in wrong]


class Content:
    """The samples in the bytes of a shard.

    Args:
        shard: Which one.
        data: Its bytes, uncompressed, perhaps damaged.

    Raises:
        ValueError: The header is cut off or counts other samples than the index.
    """

    def __init__(self, shard: Shard, data: bytes) -> None:
        self._reader, self._data = shard.reader, data
        header = 4 * (shard.samples + 2)
        if len(data) < header:
            raise ValueError(f'is cut off in its header, at byte {len(data)}')
        # MDS: the number of samples, then where each begins and the last one ends, all uint32.
        numbers = np.frombuffer(data[:header], '<u4')
        if numbers[0] != shard.samples:
            raise ValueError(f'holds {numbers[0]} samples by its header, {shard.samples} by the index')
        self._bounds = numbers[1:].astype(np.int64)

    def row(self, number: int) -> dict[str, Any]:
        """The sample at a position of the shard, column -> value.

        Raises:
            ValueError: It lies outside of the bytes or cannot be decoded.
        """
        begin, end = self._bounds[number], self._bounds[number + 1]
        if not 0 <= begin < end <= len(self._data):
            raise ValueError('cut off or misplaced')
        try:
            return self._reader.decode_sample(self._data[begin:end])
        except Exception as error:  # numpy, struct and unicode errors, by what was damaged
            raise ValueError('cannot be decoded') from error


def read_index(folder: Path) -> list[Shard]:
    """The shards of a split, in order.

    Raises:
        UserError: ``index.json`` is missing, broken or of another format than MDS.
    """
    path = folder / 'index.json'
    shards, begin = [], 0
    try:
        for entry in json.loads(path.read_bytes())['shards']:
            shards.append(Shard(folder, begin, MDSReader.from_json(str(folder), None, entry)))
            begin += entry['samples']
    except FileNotFoundError as error:
        raise UserError(f'{path}: no such file, so this is no finished split') from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f'{path}: empty, broken or not an index of MDS shards ({error!r})') from error
    return shards


def sample_numbers(numbers: Sequence[int]) -> str:
    """``'sample 4'``, ``'samples 1, 5-9'``: all of them, in little room."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = ', '.join(str(a) if a == b else f'{a}-{b}' for a, b in runs)
    return f'sample{"s" if len(numbers) > 1 else ""} {words}'
