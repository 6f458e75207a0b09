"""What is in the files of a split, byte by byte from the local disk: for tools that must not trust what they read.

Legend: B rows, S stored channels, C channels of the latent, h x w latent pixels.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from streaming.base.compression import decompress

from tread_composer.core.errors import UserError
from tread_composer.data.shards import Shard, file_faults

__all__ = ['LOGVAR_RANGE', 'Content', 'channel_sums', 'read_shard', 'sound_rows']

LOGVAR_RANGE = (-30.0, 20.0)  # what diffusers clamps log-variances to


def read_shard(shard: Shard) -> tuple[bytes | None, list[str]]:
    """The bytes of a shard, uncompressed (None if none can be had), and what is wrong with its files, in words.

    Size and every hash of all forms that lie there; bytes with a fault are of use to name the samples in them.
    """
    faults: list[str] = []
    contents: list[bytes] = []
    for info in shard.forms:
        path = shard.folder / info.basename
        if not path.exists():
            continue
        try:
            data = path.read_bytes()
            faults += file_faults(path, info, len(data), data)
            if info is shard.reader.zip_data and not contents:
                data = decompress(shard.reader.compression, data)
                faults += file_faults(f'{path}, decompressed', shard.reader.raw_data, len(data), data)
            contents.append(data)
        except OSError as error:
            faults.append(f'{path}: cannot be read: {error}')
        except Exception as error:  # every compressor has exceptions of its own
            faults.append(f'{path}: cannot be decompressed: {error}')
    if contents:
        return contents[0], faults
    return None, faults or [f'{shard.path}: this shard is missing']


class Content:
    """The samples in the bytes of a shard, uncompressed and perhaps damaged; ``ValueError`` if the header is wrong."""

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

    def place(self, number: int) -> tuple[int, int]:
        """Offset and size of the sample at a position of the shard; ``ValueError`` if it cannot lie there."""
        begin, end = int(self._bounds[number]), int(self._bounds[number + 1])
        if not 0 <= begin < end <= len(self._data):
            raise ValueError('cut off or misplaced')
        return begin, end - begin

    def row(self, number: int) -> dict[str, Any]:
        """Column -> value of the sample at a position of the shard; ``ValueError`` if it cannot be decoded."""
        begin, size = self.place(number)
        try:
            return self._reader.decode_sample(self._data[begin : begin + size])
        except Exception as error:  # numpy, struct and unicode errors, by what was damaged
            raise ValueError('cannot be decoded') from error


def sound_rows(shard: Shard, numbers: Iterable[int] | None = None) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
    """Offset and size, and the row, of samples of a shard; a shard with any fault is refused."""
    data, faults = read_shard(shard)
    try:
        if faults or data is None:
            raise ValueError(faults[0])
        content = Content(shard, data)
        for number in range(shard.samples) if numbers is None else numbers:
            yield content.place(number), content.row(number)
    except ValueError as error:
        raise UserError(f'{shard.path}: {error}; copy or convert it again (verify.py lists every fault)') from None


def channel_sums(rows_BSHW: np.ndarray, kind: str) -> np.ndarray:
    """For each row and channel the sums of x and of x squared over the pixels: float64 ``[B, 2, C]``.

    For moments x is a draw from the posterior, and the sums are its expectations: mean, and mean squared + variance.
    One row's sums do not depend on the other rows, so statistics do not depend on how rows came in batches.
    """
    # In one memory order: numpy adds up along memory, and encoders may give channels last.
    values = rows_BSHW.astype(np.float64, order='C')
    if kind == 'moments':
        mean, logvar = np.split(values, 2, axis=1)
        mean_of_values, second = mean, mean**2 + np.exp(logvar)
    else:
        mean_of_values, second = values, values**2
    return np.stack([mean_of_values.sum(axis=(2, 3)), second.sum(axis=(2, 3))], axis=1)
