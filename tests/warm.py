"""Processes of the tests, forked from a server that has done the imports and nothing else.

A command of ours spends five seconds on imports and often less than one on its work. A fork of the tests' own process
would not do: it hangs where torch or another library had a thread that held a lock. The server (multiprocessing's) has
run nothing, so its forks behave like fresh processes. Some tests start fresh ones all the same.
"""

import atexit
import contextlib
import ctypes
import multiprocessing
import os
import pickle
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from composer.utils import dist, get_device

ROOT = Path(__file__).parent.parent
# Nothing here takes a hundredth of that on an idle machine: it ends what would hang for ever, and fails on no busy one.
PATIENCE = 1200
_CONTEXT = multiprocessing.get_context('forkserver')
_CONTEXT.set_forkserver_preload(['tests.preloaded'])


def start(function: Callable[..., object], *arguments: Any) -> BaseProcess:
    """``function(*arguments)`` in a process of its own: a function of a module, which can be pickled by its name."""
    process = _CONTEXT.Process(target=_run, args=(function, arguments))
    # The first process starts the server, which finds its imports from here and keeps its environment: a test's choice
    # of FSDP would be read by the configuration of all later ones.
    with inside(ROOT), mock.patch.dict(os.environ):
        os.environ.pop('FSDP_VERSION', None)
        process.start()
    return process


def _run(function: Callable[..., object], arguments: Sequence[Any]) -> None:
    # As in a process that was started by hand: a data loader's workers are forked, and shared memory is its own to
    # give back.
    multiprocessing.set_start_method('fork', force=True)
    resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out


def start_program(
    words: Sequence[str],
    folder: Path,
    variables: Mapping[str, str],
    outputs: Sequence[Path],
    before: Callable[[], object] | None = None,
) -> BaseProcess:
    """``python WORDS`` in a process of its own: a script, or ``-m`` and a module, and its arguments.

    Args:
        words: Behind ``python``.
        folder: Working directory.
        variables: The whole environment.
        outputs: Files for stdout and stderr.
        before: Called in the process before it becomes the program, such as ``own_namespaces``.
    """
    return start(_run_program, [str(word) for word in words], folder, dict(variables), outputs, before)


def _run_program(
    words: list[str], folder: Path, variables: dict[str, str], outputs: Sequence[Path], before: Any
) -> None:
    _redirect(outputs)
    if before is not None:
        before()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.path[:0] = variables.get('PYTHONPATH', '').split(os.pathsep)
    sys.orig_argv[:] = [sys.executable, *words]
    if words[0] == '-m':
        sys.argv[:] = words[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.argv[:] = words
        runpy.run_path(words[0], run_name='__main__')


def may_have_namespaces() -> bool:
    """Whether ``own_namespaces`` is permitted here."""
    return subprocess.run(['unshare', '--mount', '--net', 'true'], capture_output=True).returncode == 0


def own_namespaces(script: str, network: bool = False) -> None:
    """Give this process mounts of its own, and a network if asked for, and change them by a shell script."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x20000 | network * 0x40000000):  # CLONE_NEWNS, CLONE_NEWNET
        raise OSError(ctypes.get_errno(), 'unshare')
    subprocess.run(['bash', '-c', f'set -e; mount --make-rprivate /; {script}'], check=True)


def _redirect(outputs: Sequence[Path]) -> None:
    for descriptor, path in enumerate(outputs, 1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, descriptor)
        os.close(file)


def on_ranks(
    ranks: int, function: Callable[..., Any], *arguments: Any, nodes: int = 1, device: str = 'cpu'
) -> list[Any]:
    """``function(*arguments)`` on so many connected ranks, of as many launchers as nodes; the results by rank."""
    with tempfile.TemporaryDirectory() as name:
        results = [Path(name, str(rank)) for rank in range(ranks)]
        errors = [Path(name, f'errors{rank}') for rank in range(ranks)]
        each = zip(rank_variables(ranks, nodes), results, errors, strict=True)
        codes = exit_codes([start(_rank, *one, device, function, arguments) for one in each])
        assert not any(codes), '\n'.join([str(codes), *(path.read_text() for path in errors)])
        return [pickle.loads(path.read_bytes()) for path in results]


def _rank(variables: dict, result: Path, errors: Path, device: str, function: Callable, arguments: Sequence) -> None:
    _redirect([errors, errors])
    os.environ.update(variables)
    torch.set_num_threads(1)
    dist.initialize_dist(get_device(device))
    result.write_bytes(pickle.dumps(function(*arguments)))
    dist.barrier()


def rank_variables(ranks: int, nodes: int = 1) -> list[dict[str, str]]:
    """What a launcher would set for each rank."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    size = ranks // nodes
    shared = {'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': size, 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': port}
    each = [{**shared, 'RANK': rank, 'LOCAL_RANK': rank % size, 'NODE_RANK': rank // size} for rank in range(ranks)]
    return [{name: str(value) for name, value in variables.items()} for variables in each]


def exit_codes(processes: Sequence[BaseProcess]) -> list[int | None]:
    """Wait for the end of all ranks. As by a launcher, the others are ended where one fails: they may wait for it.

    Whatever rank 0 has to say of the failure of another, it gets a minute for.
    """
    end = time.monotonic() + PATIENCE
    while any(process.exitcode is None for process in processes) and time.monotonic() < end:
        if processes[0].exitcode:
            break
        if any(process.exitcode for process in processes):
            end = min(end, time.monotonic() + 60)
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def wait_until(condition: Callable[[], object], process: BaseProcess | None = None, pause: float = 0.001) -> bool:
    """Wait for a condition, or for the end of a process; returns whether the condition holds.

    ``pause`` are the seconds between two looks: more of them where a look costs much and no moment is to be met.
    """
    end = time.monotonic() + PATIENCE
    while not condition() and (process is None or process.exitcode is None):
        assert time.monotonic() < end
        time.sleep(pause)
    return bool(condition())


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """With another working directory; ``contextlib.chdir`` from Python 3.11 on."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
