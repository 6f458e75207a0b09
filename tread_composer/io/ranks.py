"""Several processes of one job: who they are, agreeing on refusals, waiting for each other.

They exchange a few Python objects and no tensors, so the process group is gloo whatever encodes; without a launcher
there is none.
"""

import contextlib
import functools
import os
import socket
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tread_composer.core.errors import UserError
from tread_composer.io.files import whole_file
from tread_composer.io.rendezvous import Rendezvous

__all__ = ['Ranks', 'agreed', 'check_equal', 'gathered', 'nodes_without', 'send_file']

Result = TypeVar('Result')
Value = TypeVar('Value')

# Ranks finish hours apart: their numbers of parts differ by one, a GPU may be slower, and reading the list of images of
# a large source (which the first rank does alone) can take long, too. A rank that dies is noticed at once all the same:
# its connections break, and the launcher stops the others of its node. So the limit only has to be longer than a job.
_TIMEOUT = 7 * 86400.0  # seconds
_PIECE = 64 * 2**20  # bytes


def gathered(value: Value) -> list[Value]:
    """The values of all ranks, by rank; without a process group, this one's."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(step: Callable[[], Result], place: str = '') -> Result:
    """Do a step that needs no other rank; if any rank is refused, all are, with the message of the first.

    Otherwise one rank would leave while the others wait for it in the next collective. ``place`` begins a refusal, e.g.
    ``'callbacks.evaluation: '``.

    Raises:
        UserError: Of this rank or another.
    """
    result, problem = None, None
    try:
        result = step()
    except UserError as error:
        problem = error if not place else UserError(f'{place}{error}')
    problems = gathered(None if problem is None else str(problem))
    if problem is not None and len(problems) == 1:
        raise problem
    for rank, text in enumerate(problems):
        if text is not None:
            raise UserError(text if rank == 0 else f'on rank {rank}: {text}')
    return result  # type: ignore[return-value]


def check_equal(facts: Mapping[str, object]) -> None:
    """Refuse a job whose ranks do not have the same facts: its nodes would train different things without a word.

    Raises:
        UserError: On all ranks, with host, key and both values of up to ten differences.
    """
    reports = gathered((socket.gethostname(), dict(facts)))
    (first_host, expected), lines = reports[0], []
    for rank, (host, values) in enumerate(reports):
        for key in dict.fromkeys([*expected, *values]):
            if expected.get(key) != values.get(key):
                lines.append(
                    f'  {key}: {expected.get(key)!r} on rank 0 (host {first_host}), {values.get(key)!r} on rank {rank} '
                    f'(host {host})'
                )
    if lines:
        text = '\n'.join(lines[:10] + (['  ...'] if len(lines) > 10 else []))
        raise UserError(f'the ranks of this job differ; give every node the same files and the same command:\n{text}')


def nodes_without(folder: Path) -> set[int]:
    """Nodes (``NODE_RANK``) that do not see in a folder what the first rank writes there: their disk is another one.

    The folder exists on the first rank. Nothing stays in it.
    """
    node = int(os.environ.get('NODE_RANK', '0'))
    if not (dist.is_available() and dist.is_initialized()):
        return set()
    # A new name each time: a network file system remembers for a while that an earlier one was absent.
    token = Path(folder, gathered(f'.shared-{uuid.uuid4().hex}')[0])
    is_first = dist.get_rank() == 0

    def touched() -> None:
        try:
            token.touch()
        except OSError as error:
            raise UserError(f'{folder}: no file can be made: {error.strerror}') from None

    agreed(lambda: touched() if is_first else None)
    seen = gathered((node, token.exists()))
    if is_first:
        token.unlink(missing_ok=True)
    return {number for number, is_there in seen if not is_there}


def send_file(path: Path, nodes: Collection[int]) -> None:
    """Copy a file of the first rank to the same path on ``nodes`` that lack it. Called on all ranks.

    Tens of gigabytes at most: it travels in pieces of 64 MiB.

    Raises:
        UserError: On all ranks, if one cannot read or write it (a full disk); no node has a part of it then.
    """
    receives = int(os.environ.get('NODE_RANK', '0')) in nodes and int(os.environ.get('LOCAL_RANK', '0')) == 0
    group: Any = dist.new_group(backend='gloo')  # that of the run may be NCCL's, which sends from GPUs alone
    is_first = dist.get_rank() == 0

    # A rank that left alone would keep the others waiting for the next piece: what may fail, all hear of.
    def together(step: Callable[[], Result]) -> Result:
        return agreed(lambda: _copied(path, step))

    with contextlib.ExitStack() as stack:
        size = gathered(together(lambda: path.stat().st_size if is_first else 0))[0]
        source = together(lambda: stack.enter_context(open(path, 'rb')) if is_first else None)
        target = together(
            lambda: stack.enter_context(open(stack.enter_context(whole_file(path)), 'wb')) if receives else None
        )
        for start in range(0, size, _PIECE):
            piece = torch.empty(min(_PIECE, size - start), dtype=torch.uint8)
            content = piece.numpy().data
            together(functools.partial(source.readinto, content) if source else lambda: None)
            dist.broadcast(piece, src=0, group=group)
            together(functools.partial(target.write, content) if target else lambda: None)
        together(stack.pop_all().close)  # what the disk has not taken yet
    dist.destroy_process_group(group)


def _copied(path: Path, step: Callable[[], Result]) -> Result:
    try:
        return step()
    except OSError as error:
        raise UserError(
            f'{path}: this checkpoint of node 0 is to be copied to the other nodes, and host {socket.gethostname()} '
            f'cannot do its part: {error.strerror}. Make room or give leave there, then run the same command again'
        ) from None


@dataclass(frozen=True)
class Ranks:
    """This process among those that the ``composer`` launcher started, or the only one."""

    rank: int = 0  # of this process, over all nodes
    world: int = 1
    local_rank: int = 0  # of this process, on this node
    local_world: int = 1

    @classmethod
    def start(cls) -> 'Ranks':
        """Join the others."""
        names = {'rank': 'RANK', 'world': 'WORLD_SIZE', 'local_rank': 'LOCAL_RANK', 'local_world': 'LOCAL_WORLD_SIZE'}
        ranks = cls(**{key: int(os.environ[name]) for key, name in names.items() if name in os.environ})
        if ranks.world > 1 and not dist.is_initialized():
            Rendezvous().join('gloo', _TIMEOUT)
        return ranks

    @property
    def is_first(self) -> bool:
        """Whether this one plans, reports and merges."""
        return self.rank == 0

    def agreed(self, step: Callable[[], Result]) -> Result:
        """See ``agreed``. Alone it asks nobody, even where the process belongs to a group."""
        return agreed(step) if self.world > 1 else step()

    def gathered(self, value: Value) -> list[Value]:
        """See ``gathered``, and ``agreed`` here."""
        return gathered(value) if self.world > 1 else [value]

    def from_first(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def check_shared(self, folder: Path, setting: str) -> None:
        """Refuse a folder that is another one on another node, before any work goes into it.

        Raises:
            UserError: On all ranks, with the nodes and the ``setting`` that names the folder.
        """
        missing = sorted(nodes_without(folder)) if self.world > self.local_world else ()
        if missing:
            numbers = ', '.join(map(str, missing))
            raise UserError(
                f'{setting} {folder}: node 0 writes there what node {numbers} does not see. All nodes work in one '
                f'folder: give one on a disk that they share, or run on one node'
            )

    def wait_for_all(self, meanwhile: Callable[[], None]) -> None:
        """Return when every rank has come here; ``meanwhile`` is called now and then, and may raise to end the wait."""
        if self.world == 1:
            return
        # A plain barrier waits in C++, deaf to what another rank has written about its failure.
        work = dist.barrier(async_op=True)
        assert work is not None
        while not work.is_completed():
            meanwhile()
            time.sleep(0.2)
        work.wait()  # raises if a connection broke
