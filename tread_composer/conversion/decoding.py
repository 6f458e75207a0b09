"""Reading and preparing samples in worker processes, a batch at a time, in the order in which they are written.

Legend: B samples of a batch.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tread_composer.conversion.encoding import Encoder
from tread_composer.conversion.images import UnreadableImage
from tread_composer.conversion.sources.base import Source
from tread_composer.core.errors import UserError
from tread_composer.io.device import check_shared_memory

__all__ = ['Batch', 'Prepared', 'prepared_batches']

_PREFETCH = 4  # batches per worker: enough that a slow image or a slow read does not make the encoder wait


class Batch(NamedTuple):
    """What is read together: positions in a split's source, all of one part."""

    split: str
    part: int
    positions: list[int]


class Prepared(NamedTuple):
    """A batch that was read."""

    batch: Batch
    samples: Tensor | None  # [B, ...] as the encoder takes them; None if none is readable
    positions: list[int]  # those of the samples in the source
    unreadable: list[tuple[int, str]]  # positions of the others, and reasons
    problem: str | None  # why reading has to stop; not raised, for a worker's exception would carry its traceback
    transparent: int = 0  # how many of the samples are images with transparent parts


class _Batches(Dataset):
    """Item ``i`` is the whole batch ``i``: one worker reads it; nothing is left to collate in the main process."""

    def __init__(self, sources: Mapping[str, Source], batches: Sequence[Batch], encoder: Encoder) -> None:
        self._sources, self._batches, self._prepare = sources, batches, encoder.prepare

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Prepared:
        batch = self._batches[index]
        source = self._sources[batch.split]
        samples, positions, unreadable, problem, transparent = [], [], [], None, 0
        for position in batch.positions:
            try:
                sample = self._prepare(source.read(position))
                samples.append(torch.from_numpy(sample.values))
                positions.append(position)
                transparent += sample.is_transparent
            except UnreadableImage as error:
                unreadable.append((position, str(error)))
            except (UserError, OSError) as error:
                problem = f'{batch.split}: {source.names[position]}: cannot be read: {error}'
                break
        stacked = torch.stack(samples) if samples else None
        return Prepared(batch, stacked, positions, unreadable, problem, transparent)


def prepared_batches(
    sources: Mapping[str, Source], batches: Sequence[Batch], encoder: Encoder, *, workers: int
) -> DataLoader:
    """Read ``batches`` of the sources of the splits in order, each as a ``Prepared``.

    The encoder says how a sample is prepared, and for which device. ``workers`` are processes; 0 reads in this one.
    Refused if the shared memory cannot hold what they prepare.
    """
    workers = min(workers, len(batches))
    if workers:
        largest = max(len(batch.positions) for batch in batches)
        needed = workers * _PREFETCH * largest * encoder.prepared_bytes
        check_shared_memory(needed, 'lower --workers or --batch-size')
    return DataLoader(
        _Batches(sources, batches, encoder),
        batch_size=None,
        num_workers=workers,
        pin_memory=encoder.device.type == 'cuda',
        prefetch_factor=_PREFETCH if workers else None,
    )
