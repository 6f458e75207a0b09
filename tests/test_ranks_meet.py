"""Ranks of several nodes: they meet or say why not, find out that they differ, and end with their launcher."""

import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

from tests.runs import (
    ROOT,
    SMALL,
    assert_same_training,
    checkpoint,
    command,
    environment,
    launch,
    needs_namespaces,
    train,
)
from tests.warm import own_namespaces, rank_variables, start_program, wait_until

MEET = """
import os, sys, time
from tread_composer.core.errors import UserError
from tread_composer.io.ranks import gathered
from tread_composer.io.rendezvous import Rendezvous
os.environ.setdefault('RANK', '0')
try:
    ranks = Rendezvous(limit=float(sys.argv[1]))
    with ranks.refusals():
        if ranks.rank == 0 and 'refuse' in sys.argv:
            raise UserError('optimizer.lr: -1 is too small')
    ranks.join('gloo', 30.0)
    print('met', gathered(ranks.rank))
except UserError as error:
    print(f'refused: {error}')
    sys.exit(2)
"""


def as_nodes(
    words: Sequence[str], folder: Path, nodes: Sequence[int], own_disk: str | None = None, **extra: str
) -> list[Any]:
    """A command on nodes of one rank each; their results in the order of ``nodes``.

    Args:
        words: The command.
        folder: Where all run.
        nodes: Their numbers, of the two that each of them expects.
        own_disk: A folder within ``folder`` that is another, empty one on node 1.
        extra: Variables of the environment.
    """
    variables, processes, results = rank_variables(2, nodes=2), [], []
    for node in nodes:
        outputs, before = [folder / f'node{node}.{stream}' for stream in ('out', 'err')], None
        if own_disk and node == 1:
            disk = folder / own_disk
            before = functools.partial(own_namespaces, f'mkdir -p {disk}; mount -t tmpfs tmpfs {disk}')
        env = environment(**{**variables[node], **extra}, NODE=str(node))
        processes.append((start_program(words[1:], folder, env, outputs, before), outputs))
    for process, (out, err) in processes:
        process.join()
        results.append(subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text()))
    return results


def meet(folder: Path, *arguments: str, nodes: Sequence[int] = (0, 1), **extra: str) -> list[Any]:
    script = folder / 'meet.py'
    script.write_text(MEET)
    return as_nodes([sys.executable, str(script), *arguments], folder, nodes, **extra)


def test_ranks_meet(tmp_path):
    assert [(done.returncode, done.stdout) for done in meet(tmp_path, '60')] == [(0, 'met [0, 1]\n')] * 2


def test_a_refusal_of_the_first_rank_reaches_the_other_node_at_once(tmp_path):
    began = time.monotonic()
    results = meet(tmp_path, '200', 'refuse')
    assert [(done.returncode, done.stdout) for done in results] == [(2, 'refused: optimizer.lr: -1 is too small\n')] * 2
    assert time.monotonic() - began < 100  # far less than the limit of joining


@pytest.mark.parametrize(('present', 'text'), [(0, '1 of 2 ranks (1) at 127.0.0.1:'), (1, 'cannot be reached from')])
def test_a_node_that_never_comes_is_named(tmp_path, present, text):
    (done,) = meet(tmp_path, '2', nodes=[present])
    assert done.returncode == 2 and text in done.stdout and 'Traceback' not in done.stderr


