"""How a data set gets its number for shared memory: one process of a machine at a time, and nobody waits with the lock.

streaming looks for the first free number and takes it in two steps, on every rank, with barriers of the whole job in
between. Two jobs that start at the same moment find the same number: one dies with ``FileExistsError``, or its ranks
disagree. A lock around all of it would be held in those barriers, and two jobs (or two launchers of one job) would wait
for each other for ever. Here the first rank of each node looks and takes under the lock, and then tells the others.
"""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import streaming.base.dataset
from streaming.base.constant import LOCALS, SHM_TO_CLEAN
from streaming.base.shared import SharedMemory, prefix
from streaming.base.world import World

from tread_composer.core.errors import UserError
from tread_composer.io.locks import locked, node_lock_path
from tread_composer.io.ranks import gathered

__all__ = ['numbered_in_turn']


@contextlib.contextmanager
def numbered_in_turn() -> Iterator[None]:
    """A ``StreamingDataset`` that is built inside of this context takes its number in turn."""
    # The release is pinned; another that has no such name would be an AttributeError here, not a race.
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
    """In place of streaming's ``get_shm_prefix``, with its arguments.

    Returns:
        The number, and the segment that stands for it until the job ends.

    Raises:
        UserError: On all ranks: a cache folder of remote data is in use already.
    """
    memory, problem, number = None, None, -1
    if world.is_local_leader:
        try:
            with locked(node_lock_path('streaming')):
                number, memory = _free_number(local, remote, retry)
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


def _free_number(local: list[str], remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    """``_first_free``, looked for again where a program that does not know our lock was faster, or is just ending."""
    for pause in (0.1, 0.3, 1.0):
        try:
            return _first_free(local, remote, retry)
        except FileExistsError:
            time.sleep(pause)
    return _first_free(local, remote, retry)


def _first_free(local: list[str], remote: list[str | None], retry: int) -> tuple[int, SharedMemory]:
    prefix._check_self(local)
    number = max(prefix._check_and_find_retrying(local, remote, name, retry) for name in SHM_TO_CLEAN)
    content = prefix._pack_locals(local, number)
    memory = SharedMemory(prefix._get_path(number, LOCALS), True, len(content))
    memory.buf[: len(content)] = content
    return number, memory
