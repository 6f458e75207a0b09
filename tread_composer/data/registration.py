"""Gives each data set a free number for streaming's shared memory: one job of a machine at a time.

streaming numbers its segments ``NNNNNN_<name>``, nine names to a number. By itself it looks for the first free number
of each name and takes the largest of the nine. Where a job has just ended and another has just begun, the names have
gaps at different numbers, and the largest of these may be a number whose ``locals`` exist: ``FileExistsError``. (Lock
files of earlier jobs in a common TMPDIR usually hide the gaps; with private ones they show.)
Here a number is free only if all nine of its names are, and whoever creates ``locals``, which the kernel allows once,
has it; a number that another job takes in between is passed over.

streaming does both steps on every rank, with barriers of the whole job in between; a lock around them would make two
jobs wait for each other for ever. So the first rank of each node takes the number and tells the others.

A job that is killed leaves its segments behind. Each number of ours has a file beside its segments that is locked as
long as its job lives, so the next job can tell the dead from the living, and removes what is theirs.
"""

import contextlib
import fcntl
import os
import secrets
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import streaming.base.dataset
from streaming.base.constant import BARRIER_FILELOCK, CACHE_FILELOCK, LOCALS, SHM_TO_CLEAN, TICK
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from tread_composer.core.errors import UserError
from tread_composer.io.locks import locked, node_lock_path
from tread_composer.io.ranks import gathered

__all__ = ['numbered_in_turn']

_SEGMENTS = Path('/dev/shm')  # elsewhere (macOS) they are no files, and nothing is removed
_MARK = 'tread_composer'


@contextlib.contextmanager
def numbered_in_turn() -> Iterator[None]:
    """Within this context, a new ``StreamingDataset`` takes its number by ``_take_number``."""
    # The streaming release is pinned; in one without this function the next line fails at once.
    module: Any = streaming.base.dataset
    original = module.get_shm_prefix
    module.get_shm_prefix = _take_number
    try:
        yield
    finally:
        module.get_shm_prefix = original


def _take_number(
    local: list[str], remote: list[str | None], world: World, retry: int = 100
) -> tuple[int, SharedMemory]:
    """Replace streaming's ``get_shm_prefix``: a number, and the segment that reserves it until the job ends."""
    memory, problem, number = None, None, -1
    if world.is_local_leader:
        try:
            # Only against two jobs that fetch into one cache folder: each must see the folders of the other.
            with locked(node_lock_path('streaming')):
                _remove_dead()
                number, memory = _free_number(local, remote, retry)
                _mark(number, memory)
        except (OSError, ValueError) as error:
            problem = f'{", ".join(local)}: cannot be registered on node {world.node}: {error}'
    answers = gathered((world.node, number, problem))
    for _, _, text in answers:
        if text is not None:
            raise UserError(text)
    if memory is None:
        number = max(answer for node, answer, _ in answers if node == world.node)
        memory = SharedMemory(prefix._get_path(number, LOCALS), False)
    return number, memory


def _mark(number: int, memory: SharedMemory) -> None:
    if not _SEGMENTS.is_dir():
        return
    path = _SEGMENTS / prefix._get_path(number, _MARK)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel's: it goes with the process, however that ends
    weakref.finalize(memory, _unmark, path, descriptor, os.getpid())


def _unmark(path: Path, descriptor: int, process: int) -> None:
    if os.getpid() == process:  # not in a fork, which has the same descriptor
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _remove_dead() -> None:
    """Remove what jobs of this user left that were killed."""
    for path in _SEGMENTS.glob(f'*_{_MARK}'):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:  # of another user, or gone in this moment
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # it lives
        else:
            number = int(path.name.partition('_')[0])
            for name in (*SHM_TO_CLEAN, _MARK):
                (_SEGMENTS / prefix._get_path(number, name)).unlink(missing_ok=True)
            for name in (BARRIER_FILELOCK, CACHE_FILELOCK):
                Path(gettempdir(), prefix._get_path(number, name)).unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _free_number(local: list[str], remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    """Wait, ``retry`` ticks at most, for a data set of an ending job that still occupies a cache folder."""
    prefix._check_self(local)
    fetched = {folder for folder, source in zip(local, remote, strict=True) if source is not None}
    for _ in range(retry):
        try:
            return _new_number(local, fetched)
        except ValueError:
            time.sleep(TICK)
    return _new_number(local, fetched)


def _new_number(local: list[str], fetched: set[str]) -> tuple[int, SharedMemory]:
    """Drawn, so that it is none that a killed process had: Python's resource tracker removes its segments by name.

    It may do so a moment after another process has seen that it is dead; had that one taken the number, its segments
    would go, a third process would find the number free, and two runs would read each other's order of samples.
    """
    present = {int(path.name[:6]) for path in _SEGMENTS.glob(f'[0-9]*_{LOCALS}')}
    for number in present:
        _is_taken(number, fetched)
    while True:
        number = secrets.randbelow(10**6)
        if _is_taken(number, fetched):
            continue
        content = prefix._pack_locals(local, number)
        try:
            memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(content))
        except FileExistsError:  # a program without our lock was faster
            continue
        memory.buf[: len(content)] = content
        return number, memory


def _is_taken(number: int, fetched: set[str]) -> bool:
    """Whether any segment or lock file of this number exists; ``ValueError`` if its data set fetches into ours."""
    # streaming creates these at the first batch and never removes them: a run that was killed does not block its cache.
    lock_files = (prefix._get_path(number, name) for name in (BARRIER_FILELOCK, CACHE_FILELOCK))
    if any(os.path.exists(os.path.join(gettempdir(), name)) for name in lock_files):
        return True
    taken = False
    for name in SHM_TO_CLEAN:
        try:
            memory = SharedMemory(prefix._get_path(number, name), False, auto_cleanup=False)
        except FileNotFoundError:
            continue
        except (PermissionError, ValueError):  # of another user; or just created and still without a size
            taken = True
            continue
        taken = True
        shared = fetched.intersection(prefix._unpack_locals(bytes(memory.buf))[0]) if name == LOCALS else ()
        memory.cleanup()
        if shared:
            raise ValueError(
                f'{", ".join(sorted(shared))}: another data set fetches into this folder. Give each its own; if no '
                f'other run is alive, remove what a killed one left: streaming.base.util.clean_stale_shared_memory()'
            )
    return taken
