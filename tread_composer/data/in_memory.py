"""A latents data set held in RAM, in the order of the streaming reader, for sets that fit: a batch is one gather.

ImageNet at 256 pixels takes 21 GB as moments, 42 GB with the mirrors. The ranks of a node share one copy.
Legend: N samples, M 1 or 2 (with the mirror), C channels, H x W latent pixels, B samples of a batch.
"""

import mmap
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from composer.utils import dist
from numpy.typing import NDArray
from torch import Tensor

from tread_composer.core.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LATENTS, LATENTS_MIRRORED
from tread_composer.data.latents import LatentDataset
from tread_composer.io.progress import Progress

__all__ = ['LatentsInMemory']

_SECONDS_BETWEEN_LINES = 10.0


class LatentsInMemory(LatentDataset):
    """``LatentDataset`` with every sample in RAM; same order, same mirrors, same place after a resume.

    For a DataLoader without workers: those would only copy what is there already.

    Args:
        local: See ``LatentDataset``.
        **arguments: Likewise.

    Raises:
        UserError: The samples do not fit into the memory that is free now, or several ranks share a node on a system
            without anonymous shared files (anything but Linux).
    """

    def __init__(self, local: str | os.PathLike[str], **arguments: Any) -> None:
        super().__init__(local, **arguments)
        sample, _ = self.row(0, LATENTS)
        names = [LATENTS] if self.mirror_seed is None else [LATENTS, LATENTS_MIRRORED]
        shape = (self.size, len(names), *sample.shape)
        size = int(np.prod(shape)) * sample.dtype.itemsize + self.size * 8
        leader = dist.get_local_rank() == 0
        free = _free_memory()
        if leader and size > free:
            raise UserError(
                f'data.in_memory: {local} takes {size / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; '
                f'set in_memory: false to stream it'
            )
        buffer = _shared_buffer(size + 8)
        labels_at = size - self.size * 8
        self._filled = np.frombuffer(buffer, np.int64, 1, size)  # samples that are there, for the other ranks
        self._latents = np.frombuffer(buffer, sample.dtype, int(np.prod(shape))).reshape(shape)
        self._labels = np.frombuffer(buffer, np.int64, self.size, labels_at)
        if leader:
            self._fill(names)
        # Not a barrier: its time runs out after minutes, and reading from a slow disk takes longer.
        while self._filled[0] < self.size:
            time.sleep(0.1)
        self._maps.clear()
        self._flat = self._latents.reshape(-1, *sample.shape)

    def _items(self) -> Iterator[int]:
        return self._positions()  # with a remote, too: nothing is left to fetch

    def gather(self, ids_B: NDArray[np.int64]) -> dict[str, Tensor]:
        """A batch by positions, image or mirror as the current epoch has it."""
        rows_B = len(self._latents[0]) * ids_B + (0 if self._mirrored is None else self._mirrored[ids_B])
        return {
            RAW_LATENTS: torch.from_numpy(self._flat.take(rows_B, axis=0, mode='clip')),  # clip: needs no buffer
            LABELS: torch.from_numpy(self._labels.take(ids_B)),
            SAMPLE_IDS: torch.from_numpy(ids_B),
        }

    def _fill(self, names: list[str]) -> None:
        progress = Progress(f'{self.streams[0].local}: into memory', self.size, 'samples', interval=_SECONDS_BETWEEN_LINES)
        for sample_id in range(self.size):
            for place, name in enumerate(names):
                self._latents[sample_id, place], self._labels[sample_id] = self.row(sample_id, name)
            self._filled[0] = sample_id + 1
            progress.add()


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of the container's limit where there is one."""
    free = psutil.virtual_memory().available
    for folder, limit, used in (
        ('/sys/fs/cgroup', 'memory.max', 'memory.current'),
        ('/sys/fs/cgroup/memory', 'memory.limit_in_bytes', 'memory.usage_in_bytes'),
    ):
        try:
            texts = [Path(folder, name).read_text() for name in (limit, used, 'memory.stat')]
        except OSError:
            continue
        if texts[0].strip() != 'max':
            cached = dict(line.split() for line in texts[2].splitlines()).get('inactive_file', '0')
            free = min(free, int(texts[0]) - int(texts[1]) + int(cached))
    return free


def _shared_buffer(size: int) -> mmap.mmap | bytearray:
    """Memory of this node's ranks in common: it has no name in any folder, so it cannot outlive them."""
    if dist.get_local_world_size() == 1:
        return bytearray(size)
    if not hasattr(os, 'memfd_create'):
        raise UserError(
            'data.in_memory: several ranks on a node share one copy, which needs Linux; set in_memory: false'
        )
    handle, place = None, None
    if dist.get_local_rank() == 0:
        handle = os.memfd_create('latents')
        os.truncate(handle, size)
        place = f'/proc/{os.getpid()}/fd/{handle}'
    places = dist.all_gather_object(place)
    if handle is None:
        handle = os.open(str(places[dist.get_global_rank() - dist.get_local_rank()]), os.O_RDWR)
    buffer = mmap.mmap(handle, size)
    dist.barrier()  # the leader's handle is the others' way in
    os.close(handle)
    return buffer
