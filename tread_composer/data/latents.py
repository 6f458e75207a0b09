"""Reading a latents data set: the streaming reader for training, the exact-once reader for evaluation, the checks.

For whoever builds a training run. Composer's distributed state must be initialised before any of these is built:
mosaicml-streaming would otherwise start a process group of its own, and Composer's start would then hang.
Legend: B samples, C channels, H x W latent pixels.
"""

import os
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import torch
from composer.utils import dist
from streaming import StreamingDataset
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tread_composer.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.data.columns import LABEL, LATENTS

__all__ = ['LatentDataset', 'eval_loader', 'train_loader']

Sample = dict[str, Tensor]


class LatentDataset(StreamingDataset):
    """The samples of one split, in an order that does not depend on the number of ranks or workers.

    A sample is ``{'raw_latents': [C, H, W] as stored (float16), 'labels': int64, 'sample_ids': int64}``; the id is
    the position in the data set. Iterate it (training) or index it (evaluation).

    Unlike its parent it does not end an epoch early when a shard cannot be read: the parent lets a background thread
    print a traceback and then behaves as if the data were over. Here the iteration raises.

    Args:
        local: Folder of the split; with ``remote``, where its shards are cached.
        batch_size: Samples per rank and batch, the same as the DataLoader's.
        remote: Where the shards are fetched from; None if ``local`` has them all.
        shuffle: Whether each epoch has an order of its own.
        shuffle_seed: Of that order.
        num_canonical_nodes: How many paths through the shards the order is made of. With 1 an epoch has no repeated
            samples and the order is the same for any number of ranks, on one node or many; the price is that every
            node visits every shard. Raise it (to the number of nodes) where a node must not fetch all of ``remote``.
        predownload: Samples that each worker fetches ahead; None for 8 batches.
        cache_limit: Bytes of ``local`` that fetched shards may take, e.g. ``'100gb'``; None for no limit.
        validate_hash: Hash to check fetched shards with, e.g. ``'xxh64'``. Only fetched shards are ever checked.
        download_retry: Further attempts to fetch a shard.
        download_timeout: Seconds for one attempt.
    """

    def __init__(
        self,
        local: str | os.PathLike[str],
        *,
        batch_size: int,
        remote: str | None = None,
        shuffle: bool = False,
        shuffle_seed: int = 9176,
        num_canonical_nodes: int = 1,
        predownload: int | None = None,
        cache_limit: int | str | None = None,
        validate_hash: str | None = None,
        download_retry: int = 2,
        download_timeout: float = 60,
    ) -> None:
        self._failure: BaseException | None = None
        super().__init__(
            local=os.fspath(local),
            remote=remote,
            batch_size=batch_size,
            shuffle=shuffle,
            shuffle_seed=shuffle_seed,
            num_canonical_nodes=num_canonical_nodes,
            predownload=predownload,
            cache_limit=cache_limit,
            validate_hash=validate_hash if remote else None,
            download_retry=download_retry,
            download_timeout=download_timeout,
        )

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """The sample at a position of the data set; fetches its shard if need be."""
        row = super().get_item(sample_id, retry)
        return {
            # The array is a view of bytes that must not be written to; torch wants one that may.
            RAW_LATENTS: torch.from_numpy(row[LATENTS].copy()),
            LABELS: torch.tensor(int(row[LABEL]), dtype=torch.int64),
            SAMPLE_IDS: torch.tensor(int(sample_id), dtype=torch.int64),
        }

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Make a shard readable.

        Raises:
            FileNotFoundError: There is no ``remote`` and the shard is not in ``local``.
        """
        # The parent would first mark the shard as under way for all workers and then fail in this one alone, which
        # leaves the others waiting for ever. Without a remote nothing can bring the file back: all may fail at once.
        if not self.streams[0].remote and not any(os.path.isfile(path) for path in self._files(shard_id)):
            raise FileNotFoundError(f'{self._files(shard_id)[0]}: this shard is missing')
        super().prepare_shard(shard_id, blocking)

    def on_exception(self, future: Future) -> None:
        """Called at the end of each background thread: remembers what stopped it, for ``__iter__`` to raise."""
        self._failure = self._failure or future.exception()
        try:
            super().on_exception(future)  # tells the other threads to stop, then raises again
        except Exception:
            # Raised from here it would only reach a log line of concurrent.futures.
            assert self._failure is not None

    def __iter__(self) -> Iterator[Sample]:
        """This rank's (and worker's) samples of one epoch.

        Raises:
            RuntimeError: A shard could not be fetched or read, in this epoch or an earlier one; names it and how many
                samples came before.
        """
        delivered = 0
        # A reader that failed once stays failed: the parent would wait for ever for the threads of the lost epoch.
        if self._failure is None:
            try:
                for sample in super().__iter__():
                    delivered += 1
                    yield sample
            except Exception as error:
                self._failure = self._failure or error
        if self._failure is not None:
            raise RuntimeError(
                f'{self.streams[0].local}: reading stopped in mid-epoch after {delivered} samples of this process: '
                f'{type(self._failure).__name__}: {self._failure}. Restore the data (compare it with its index: '
                f'check_shards(folder, manifest, hashes=True)), then resume from the last checkpoint'
            ) from self._failure

    def _files(self, shard_id: int) -> list[str]:
        """Paths of a shard: as it is, then compressed where the index knows such a form."""
        stream, shard = self.streams[0], self.shards[shard_id]
        names = [info.basename for pair in shard.file_pairs for info in pair if info is not None]
        return [os.path.join(stream.local, stream.split or '', name) for name in names]


class _Rows(Dataset):
    """The same samples by position and with a length: what a DistributedSampler needs to give each exactly once."""

    def __init__(self, dataset: LatentDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return self.dataset.size  # the length of the streaming data set itself is that of one rank's share

    def __getitem__(self, index: int) -> Sample:
        return self.dataset[int(index)]


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
        local: Folder of the split.
        batch_size: Samples per rank and batch; a last batch with fewer is dropped.
        num_workers: Reading processes per rank.
        shuffle: Whether each epoch has an order of its own.
        worker_timeout: Seconds to wait for a worker's batch where there is a ``remote``: when a fetch fails in one
            worker, others may wait for the same shard for ever.
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
    timeout = worker_timeout if num_workers and dataset_arguments.get('remote') else 0
    return DataLoader(dataset, batch_size=batch_size, drop_last=True, timeout=timeout, **_loader_arguments(num_workers))


def eval_loader(
    local: str | os.PathLike[str], *, batch_size: int, num_workers: int = 0, **dataset_arguments: Any
) -> DataLoader:
    """Batches for evaluation: every sample exactly once over all ranks, in file order.

    The sampler repeats samples to give all ranks equal shares, and Composer drops those again when it evaluates.
    Without Composer's Trainer, drop them by ``sample_ids``.

    Args:
        local: Folder of the split.
        batch_size: Samples per rank and batch; the last one may have fewer.
        num_workers: Reading processes per rank.
        **dataset_arguments: Further arguments of ``LatentDataset``.
    """
    rows = _Rows(LatentDataset(local, batch_size=batch_size, **dataset_arguments))
    sampler = dist.get_sampler(rows, shuffle=False, drop_last=False)
    return DataLoader(rows, batch_size=batch_size, sampler=sampler, **_loader_arguments(num_workers))


def _loader_arguments(num_workers: int) -> dict[str, Any]:
    # Workers that live on keep their open shards; the epoch's place travels in shared memory, not with the process.
    return {
        'num_workers': num_workers,
        'persistent_workers': num_workers > 0,
        'pin_memory': torch.cuda.is_available(),
    }
