"""Refused on one rank, refused on all: two real processes, and one without a process group."""

import pytest
import torch.distributed as dist

from tests.warm import on_ranks
from tread_composer.core.errors import UserError
from tread_composer.io.ranks import agreed


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
