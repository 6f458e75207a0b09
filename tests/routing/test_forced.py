"""Routing while sampling: ``Routing.forced`` and ``routing_of``."""

import pytest
import torch
from torch import nn

from tests.helpers import Lengths, tiny_dit
from tests.routing.test_blocks import N, explicit, inputs, outputs_of
from tread_composer.routing import Route, apply_tread, routing_of, sample_kept


def test_forced_routes_in_evaluation_along_the_given_ids_and_is_gone_afterwards():
    model = tiny_dit().eval()
    routing = apply_tread(model, Route(1, -2, 0.5))
    arguments, kept = inputs(), [sample_kept(3, N, 0.75)]  # another rate than the route's
    dense = model(*arguments)
    with routing.forced(kept, num_tokens=N):
        found, condition = outputs_of(model, *arguments)
    expected, _ = explicit(model, *arguments, kept, [(1, 4)])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert torch.equal(model(*arguments), dense) and condition is not None
    with routing.forced([torch.arange(N).expand(3, N)], num_tokens=N):
        assert torch.equal(model(*arguments), dense)


def test_forced_gives_back_what_training_was_armed_with_also_after_an_error():
    model = tiny_dit()
    routing = apply_tread(model, Route(1, -2, 0.5))
    armed = [sample_kept(3, N, 0.5)]
    routing.arm(armed, num_tokens=N)
    before, _ = outputs_of(model, *inputs())
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
    after, _ = outputs_of(model, *inputs())
    assert torch.equal(before, after)
    routing.disarm()
    model.eval()(*inputs())
    assert seen.seen[-1] == N


def test_forced_in_a_sampling_pause_does_not_hide_that_training_never_routed():
    model = tiny_dit().eval()
    routing = apply_tread(model)
    with routing.forced([sample_kept(3, N, 0.5)], num_tokens=N):
        model(*inputs())
    assert not routing.used


def test_forced_refuses_ids_of_another_batch():
    model = tiny_dit().eval()
    routing = apply_tread(model)
    with (
        pytest.raises(ValueError, match='kept ids for 2 samples'),
        routing.forced([sample_kept(2, N, 0.5)], num_tokens=N),
    ):
        model(*inputs())
    with pytest.raises(ValueError, match='one tensor of ids for each'), routing.forced([], num_tokens=N):
        model(*inputs())
    assert model(*inputs()).shape == (3, 1, 8, 8)


def test_the_routing_of_a_model_is_found():
    model = tiny_dit()
    assert routing_of(model) is None
    routing = apply_tread(model)
    assert routing_of(model) is routing
    assert routing_of(nn.Sequential(model)) is routing
    assert routing_of(nn.Sequential(model.blocks[:2])) is routing  # a slice keeps it
