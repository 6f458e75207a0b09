"""Reading and decoding images in worker processes, a batch at a time, in the order in which they are written.

Legend: B images of a batch, R resolution.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from tread_composer.conversion.images import UnreadableImage, decode_image
from tread_composer.conversion.sources import Source
from tread_composer.core.errors import UserError

__all__ = ['Batch', 'decoded_batches']

_PREFETCH = 4  # batches per worker: enough that a slow image or a slow read does not make the encoder wait


@dataclass(frozen=True)
class Batch:
    """What is decoded together.

    Args:
        split: Name of the split.
        part: Number of the part.
        positions: In the split's source.
    """

    split: str
    part: int
    positions: list[int]


class _Decoded(Dataset):
    """Item ``i`` is the whole batch ``i``: one worker decodes it; nothing is left to collate in the main process."""

    def __init__(self, sources: Mapping[str, Source], batches: Sequence[Batch], resolution: int) -> None:
        self._sources, self._batches, self._resolution = sources, batches, resolution

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = self._batches[index]
        source = self._sources[batch.split]
        images, positions, unreadable, problem = [], [], [], None
        for position in batch.positions:
            try:
                images.append(decode_image(source.read(position), self._resolution))
                positions.append(position)
            except UnreadableImage as error:
                unreadable.append((position, str(error)))
            except (UserError, OSError) as error:
                # Told as data: raised in a worker it would arrive with that worker's traceback in its text.
                problem = f'{batch.split}: {source.names[position]}: cannot be read: {error}'
                break
        shape = (0, 3, self._resolution, self._resolution)
        pixels = torch.from_numpy(np.stack(images) if images else np.zeros(shape, np.uint8))
        return {
            'images': pixels,
            'batch': batch,
            'positions': positions,
            'unreadable': unreadable,
            'problem': problem,
        }


def decoded_batches(
    sources: Mapping[str, Source], batches: Sequence[Batch], resolution: int, *, workers: int, pin_memory: bool
) -> DataLoader:
    """Decode ``batches`` in order; each comes as a dict.

    ``images`` is uint8 ``[B, 3, R, R]`` of those that are readable, ``positions`` are theirs, ``unreadable`` holds
    position and reason of the others, ``problem`` is None or says why reading has to stop, ``batch`` is the Batch.

    Args:
        sources: Of each split.
        batches: What to decode.
        resolution: R.
        workers: Processes; 0 decodes in this one.
        pin_memory: Whether the images come in memory that a GPU can fetch by itself.

    Raises:
        UserError: The shared memory cannot hold what the workers prepare.
    """
    workers = min(workers, len(batches))
    largest = max((len(batch.positions) for batch in batches), default=0)
    if workers:
        _check_shared_memory(workers, workers * _PREFETCH * largest * 3 * resolution**2)
    return DataLoader(
        _Decoded(sources, batches, resolution),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=_PREFETCH if workers else None,
    )


def _check_shared_memory(workers: int, needed: int) -> None:
    """Batches travel through /dev/shm, which in a container has 64 MiB unless it is asked for more."""
    if not os.path.isdir('/dev/shm'):
        return
    state = os.statvfs('/dev/shm')
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise UserError(
            f'/dev/shm has {free / 2**20:,.0f} MiB free, {workers} decoding workers need {needed / 2**20:,.0f} MiB: '
            f'give the container more (docker run --shm-size), or lower --workers or --batch-size'
        )
