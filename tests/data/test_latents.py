import itertools
import os
import re
import shutil
import tempfile
import threading
import time
import warnings
from concurrent.futures import Future
from itertools import chain
from pathlib import Path

import pytest
import torch
from streaming.base.partition import get_partitions
from streaming.base.shared import SharedMemory
from torch.utils.data import DataLoader

from tests.data.worlds import (
    SAMPLES,
    evaluated_ids,
    flip_last_byte,
    read_all,
    read_and_wait,
    read_epochs,
    refusal_of_a_cache,
    register_together,
    write_shards,
)
from tests.warm import exit_codes, on_ranks, start, wait_until
from tread_composer.core.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.data.latents import LatentDataset
from tread_composer.data.loaders import eval_loader, train_loader


def test_samples_hold_what_was_written_and_where(split: Path):
    dataset = LatentDataset(split, batch_size=8)
    for batch in train_loader(split, batch_size=16):
        assert torch.equal(batch[RAW_LATENTS][:, 0, 0, 0].long(), batch[SAMPLE_IDS] + 1)
        assert torch.equal(batch[LABELS], batch[SAMPLE_IDS] % 3)
    for index, sample in [(0, dataset[0]), (7, dataset[7]), (199, dataset[-1]), (31, dataset[30:32][1])]:
        assert sample[SAMPLE_IDS] == index
        assert sample[LABELS] == index % 3
        assert sample[LABELS].dtype == sample[SAMPLE_IDS].dtype == torch.int64
        assert torch.equal(sample[RAW_LATENTS], torch.full((1, 4, 6), index + 1, dtype=torch.float16))
    torch.set_warn_always(True)  # else torch warns of memory that must not be written to once in a process
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        dataset[3][RAW_LATENTS].add_(1)
    torch.set_warn_always(False)


def test_the_order_is_the_same_for_any_number_of_workers_and_new_each_epoch(split: Path):
    orders = [read_epochs(split, 16, num_workers, epochs=2) for num_workers in (0, 1, 2)]
    assert orders[0] == orders[1] == orders[2]
    first, second = orders[0]
    assert len(first) == SAMPLES // 16
    assert first != second
    ids = list(chain.from_iterable(first))
    assert len(set(ids)) == len(ids)
    assert read_epochs(split, 16, shuffle_seed=1)[0] != first
    assert read_epochs(split, 16, shuffle=False)[0][0] == list(range(16))


