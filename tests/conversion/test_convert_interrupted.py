"""Conversions that are killed, watched by others, run on several ranks, or run out of disk: in own processes."""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from tests.conversion import test_importers as importers
from tests.conversion.worlds import SCRIPT, digests, make_images, manifest, read, words
from tests.runs import COMPOSER, launch
from tests.warm import exit_codes, rank_variables, start, wait_until
from tread_composer.cli.convert import convert_main, import_main, merge_main

IMAGES, SMALL_PARTS = 40, {'part_size': 2, 'batch_size': 2}


@pytest.fixture(scope='module')
def undisturbed(source, vae, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('undisturbed') / 'out'
    assert convert_main(words(source, out, vae, **SMALL_PARTS)) == 0
    return out


def in_own_process(
    arguments: list[str], log: Path, command: Callable[..., int] = convert_main, **variables: str
) -> BaseProcess:
    """The command in a process that can be killed; what it prints goes to ``log``."""
    return start(run_command, command, arguments, log, variables)


def run_command(command: Callable[..., int], arguments: list[str], log: Path, variables: dict[str, str]) -> None:
    os.environ.update(variables)
    sys.stdout = sys.stderr = open(log, 'a', buffering=1)  # noqa: SIM115
    os._exit(command(arguments))


def kill(process: BaseProcess) -> None:
    process.kill()
    process.join()


@contextlib.contextmanager
def two_ranks(arguments: list[str], folder: Path) -> Iterator[list[BaseProcess]]:
    """As the launcher would start them; none is left behind."""
    each = enumerate(rank_variables(2))
    ranks = [in_own_process(arguments, folder / f'log{rank}', **variables) for rank, variables in each]
    try:
        yield ranks
    finally:
        for process in ranks:
            kill(process)


def parts(out: Path) -> list[Path]:
    """The finished ones of the training split."""
    return list((out / 'train').glob('0*'))


def assert_only_whole_parts(out: Path) -> None:
    for part in parts(out):
        for shard in json.loads((part / 'index.json').read_text())['shards']:
            assert (part / shard['raw_data']['basename']).stat().st_size == shard['raw_data']['bytes']
        assert json.loads((part / 'part.json').read_text())['samples'] == 2


def test_killed_again_and_again_it_ends_with_the_same_bytes(source, vae, undisturbed, tmp_path):
    """With a decoding worker, which outlives its parent for seconds and must not keep the lock."""
    out, log, delays = tmp_path / 'out', tmp_path / 'log', random.Random(0)
    arguments = words(source, out, vae, **SMALL_PARTS, workers=1)
    states = []
    for kills in range(9):
        process = in_own_process(arguments, log)
        at_least = min(2 * kills, 19)  # never in the same place
        wait_until(lambda n=at_least: len(parts(out)) > n, process)
        time.sleep(delays.uniform(0, 0.02))
        kill(process)
        assert 'another conversion' not in log.read_text()
        assert_only_whole_parts(out)
        states.append((len(parts(out)), len(list((out / 'train').glob('.writing-*')))))
    assert any(0 < done < 20 for done, _ in states) and any(unfinished for _, unfinished in states), states
    assert convert_main(arguments) == 0
    assert digests(out) == digests(undisturbed)


def an_import(folder: Path) -> tuple[Callable[..., int], list[str]]:
    words = [*importers.source(folder, 'lightningdit'), *importers.COMMON, '--split', 'train']
    return import_main, words


def a_merge(folder: Path) -> tuple[Callable[..., int], list[str]]:
    for seed in (0, 1):
        images = make_images(folder / f'in{seed}', 20, seed=seed)
        for path in images.glob('*/*'):  # no name twice
            path.rename(path.with_name(f'{seed}{path.name}'))
        assert convert_main(words(images, folder / str(seed), None)) == 0
    return merge_main, [str(folder / '0'), str(folder / '1')]


@pytest.mark.parametrize('prepare', [an_import, a_merge])
def test_a_killed_import_or_merge_goes_on_and_is_never_joined_by_another(prepare, tmp_path, refused):
    command, arguments = prepare(tmp_path)
    arguments, out = [*arguments, '--part-size', '1', '--out'], tmp_path / 'out'
    assert command([*arguments, str(tmp_path / 'whole')]) == 0
    process = in_own_process([*arguments, str(out)], tmp_path / 'log', command)
    wait_until(lambda: len(parts(out)) > 3, process)
    os.kill(process.pid, signal.SIGSTOP)
    refused(command, [*arguments, str(out)], 'being written by another conversion')
    kill(process)
    assert 3 < len(parts(out)) < len(parts(tmp_path / 'whole')) and not (out / 'train' / 'manifest.json').exists()
    assert command([*arguments, str(out)]) == 0 and digests(out) == digests(tmp_path / 'whole')


def test_killed_while_starting(source, vae, undisturbed, tmp_path):
    out = tmp_path / 'out'
    for path in (out, out / '.lock', out / '.conversion', out / 'conversion.json', out / 'train'):
        process = in_own_process(words(source, out, vae, **SMALL_PARTS), tmp_path / 'log')
        wait_until(path.exists, process)
        kill(process)
        if path.name == '.lock':  # while it wrote its record
            (out / '.unfinished-conversion.json.x1').write_text('{"half')
    assert convert_main(words(source, out, vae, **SMALL_PARTS)) == 0
    assert digests(out) == digests(undisturbed)


@pytest.mark.parametrize('last', ['parts', 'unreadable.json', 'index.json', 'manifest.json'])
def test_killed_while_merging(source, vae, undisturbed, tmp_path, last):
    """What a kill after ``last`` leaves, and the halves of files that it may leave besides."""
    out = tmp_path / 'out'
    shutil.copytree(undisturbed, out)
    steps = ['parts', 'unreadable.json', 'index.json', 'manifest.json']
    for name in steps[steps.index(last) + 1 :]:
        (out / 'train' / name).unlink()
    (out / '.conversion').mkdir()
    if last != 'manifest.json':  # written before it, and removed by the next start
        for name in ('.manifest.json.x1', '.index.json.partial', '.unreadable.json.x2'):
            (out / 'train' / name).write_text('{"half')
        (out / 'train' / '.writing-00003-77-x').mkdir()
        (out / 'train' / '.writing-00003-77-x' / 'shard.00000.mds').write_text('half')
    assert convert_main(words(source, out, vae, **SMALL_PARTS)) == 0
    assert digests(out) == digests(undisturbed) and not (out / '.conversion').exists()


def test_a_second_writer_is_refused(source, vae, undisturbed, tmp_path, refused):
    out = tmp_path / 'out'
    first = in_own_process(words(source, out, vae, **SMALL_PARTS), tmp_path / 'log')
    wait_until(lambda: len(parts(out)) > 2, first)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        assert first.is_alive()
        busy = f'being written by another conversion (host {socket.gethostname()}, process {first.pid})'
        refused(convert_main, words(source, out, vae, **SMALL_PARTS), busy)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0 and digests(out) == digests(undisturbed)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', folder], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f'a small disk needs a mount, which is refused here: {done.stderr.strip()}')
    try:
        yield folder
    finally:
        subprocess.run(['umount', '-l', folder], check=True)


def test_a_disk_that_is_too_small_or_fills_up(source, vae, tmp_path, refused):
    whole = tmp_path / 'whole'
    options = {'resolution': 64, 'part_size': 2, 'batch_size': 2}
    assert convert_main(words(source, whole, vae, **options)) == 0
    with small_disk(tmp_path / 'disk', '8m') as disk:
        too_large = words(source, disk / 'out', vae, resolution=512)
        refused(convert_main, too_large, match=r'need [\d.]+ MB, and 8.38 MB are free')
        assert not any(disk.iterdir())
        out, filler = disk / 'out', disk / 'filler'

        def fill() -> None:
            wait_until((out / 'train' / '00002').exists)
            with contextlib.suppress(OSError), open(filler, 'wb', buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))

        thread = threading.Thread(target=fill)
        thread.start()
        full = ('No space left on device', 'run the same command again')
        refused(convert_main, words(source, out, vae, **options), *full)
        thread.join()
        assert 3 <= len(parts(out)) < 20 and not list((out / 'train').glob('.writing-*'))
        filler.unlink()
        assert convert_main(words(source, out, vae, **options)) == 0
        assert digests(out) == digests(whole)


