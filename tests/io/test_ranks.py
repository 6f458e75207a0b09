"""Refused on one rank, refused on all: two real processes, and one without a process group."""

import os
import resource
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.warm import on_ranks
from tread_composer.core.errors import UserError
from tread_composer.io.ranks import agreed, send_file


def refuse(ranks: list[int]) -> str:
    """What this rank hears when those ranks are refused."""

    def step() -> int:
        if dist.get_rank() in ranks:
            raise UserError(f'refused by {dist.get_rank()}')
        return dist.get_rank()

    try:
        return f'result {agreed(step, "a place: ")}'
    except UserError as error:
        return str(error)


def refuse_in_turn(cases: list[list[int]]) -> list[str]:
    return [refuse(ranks) for ranks in cases]


def test_the_first_refusal_is_that_of_all():
    each = on_ranks(2, refuse_in_turn, [[], [0, 1], [1]])
    heard = [('result 0', 'result 1'), ('a place: refused by 0',) * 2, ('on rank 1: a place: refused by 1',) * 2]
    assert list(zip(*each, strict=True)) == heard


def test_a_single_process_needs_no_group():
    def refused() -> None:
        raise UserError('no')

    assert agreed(lambda: 3) == 3
    with pytest.raises(UserError, match='a place: no'):
        agreed(refused, 'a place: ')


def copy_to_the_second_node(folder: Path, obstacle: str) -> tuple[str, list[str]]:
    """What this node hears, and the files that it has then."""
    own = folder / os.environ['NODE_RANK']
    own.mkdir()
    os.chdir(own)  # as with a disk of its own: the same path is another file
    path = Path('runs', 'latest.pt')
    if dist.get_rank() == 0:
        path.parent.mkdir()
        path.write_bytes(b'x' * 3_000_000)
    elif obstacle != 'no folder':
        path.parent.mkdir()
    if dist.get_rank() == 1 and obstacle == 'full disk':
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write itself fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
    try:
        send_file(path, {1})
        text = ''
    except UserError as error:
        text = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return text, [f'{file.name}: {file.stat().st_size}' for file in Path('runs').glob('*')]


@pytest.mark.parametrize(('obstacle', 'reason'), [('full disk', 'File too large'), ('no folder', 'No such file')])
def test_a_checkpoint_that_a_node_cannot_store_is_refused_on_all(tmp_path: Path, obstacle: str, reason: str):
    (first, kept), (second, received) = on_ranks(2, copy_to_the_second_node, tmp_path, obstacle, nodes=2)
    assert first == second
    assert first.startswith('on rank 1: runs/latest.pt: this checkpoint of node 0') and reason in first
    assert (kept, received) == (['latest.pt: 3000000'], [])


def test_a_checkpoint_is_sent_to_a_node_that_lacks_it(tmp_path: Path):
    (first, kept), (second, received) = on_ranks(2, copy_to_the_second_node, tmp_path, 'none', nodes=2)
    assert (first, second) == ('', '') and kept == received == ['latest.pt: 3000000']