@pytest.mark.parametrize('nodes', [2, 4])
def test_global_batches_are_the_same_sets_on_any_number_of_nodes(split: Path, nodes: int):
    # Several nodes cannot be had on one machine, so this asks the library's own partitioning with our default.
    canonical = LatentDataset(split, batch_size=8).num_canonical_nodes
    alone = get_partitions('relaxed', SAMPLES, canonical, 1, 1, 1, 8)[0, 0, 0]
    split_up = get_partitions('relaxed', SAMPLES, canonical, nodes, 1, 1, 8 // nodes)[:, 0, 0].transpose(1, 0, 2)
    assert sorted(alone.flatten()) == list(range(SAMPLES))  # none twice
    assert [sorted(batch.flatten()) for batch in split_up] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_evaluation_sees_every_sample_once(split: Path, tmp_path: Path, world_size: int):
    ranks = on_ranks(world_size, evaluated_ids, split, 16)
    assert sorted(chain.from_iterable(ranks)) == list(range(SAMPLES))


def test_evaluation_reads_in_file_order_with_workers_too(split: Path):
    for num_workers in (0, 2):
        batches = [batch[SAMPLE_IDS].tolist() for batch in eval_loader(split, batch_size=64, num_workers=num_workers)]
        assert [len(batch) for batch in batches] == [64, 64, 64, 8]
        assert list(chain.from_iterable(batches)) == list(range(SAMPLES))


def failure_of(loader: DataLoader) -> str:
    # Not pytest.raises: it keeps the traceback, so that workers end in a garbage collection, which takes 5 s for each.
    try:
        for _ in loader:
            pass
    except Exception as error:
        return str(error)
    return 'none: the epoch just ended'


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_shard_lost_after_the_start_is_an_error_not_a_short_epoch(split: Path, num_workers: int):
    loader = train_loader(split, batch_size=8, num_workers=num_workers)
    (split / 'shard.00004.mds').unlink()
    said = re.compile(r'(?s)stopped in mid-epoch after \d+ samples.*shard.00004.mds.*Restore')
    assert said.search(failure_of(loader))
    if num_workers == 0:  # and so is the next epoch
        assert said.search(failure_of(loader))


def test_a_shard_cut_short_is_an_error(split: Path):
    shard = split / 'shard.00004.mds'
    shard.write_bytes(shard.read_bytes()[:-10])
    loader = train_loader(split, batch_size=8)
    assert re.search(r'shard.00004.mds: \d+ bytes, the index says \d+', failure_of(loader))


@pytest.mark.parametrize('loader', [train_loader, eval_loader])
def test_a_damaged_compressed_shard_stops_all_workers(split: Path, tmp_path: Path, loader):
    for shard in write_shards(tmp_path / 'zip', compression='zstd:1').glob('*.zstd'):
        content = bytearray(shard.read_bytes())
        content[20:60] = bytes(40)
        shard.write_bytes(content)
    failed = failure_of(loader(tmp_path / 'zip', batch_size=8, num_workers=2, worker_timeout=30))
    assert 'none' not in failed and 'timed out' not in failed, failed


class LosesARemote(LatentDataset):
    """Loses its remote and its disk at once: the reading and the fetching thread both fail."""

    fetching_failed = False

    def on_exception(self, future: Future) -> None:
        self.fetching_failed |= future.exception() is not None
        super().on_exception(future)

    def get_item(self, sample_id: int, retry: int = 7):
        if sample_id == 90:
            for shard in range(5, 8):
                os.unlink(os.path.join(self.streams[0].remote, f'shard.0000{shard}.mds'))
        for _ in range(100 if self.spanner[sample_id + 4][0] == 5 else 0):
            time.sleep(0.01)
            if self.fetching_failed:
                raise OSError('the disk is gone')
        return super().get_item(sample_id, retry)


def test_a_reader_that_failed_in_two_threads_fails_in_every_later_epoch_too(split: Path, tmp_path: Path):
    remote = {'remote': str(split), 'predownload': 1, 'download_retry': 1}
    loader = DataLoader(LosesARemote(tmp_path / 'cache', batch_size=8, **remote), batch_size=8)
    first, second = failure_of(loader), failure_of(loader)
    assert re.search(r'(?s)stopped in mid-epoch after 1\d\d samples.*shard.00005.mds', first), first
    assert re.search(r'(?s)stopped in mid-epoch after 0 samples.*shard.00005.mds', second), second


def test_a_lost_shard_is_an_error_in_evaluation_and_in_the_remote(split: Path, tmp_path: Path):
    loader = eval_loader(split, batch_size=8)
    (split / 'shard.00004.mds').unlink()
    with pytest.raises(FileNotFoundError, match=r'shard.00004.mds'):
        list(loader)
    loader = train_loader(tmp_path / 'cache', batch_size=8, remote=str(split), download_retry=1)
    with pytest.raises(RuntimeError, match=r'shard.00004.mds'):
        list(loader)


class BothFail(LatentDataset):
    """Both reading threads see that the first shard is absent, try to fetch it in turn, and fail together."""

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        self.both.wait(timeout=60)  # a thread that came later would see it under way and skip it
        try:
            with self.turn:
                super().prepare_shard(shard_id, blocking)
        except Exception:
            self.both.wait(timeout=60)
            raise


def test_both_reading_threads_may_fail_at_one_shard(split: Path, tmp_path: Path):
    """The reader waited for ever then."""
    (split / 'shard.00000.mds').unlink()
    dataset = BothFail(tmp_path / 'cache', remote=str(split), batch_size=8, download_retry=1)
    dataset.both, dataset.turn = threading.Barrier(2), threading.Lock()
    with pytest.raises(RuntimeError, match=r'shard.00000.mds'):
        list(dataset)


@pytest.mark.parametrize('algorithm', ['xxh64', 'sha1'])
def test_a_hash_that_differs_or_is_absent_is_an_error(split: Path, tmp_path: Path, algorithm: str):
    shard = split / 'shard.00004.mds'
    flip_last_byte(shard)
    loader = train_loader(tmp_path / 'cache', batch_size=8, remote=str(split), validate_hash=algorithm)
    with pytest.raises(RuntimeError, match='stopped in mid-epoch'):
        list(loader)
    dataset = LatentDataset(tmp_path / 'other', batch_size=8, remote=str(split), validate_hash=algorithm)
    for _ in range(2):  # the second time too: the bad copy is not kept
        with pytest.raises(ValueError, match=r'Checksum failure|Hash algorithm `sha1`'):
            dataset.prepare_shard(4)
        assert not (tmp_path / 'other' / shard.name).exists()
    flip_last_byte(shard)  # as it was
    if algorithm == 'xxh64':
        dataset.prepare_shard(4)
        assert (tmp_path / 'other' / shard.name).read_bytes() == shard.read_bytes()


def test_a_cache_without_room_and_an_epoch_without_a_batch_are_refused(split: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r'data\.cache_limit: 5kb: .*cache'):
        train_loader(tmp_path / 'cache', batch_size=8, remote=str(split), cache_limit='5kb')
    with pytest.raises(ValueError, match='200 samples are no full batch of 201'):
        train_loader(split, batch_size=201)


def test_fetched_data_are_read_in_the_order_of_local_data(split: Path, tmp_path: Path):
    fetched = read_epochs(tmp_path / 'cache', 16, remote=str(split), validate_hash='xxh64')
    assert fetched == read_epochs(split, 16)


@pytest.mark.parametrize('with_remote', [False, True])
def test_a_killed_run_does_not_keep_the_next_one_from_starting(split: Path, tmp_path: Path, with_remote: bool):
    remote = str(split) if with_remote else None
    local = tmp_path / 'cache' if with_remote else split
    before = set(os.listdir('/dev/shm'))
    living = train_loader(split, batch_size=4)
    of_living = set(os.listdir('/dev/shm')) - before
    killed = start(read_and_wait, local, remote, tmp_path / 'ready')
    assert wait_until((tmp_path / 'ready').exists, killed)
    left = set(os.listdir('/dev/shm')) - before - of_living
    killed.kill()
    killed.join()
    assert len(left) > 5
    assert exit_codes([start(read_all, local, remote, tmp_path / 'result')]) == [0]
    assert (tmp_path / 'result').read_text() == str(SAMPLES)
    another = train_loader(split, batch_size=4)  # not under the killed one's number: its tracker may not be done
    assert len(list(another)) == SAMPLES // 4
    assert not left & set(os.listdir('/dev/shm'))  # what the killed one left is gone
    assert of_living <= set(os.listdir('/dev/shm')) and len(list(living)) == SAMPLES // 4  # and nobody else's
    shutil.rmtree(tmp_path / 'cache', ignore_errors=True)


@pytest.mark.parametrize('own_temporary_folders', [False, True])
def test_runs_that_start_at_the_same_moment_do_not_take_each_others_number(
    split: Path, tmp_path: Path, own_temporary_folders: bool
):
    moment = time.time() + 2
    folders = [tmp_path / f'tmp{index}' if own_temporary_folders else None for index in range(4)]
    assert exit_codes([start(register_together, split, moment, 12, folder) for folder in folders]) == [0] * 4


def test_a_number_is_free_only_if_all_its_names_are(split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One job is ending (its locals are gone, its barrier is not), the next one has begun with its locals alone.

    streaming then sees gaps at different numbers, and the largest of them is the second job's: FileExistsError.
    """
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))  # without the lock files of earlier runs
    number = next(number for number in itertools.count() if not list(Path('/dev/shm').glob(f'{number:06}_*')))
    ending = SharedMemory(f'{number:06}_barrier', True, 8)
    begun = SharedMemory(f'{number + 1:06}_locals', True, 8)
    dataset = LatentDataset(split, batch_size=4)
    assert not Path(f'/dev/shm/{number:06}_locals').exists()
    assert len(list(dataset)) == SAMPLES
    del ending, begun


def test_two_launchers_of_one_job_on_one_machine_do_not_wait_for_each_other(split: Path, tmp_path: Path):
    """Each has a first rank that takes a number, and both are in the barriers of one job."""
    ranks = on_ranks(4, read_epochs, split, 12, nodes=2)
    (expected,) = read_epochs(split, 12)
    for batch, rows in enumerate(expected):
        assert sorted(rows) == sorted(row for (epoch,) in ranks for row in epoch[batch])


def test_a_cache_in_use_is_refused_on_all_ranks(split: Path, tmp_path: Path):
    """Not on the first rank of the node alone, for which the others would wait."""
    cache = str(tmp_path / 'cache')
    used = train_loader(cache, batch_size=4, remote=str(split))
    messages = on_ranks(2, refusal_of_a_cache, cache, str(split))
    assert f'{cache}: another data set fetches into this folder' in messages[0]
    assert messages[0] == messages[1]
    del used