def test_two_ranks_write_what_one_does_by_the_documented_command(source, vae, undisturbed, tmp_path):
    done = launch(tmp_path, [COMPOSER, '-n', '2', SCRIPT, *words(source, tmp_path / 'out', vae, **SMALL_PARTS)])
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'rank 0 made 20 images' in done.stdout and f'train: {IMAGES} samples' in done.stdout
    assert digests(tmp_path / 'out') == digests(undisturbed)


def test_a_rank_that_fails_ends_the_others_with_its_message(vae, tmp_path):
    source = make_images(tmp_path / 'in', IMAGES)
    arguments = words(source, tmp_path / 'out', vae, **SMALL_PARTS)
    plain = words(source, tmp_path / 'plain', vae, **SMALL_PARTS, max_unreadable=0.1)
    assert convert_main(plain) == 0
    # The last part is rank 1's, and rank 0 has long finished its own when it fails there.
    (source / read(tmp_path / 'plain' / 'train')['name'][-1]).write_text('no image')
    with two_ranks(arguments, tmp_path) as ranks:
        ranks[0].join()
        assert ranks[0].exitcode == 2
        said = (tmp_path / 'log0').read_text()
        assert said.count('on rank 1: train: 1 images so far are unreadable') == 1 and 'Traceback' not in said
    with two_ranks([*arguments, '--max-unreadable', '0.1'], tmp_path) as ranks:
        assert exit_codes(ranks) == [0, 0]
    assert manifest(tmp_path / 'out' / 'train')['num_samples'] == IMAGES - 1


