"""Random access to the fixed-shape columns of an MDS shard on the local disk, without decoding the rest of a row.

The reader of mosaicml-streaming opens the file, reads and decodes every column for each sample; mapping the file once
and looking at the bytes in place is several times faster (benchmarks/loader.py).
"""

import os

import numpy as np
import torch
from numpy.typing import NDArray
from streaming.base.format.mds.encodings import get_mds_encoded_size
from streaming.base.format.mds.reader import MDSReader

__all__ = ['MappedShard']


class MappedShard:
    """One uncompressed shard, mapped into memory.

    An MDS shard is: the number of samples, then for each sample and the end its position in the file (uint32), then a
    description, then the samples. A sample is the sizes of its columns of variable size (uint32), then the columns in
    order of their names.

    Raises:
        FileNotFoundError: The file is not there (any more).
        ValueError: The file has not the size that the index says.
    """

    def __init__(self, shard: MDSReader) -> None:
        path = os.path.join(shard.dirname, shard.split, shard.raw_data.basename)
        size = os.path.getsize(path)
        if size != shard.raw_data.bytes:
            raise ValueError(f'{path}: {size} bytes, the index says {shard.raw_data.bytes}')
        # Not numpy's or Python's mapping: those keep a file descriptor for each shard, of which ImageNet has hundreds
        # and a process often may have 1,024. Private: what is written there by mistake never reaches the file.
        self._bytes = torch.from_file(path, shared=False, size=size, dtype=torch.uint8).numpy()
        self._bytes.flags.writeable = False
        self._begins = self._bytes[4 : 4 + 4 * shard.samples].view(np.uint32)
        self._columns: dict[str, tuple[int, int, np.dtype, tuple[int, ...]]] = {}
        sizes = [get_mds_encoded_size(encoding) for encoding in shard.column_encodings]
        at = 4 * sizes.count(None)
        for name, encoding, size in zip(shard.column_names, shard.column_encodings, sizes, strict=True):
            if size is None:
                break  # what comes after it has no fixed place
            # 'ndarray:float16:4,32,32', or the name of a numpy type for a single number.
            dtype, _, shape = encoding.removeprefix('ndarray:').partition(':')
            numbers = tuple(int(number) for number in shape.split(',')) if shape else ()
            self._columns[name] = at, at + size, np.dtype(dtype), numbers
            at += size

    @staticmethod
    def can_map(shard: MDSReader, names: list[str]) -> bool:
        """Whether these columns have a fixed place in each row."""
        sizes = dict(zip(shard.column_names, map(get_mds_encoded_size, shard.column_encodings), strict=True))
        before = shard.column_names[: max(shard.column_names.index(name) for name in names) + 1]
        return all(sizes[name] is not None for name in before)

    def array(self, row: int, name: str) -> NDArray:
        """The array of a column (of a single number one without dimensions), a view that must not be written to."""
        begin = int(self._begins[row])
        start, end, dtype, shape = self._columns[name]
        return self._bytes[begin + start : begin + end].view(dtype).reshape(shape)
