"""Routing while sampling: ``Routing.forced``."""

import pytest
import torch

from tests.helpers import Lengths, tiny_dit
from tests.routing.small import N
from tests.routing.test_blocks import explicit_dit, inputs, outputs_of
from tread_composer.routing import Route, apply_tread, sample_kept


def test_forced_routes_in_evaluation_along_these_ids_and_is_gone_afterwards():
    model = tiny_dit().eval()
    routing = apply_tread(model, Route(1, -2, 0.5))
    arguments, kept = inputs(), [sample_kept(3, N, 0.75)]  # another rate than the route's
    dense = model(*arguments)
    with routing.forced(kept, num_tokens=N):
        seen = outputs_of(model, *arguments)
    assert torch.equal(seen, explicit_dit(model, *arguments, kept, [(1, 4)]))
    assert torch.equal(model(*arguments), dense)
    with routing.forced([torch.arange(N).expand(3, N)], num_tokens=N):
        assert torch.equal(model(*arguments), dense)
    assert not routing.used  # a pause for sampling does not hide that training never routed


def test_forced_gives_back_what_training_was_armed_with_also_after_an_error():
    model = tiny_dit()
    routing = apply_tread(model, Route(1, -2, 0.5))
    routing.arm([sample_kept(3, N, 0.5)], num_tokens=N)
    before = outputs_of(model, *inputs())
    seen = Lengths([model.blocks[2]])

    def fail():
        with routing.forced([sample_kept(3, N, 0.75)], num_tokens=N):
            model.eval()
            with routing.forced([sample_kept(3, N, 0.9)], num_tokens=N):
                model(*inputs())
            model(*inputs())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen.seen == [2, 4]
    model.train()
    assert torch.equal(before, outputs_of(model, *inputs()))
    routing.disarm()
    model.eval()(*inputs())
    assert seen.seen[-1] == N


def test_forced_refuses_ids_of_another_batch():
    model = tiny_dit().eval()
    routing = apply_tread(model)
    for kept, message in (([sample_kept(2, N, 0.5)], 'kept ids for 2 samples'), ([], 'one tensor of ids for each')):
        with pytest.raises(ValueError, match=message), routing.forced(kept, num_tokens=N):
            model(*inputs())
    assert model(*inputs()).shape == (3, 1, 8, 8)