def test_a_port_that_is_taken_is_named(tmp_path):
    with socket.socket() as taken:
        taken.bind(('0.0.0.0', 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        (done,) = meet(tmp_path, '5', nodes=[0], MASTER_PORT=port)
    assert done.returncode == 2 and f':{port}' in done.stdout and 'free port' in done.stdout


@pytest.mark.parametrize(
    ('changes', 'text'),
    [
        ({'WORLD_SIZE': 'two'}, "WORLD_SIZE='two' in the environment is no whole number"),
        ({'RANK': '-1'}, "RANK='-1' in the environment is no whole number"),
        ({'RANK': '2'}, 'RANK=2 in the environment does not go with WORLD_SIZE=2'),
        ({'LOCAL_RANK': '5'}, 'LOCAL_RANK=5 in the environment does not go with LOCAL_WORLD_SIZE=2'),
        ({'LOCAL_WORLD_SIZE': '4'}, 'LOCAL_WORLD_SIZE=4 in the environment does not go with WORLD_SIZE=2'),
        ({'WORLD_SIZE': '0', 'RANK': None, 'LOCAL_RANK': None, 'LOCAL_WORLD_SIZE': None}, "WORLD_SIZE='0' in"),
        ({'MASTER_ADDR': None}, 'WORLD_SIZE=2 in the environment, without MASTER_ADDR'),
        ({'MASTER_PORT': '70000'}, 'MASTER_PORT=70000 in the environment is no port'),
        ({'WORLD_SIZE': None, 'SLURM_STEP_ID': '0', 'SLURM_STEP_NUM_TASKS': '4'}, 'srun has started 4 tasks'),
    ],
)
def test_variables_of_a_launcher_that_contradict_each_other(monkeypatch, cli, changes, text):
    for name, value in {**rank_variables(2)[0], **changes}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert text in cli.refusal('plan', ROOT / 'yamls' / 'digits.yaml')


SHORT = ('run_name=a', 'loggers.mlflow=null')


@pytest.fixture(scope='module')
def one_node(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The checkpoint of two ranks on one node, trained in one piece."""
    folder = tmp_path_factory.mktemp('one_node')
    train(folder, 'digits_tread.yaml', *SHORT, ranks=2)
    return checkpoint(folder, 'a')


@pytest.mark.parametrize('own_disk', [None, pytest.param('runs', marks=needs_namespaces)])
def test_two_nodes_train_and_a_run_that_lost_a_node_goes_on_with_two_nodes_and_with_one(one_node, tmp_path, own_disk):
    """Node 1 dies after batch 5 and takes its disk along; to batch 12 on two nodes, to batch 14 on one of two ranks.

    With one disk, Composer's own start fails: each node removes the file that the other waits for. With a disk of its
    own, node 1 has no checkpoint to go on from: it is sent there.
    """
    yaml, often = ROOT / 'yamls' / 'digits_tread.yaml', (*SHORT, 'save_interval=2ba')
    words = command(yaml, *SMALL, *often, 'callbacks.lost_node={name: "tests.lost_node:LostNode"}')
    first, second = as_nodes(words, tmp_path, [0, 1], own_disk, LOST_AT='5')
    assert (first.returncode, second.returncode) == (2, -9), first
    assert 'rank 0 of 2 (host ' in first.stderr and 'lost the connection to another rank' in first.stderr
    assert 'Traceback' not in first.stderr
    assert checkpoint(tmp_path, 'a')['timestamp']['Timestamp']['batch'] == 4
    results = as_nodes([*words, 'max_duration=12ba'], tmp_path, [0, 1], own_disk)
    assert [done.returncode for done in results] == [0, 0], results
    assert 'batches 4 to 12' in results[0].stdout
    done = launch(tmp_path, [*words, 'max_duration=14ba'], ranks=2, NODE='0')
    assert done.returncode == 0 and 'batches 12 to 14' in done.stdout, done.stdout + done.stderr
    assert_same_training(one_node, checkpoint(tmp_path, 'a'))


@needs_namespaces
def test_sharded_checkpoints_on_disks_that_nodes_do_not_share_are_refused_before_training(tmp_path, monkeypatch):
    """Each node would keep its own half, and no start could read both."""
    monkeypatch.setenv('FSDP_VERSION', '2')
    sharded = 'parallelism_config={fsdp: {state_dict_type: sharded}}'
    words = command(ROOT / 'yamls' / 'digits_tread.yaml', *SMALL, *SHORT, sharded)
    for done in as_nodes(words, tmp_path, [0, 1], 'runs'):
        assert done.returncode == 2 and 'sharded' in done.stderr and 'Traceback' not in done.stderr, done
    assert not list(tmp_path.rglob('*.distcp'))


def test_nodes_with_other_settings_do_not_train(tmp_path):
    words = command(ROOT / 'yamls' / 'digits.yaml', *SMALL, 'seed=${oc.decode:${oc.env:NODE}}')
    for done in as_nodes(words, tmp_path, [0, 1]):
        assert done.returncode == 2 and 'seed: 0 on rank 0 (host ' in done.stderr, done.stderr
        assert '1 on rank 1 (host ' in done.stderr and 'Traceback' not in done.stderr
        assert done.stderr.count(' on rank 0 (host ') == 1  # nothing else differs
    assert not list((tmp_path / 'runs').rglob('*.pt'))


def test_ranks_end_when_their_launcher_is_killed(tmp_path):
    words = command(ROOT / 'yamls' / 'digits.yaml', *SMALL, 'max_duration=100000ba', launcher=2)
    launcher = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL)
    try:
        assert wait_until((tmp_path / 'runs' / 'digits' / 'config.yaml').exists)
        ranks = [child for child in psutil.Process(launcher.pid).children() if 'train.py' in ' '.join(child.cmdline())]
        assert len(ranks) == 2
    finally:
        launcher.kill()
        launcher.wait()
    _, alive = psutil.wait_procs(ranks)
    assert not alive


def test_a_second_process_is_refused_while_a_run_is_trained(tmp_path):
    words = command(ROOT / 'yamls' / 'digits.yaml', *SMALL, 'loggers.mlflow=null', 'max_duration=100000ba')
    first = start_program(words[1:], tmp_path, environment(), [tmp_path / 'out', tmp_path / 'err'])
    try:
        assert wait_until((tmp_path / 'runs' / 'digits' / 'config.yaml').exists, first)
        second = launch(tmp_path, words)
    finally:
        first.kill()
        first.join()
    assert second.returncode == 2 and 'Traceback' not in second.stderr
    assert f'another process trains this run now (host {os.uname().nodename}, process {first.pid})' in second.stderr
    done = launch(tmp_path, [*words[:-1], 'max_duration=2ba'])
    assert done.returncode == 0, done.stderr


def numbers(file: Path) -> list[tuple[str, float]]:
    return [(entry['metric'], entry['value']) for entry in json.loads(file.read_text())]


def test_evaluate_and_sweep_give_on_two_nodes_the_numbers_of_one(routed, tmp_path):
    shared = ['--reference', 'digits', '--features', 'digits', '--count', '100', '--device', 'cpu', '--steps', '2']
    program = [sys.executable, '-m', 'tread_composer']
    for name, words in {
        'evaluate': ['--samples-folder', '{}-drawn', '--out', '{}/results.json'],
        'sweep': ['--guidance-scale', '1', '1.5', '--out', '{}'],
    }.items():
        for start in ('one', 'two'):
            (tmp_path / f'{name}-{start}').mkdir()
            whole = [*program, name, str(routed.folder), *shared, *(word.format(f'{name}-{start}') for word in words)]
            results = [launch(tmp_path, whole)] if start == 'one' else as_nodes(whole, tmp_path, [0, 1])
            assert [done.returncode for done in results] == [0] * len(results), results
        one, two = (numbers(tmp_path / f'{name}-{start}' / 'results.json') for start in ('one', 'two'))
        assert one and one == two, name


@needs_namespaces
@pytest.mark.parametrize('verb', ['sample', 'convert'])
def test_filling_a_folder_that_nodes_do_not_share_is_refused_before_the_work(routed, tmp_path, verb):
    if verb == 'sample':
        words = ['-m', 'tread_composer', 'sample', str(routed.folder), '--count', '4', '--out', 'drawn']
    else:
        (tmp_path / 'images').mkdir()
        Image.new('RGB', (8, 8)).save(tmp_path / 'images' / 'a.png')
        script = str(ROOT / 'streaming_data' / 'convert_imagenet.py')
        words = [script, '--source', 'images', '--out', 'drawn', '--pixels', '--resolution', '8']
    (tmp_path / 'drawn').mkdir()
    for done in as_nodes([sys.executable, *words], tmp_path, [0, 1], 'drawn'):
        assert done.returncode == 2 and 'does not see. All nodes work in one folder' in done.stderr, done
        assert 'Traceback' not in done.stderr
