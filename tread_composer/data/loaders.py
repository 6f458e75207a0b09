"""Batches of a latents data set: for training, and every sample exactly once for evaluation.

For whoever builds a training run. Composer's distributed state must be initialised before any of these is built.
"""

import os
from typing import Any

import torch
from composer.utils import dist
from torch.utils.data import DataLoader, Subset

from tread_composer.data.latents import LatentDataset

__all__ = ['eval_loader', 'train_loader']


def train_loader(
    local: str | os.PathLike[str],
    *,
    batch_size: int,
    num_workers: int = 0,
    shuffle: bool = True,
    worker_timeout: float = 600,
    **dataset_arguments: Any,
) -> DataLoader:
    """Batches for training; Composer saves and restores its position (a plain DataLoader over the streaming reader).

    Elastic: with the same global batch size, the global batches are the same sets of samples for any number of ranks.
    One exception: with ``n % global_batch > global_batch - ranks`` the padding to equal shares makes an epoch one
    batch longer.

    Args:
        batch_size: Samples per rank and batch; a last batch with fewer is dropped.
        shuffle: Whether each epoch has an order of its own.
        worker_timeout: Seconds to wait for a worker's batch: should a worker die or a disk hang, the run ends.
        **dataset_arguments: Further arguments of ``LatentDataset``.

    Raises:
        ValueError: The split has fewer samples than one batch of all ranks.
    """
    dataset = LatentDataset(local, batch_size=batch_size, shuffle=shuffle, **dataset_arguments)
    if len(dataset) < batch_size:
        raise ValueError(
            f'{local}: {dataset.size} samples are no full batch of {batch_size} on each of {dist.get_world_size()} '
            f'ranks, so an epoch would be empty; lower global_train_batch_size'
        )
    return DataLoader(
        dataset,
        batch_size=batch_size,
        drop_last=True,
        collate_fn=dataset.collate,
        **_loader_arguments(num_workers, worker_timeout),
    )


def eval_loader(
    local: str | os.PathLike[str],
    *,
    batch_size: int,
    num_workers: int = 0,
    worker_timeout: float = 600,
    **dataset_arguments: Any,
) -> DataLoader:
    """Batches for evaluation: every sample exactly once over all ranks, in file order.

    The sampler repeats samples to give all ranks equal shares, and Composer drops those again when it evaluates.
    Without Composer's Trainer, drop them by ``sample_ids``.

    Arguments as for ``train_loader``; the last batch may have fewer samples.
    """
    dataset = LatentDataset(local, batch_size=batch_size, **dataset_arguments)
    rows = Subset(dataset, range(dataset.size))  # its own length is that of one rank's share
    sampler = dist.get_sampler(rows, shuffle=False, drop_last=False)
    return DataLoader(rows, batch_size=batch_size, sampler=sampler, **_loader_arguments(num_workers, worker_timeout))


def _loader_arguments(num_workers: int, timeout: float) -> dict[str, Any]:
    # Workers that live on keep their open shards; the epoch's place travels in shared memory, not with the process.
    return {
        'num_workers': num_workers,
        'timeout': timeout if num_workers else 0,
        'persistent_workers': num_workers > 0,
        'pin_memory': torch.cuda.is_available(),
    }
