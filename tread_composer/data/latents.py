"""The streaming reader of a latents data set; ``data.loaders`` makes batches of it.

Composer's distributed state must be initialised before it is built: mosaicml-streaming would otherwise start a process
group of its own, and Composer's start would then hang.
Legend: C channels, H x W latent pixels.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState
from streaming.base.format.mds.encodings import get_mds_encoded_size
from streaming.base.format.mds.reader import MDSReader
from torch import Tensor
from torch.utils.data import default_collate

from tread_composer.core.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME
from tread_composer.data.manifest import MANIFEST_NAME
from tread_composer.data.registration import numbered_in_turn

__all__ = ['LatentDataset', 'ReadingError', 'mirror_choices']

Sample = dict[str, Tensor]


def mirror_choices(seed: int, epoch: int, num_samples: int) -> NDArray[np.bool_]:
    """Which samples an epoch takes mirrored, each with probability 1/2: bool ``[num_samples]`` by position."""
    # The generator's raw bits: numpy keeps those from version to version, the derived distributions it may change.
    raw = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(num_samples // 64 + 1)
    return np.unpackbits(raw.astype('<u8').view(np.uint8), count=num_samples).astype(bool)


class ReadingError(UserError, RuntimeError):
    """Data cannot be read, or are not what they say, in the middle of an epoch."""


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
        mirror_seed: With it, iterating takes the latents of the mirrored image in place of the image's with
            probability 1/2, decided by (seed, epoch, sample); the data must hold both. None takes the image always,
            and so does indexing before the first epoch.
        num_canonical_nodes: How many paths through the shards the order is made of. With 1 an epoch has no repeated
            samples and the order is the same for any number of ranks, on one node or many; the price is that every
            node visits every shard. Raise it (to the number of nodes) where a node must not fetch all of ``remote``.
        validate_hash: Hash to check fetched shards with, e.g. ``'xxh64'``. Only fetched shards are ever checked.
        num_classes: With it, a sample of another class is refused when it is read; 0 knows only label 0.
        **settings: Of its parent: ``shuffle``, ``shuffle_seed``, ``predownload``, ``cache_limit``, ``download_...``.

    Raises:
        ValueError: ``mirror_seed`` is given and the data hold no mirrored latents.
        UserError: ``cache_limit`` has no room for the shards that are in use together.
    """

    def __init__(
        self,
        local: str | os.PathLike[str],
        *,
        batch_size: int,
        remote: str | None = None,
        mirror_seed: int | None = None,
        num_canonical_nodes: int = 1,
        validate_hash: str | None = None,
        num_classes: int | None = None,
        **settings: Any,
    ) -> None:
        self.num_classes = num_classes
        self.mirror_seed = mirror_seed
        self._mirrored: NDArray[np.bool_] | None = None  # of the epoch that is being iterated
        self._failure: BaseException | None = None
        self._delivered = 0  # of this epoch, by this process
        self._prepared: set[int] = set()  # shards that are readable and stay so
        local, cache_limit = os.fspath(local), settings.get('cache_limit')
        settings |= {'validate_hash': validate_hash if remote else None, 'num_canonical_nodes': num_canonical_nodes}
        try:
            with numbered_in_turn():
                super().__init__(local=local, remote=remote, batch_size=batch_size, **settings)
        except ValueError as error:
            if isinstance(error, UserError) or cache_limit is None or 'cache' not in str(error).lower():
                raise
            raise UserError(f'{local}: data.cache_limit: {cache_limit}: {error}') from error
        names = [name for name in (LABEL, LATENTS, LATENTS_MIRRORED) if name in self.shards[0].column_names]
        # A mapped file keeps its space on the disk after it is deleted: with a limit, shards come and go.
        self._may_map = not self.cache_limit and all(MappedShard.can_map(shard, names) for shard in self.shards)
        self._maps: dict[int, MappedShard] = {}
        if mirror_seed is not None and LATENTS_MIRRORED not in self.shards[0].column_names:
            raise ValueError(
                f'{local}: mirror_seed={mirror_seed}, but these data hold no mirrored latents; a latent cannot be '
                f'mirrored afterwards: convert the images again with their mirrors, or train without'
            )

    def get_item(self, sample_id: int, retry: int = 7) -> Sample:
        """The sample at a position; fetches its shard if need be. ``UserError`` if its label is no class."""
        latents, label = self._chosen(sample_id, retry)
        return {
            # The array is a view of bytes that must not be written to; torch wants one that may.
            RAW_LATENTS: torch.from_numpy(latents.copy()),
            LABELS: torch.tensor(label, dtype=torch.int64),
            SAMPLE_IDS: torch.tensor(int(sample_id), dtype=torch.int64),
        }

    def name_of(self, sample_id: int) -> str:
        """The name of the image that a sample was made of; the empty text where the data have none."""
        return str(super().get_item(sample_id).get(NAME, ''))

    def _chosen(self, sample_id: int, retry: int = 7) -> tuple[NDArray[np.float16], int]:
        """Latents of the image or of its mirror, as the epoch has it (not to be written to), and the label."""
        latents, label = self._row(sample_id, retry)
        # The number of classes is the null label: one too many would train the model without a class.
        if self.num_classes is not None and not 0 <= label < max(self.num_classes, 1):
            raise UserError(
                f'sample {sample_id} ({self.name_of(sample_id)!r}) has the label {label}, and {MANIFEST_NAME} says '
                f'num_classes={self.num_classes} (labels begin at 0): convert the images again'
            )
        return latents, label

    def _row(self, sample_id: int, retry: int) -> tuple[NDArray[np.float16], int]:
        mirrored = self._mirrored is not None and self._mirrored[sample_id]
        name = LATENTS_MIRRORED if mirrored else LATENTS
        if not self._may_map:
            row = super().get_item(sample_id, retry)
            return row[name], int(row[LABEL])
        shard_id, number = self.spanner[sample_id]
        shard = self._maps.get(shard_id)
        if shard is None:
            # First: what is being fetched may stand there under its name before it is whole.
            self.prepare_shard(shard_id)
            try:
                shard = MappedShard(self.shards[shard_id])
            except FileNotFoundError:  # gone since
                self._prepared.discard(shard_id)
                self.prepare_shard(shard_id)
                shard = MappedShard(self.shards[shard_id])
            self._maps[shard_id] = shard
        return shard.array(number, name), int(shard.array(number, LABEL))

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Make a shard readable; ``FileNotFoundError`` if there is no ``remote`` and it is not in ``local``."""
        # It is asked for every sample, and the parent takes a lock between all workers each time.
        if shard_id in self._prepared:
            return
        # The parent would first mark the shard as under way for all workers and then fail in this one alone, which
        # leaves the others waiting for ever. Without a remote nothing can bring the file back: all may fail at once.
        if not self.streams[0].remote and not any(os.path.isfile(path) for path in self._files(shard_id)):
            raise FileNotFoundError(f'{self._files(shard_id)[0]}: this shard is missing')
        try:
            super().prepare_shard(shard_id, blocking)
        except BaseException as error:
            if isinstance(error, ValueError) and self.streams[0].validate_hash:
                # Fetched and not right: the next run would take what lies there without a check.
                for path in self._files(shard_id):
                    Path(path).unlink(missing_ok=True)
            # The parent leaves it marked as under way, and other workers would wait for it without end.
            if self._shard_states[shard_id] == _ShardState.PREPARING:
                self._shard_states[shard_id] = _ShardState.REMOTE
            raise
        # With a limit it may go again; without blocking another worker may still be at it.
        if not self.cache_limit and self._shard_states[shard_id] == _ShardState.LOCAL:
            self._prepared.add(shard_id)

    def on_exception(self, future: Future) -> None:
        """Called at the end of each background thread: remembers what stopped it, for ``__iter__`` to raise."""
        self._failure = self._failure or future.exception()
        if future.exception() is not None:
            # The parent's reader waits until two of its threads have ended, and does not count one that failed: where
            # both had failed at the same shard, it waited for ever.
            self._iterator.on_exit()
        try:
            super().on_exception(future)  # tells the other threads to stop, then raises again
        except Exception:
            # Raised from here it would only reach a log line of concurrent.futures.
            assert self._failure is not None

    def __iter__(self) -> Iterator[Sample | int]:
        """One epoch of this rank (and worker), for ``collate``: positions, or samples where shards are fetched.

        Raises:
            ReadingError: A shard could not be fetched or read, in this epoch or an earlier one; names it and how many
                samples came before.
        """
        self._delivered = 0
        # A reader that failed once stays failed: the parent would wait for ever for the threads of the lost epoch.
        if self._failure is None:
            try:
                # The parent's threads fetch shards ahead; with all of them here they would only slow the reading down.
                for item in super().__iter__() if self.streams[0].remote else self._positions():
                    self._delivered += 1
                    yield item
            except Exception as error:
                self._failure = self._failure or error
        if self._failure is not None:
            raise self._stopped(self._failure) from self._failure

    def collate(self, items: Sequence[Sample] | Sequence[int]) -> dict[str, Tensor]:
        """A batch of what iterating or indexing gives: ``[B, C, H, W]``, ``[B]`` and ``[B]``, keys as in a sample.

        Raises:
            ReadingError: A shard cannot be read, or a label is no class.
        """
        if isinstance(items[0], dict):
            return default_collate(list(items))
        try:
            rows = [self._chosen(int(sample_id)) for sample_id in items]  # type: ignore[arg-type]
        except Exception as error:
            self._failure = error
            self._delivered -= len(items)
            raise self._stopped(error) from error
        return {
            RAW_LATENTS: torch.from_numpy(np.stack([latents for latents, _ in rows])),
            LABELS: torch.tensor([label for _, label in rows], dtype=torch.int64),
            SAMPLE_IDS: torch.tensor(items, dtype=torch.int64),
        }

    def _stopped(self, error: BaseException) -> 'ReadingError':
        return ReadingError(
            f'{self.streams[0].local}: reading stopped in mid-epoch after {self._delivered} samples of this process: '
            f'{type(error).__name__}: {error}. Restore the data (compare it with its index: '
            f'streaming_data/verify.py), then resume from the last checkpoint'
        )

    def _positions(self) -> Iterator[int]:
        # What the parent does before it starts its threads.
        self._unique_worker_world = self._unique_rank_world.detect_workers()
        self._parallel_worker_world = self._parallel_rank_world.detect_workers()
        ids = self._get_work(*self._resume_incr_epoch())
        yield from ids[ids != -1].tolist()

    def _resume_incr_epoch(self) -> tuple[int, int]:
        # The one place where the parent says which epoch begins: its counter is in shared memory and moves under us.
        epoch, sample_in_epoch = super()._resume_incr_epoch()
        if self.mirror_seed is not None:
            self._mirrored = mirror_choices(self.mirror_seed, epoch, self.size)
        return epoch, sample_in_epoch

    def _files(self, shard_id: int) -> list[str]:
        """Paths of a shard: as it is, then compressed where the index knows such a form."""
        stream, shard = self.streams[0], self.shards[shard_id]
        names = [info.basename for pair in shard.file_pairs for info in pair if info is not None]
        return [os.path.join(stream.local, stream.split or '', name) for name in names]


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