def test_a_rank_that_outlives_its_killed_run_does_no_harm(source, vae, undisturbed, tmp_path):
    out = tmp_path / 'out'
    arguments = words(source, out, vae, **SMALL_PARTS)
    with two_ranks(arguments, tmp_path) as ranks:
        wait_until(lambda: len(parts(out)) > 3, ranks[1])
        os.kill(ranks[1].pid, signal.SIGSTOP)
        kill(ranks[0])
        assert convert_main(arguments) == 0
        os.kill(ranks[1].pid, signal.SIGCONT)
        ranks[1].join()
        # It could neither finish, if it was within a part, nor meet the others, if it was not.
        log = (tmp_path / 'log1').read_text()
        ends = {1: 'No such file or directory', 2: 'lost the connection to another rank'}
        assert ends[ranks[1].exitcode] in log, log
    assert digests(out) == digests(undisturbed)


def test_refused_on_several_ranks_it_says_so_once_and_writes_nothing(source, vae, tmp_path):
    with two_ranks(words(source, tmp_path / 'out', vae, held_out=IMAGES), tmp_path) as ranks:
        ranks[0].join()
        assert ranks[0].exitcode == 2 and 'hold out fewer' in (tmp_path / 'log0').read_text()
        assert 'hold out fewer' not in (tmp_path / 'log1').read_text()  # the launcher stops it while it waits
        assert not (tmp_path / 'out').exists()


def test_an_upload_that_is_killed_goes_on(source, vae, undisturbed, tmp_path):
    remote, work = tmp_path / 'remote', tmp_path / 'work'
    arguments = words(source, f'file://{remote}', vae, **SMALL_PARTS, work=work)
    for at_least in (3, 9):
        process = in_own_process(arguments, tmp_path / 'log')
        wait_until(lambda n=at_least: len(parts(work)) > n, process)
        kill(process)
        assert not (remote / 'train' / 'index.json').exists()
    assert convert_main(arguments) == 0
    here, there = read(undisturbed / 'train'), read(remote / 'train')
    assert here['name'] == there['name'] and not list(work.rglob('*.mds'))
    np.testing.assert_array_equal(here['latents'], there['latents'])


def test_an_upload_that_fails_is_named_and_goes_on_later(source, vae, tmp_path, refused):
    remote, work = tmp_path / 'remote', tmp_path / 'work'
    remote.mkdir()
    (remote / 'train').write_text('a file where a folder should be')
    arguments = words(source, f'file://{remote}', vae, **SMALL_PARTS, work=work)
    refused(convert_main, arguments, f'{remote}/train/00000', 'upload failed')
    assert not list((work / 'train').iterdir())
    (remote / 'train').unlink()
    assert convert_main(arguments) == 0 and (remote / 'train' / 'manifest.json').exists()
