"""Taps against an explicit loop: tokens, kept ids and all gradients, whatever recomputes or compiles.

On other people's models: ``test_foreign.py``.
"""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.routing.small import Busy, Loop, N, explicit, tokens
from tread_composer.routing import Route, RoutingError, Tapped, apply_tread, remove_tread, sample_kept, tap_blocks

EVERYWHERE = [0, 1, 3, 4, -1]  # before, at the start of, inside, at the end of and behind a route from 1 to 4


def loss_of(out: Tensor, features: dict[int, Tensor]) -> Tensor:
    """Each tap counts, by another weight."""
    return out.square().mean() + sum((at + 2.5) * feature.pow(3).mean() for at, feature in features.items())


WAYS = ['plain', 'checkpoint', 'whole', *CheckpointImpl, 'compiled whole', 'compiled blocks']


@pytest.mark.parametrize('routed', [True, False])
@pytest.mark.parametrize('way', WAYS)
def test_tokens_ids_and_gradients_equal_the_explicit_loop(way, routed):
    model = Loop(way).train()
    twin = copy.deepcopy(model)
    routing = apply_tread(model, Route(1, 4, 0.5)) if routed else None
    taps = tap_blocks(model, EVERYWHERE)
    for index in range(6):
        if isinstance(way, CheckpointImpl):
            model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=way)
        elif way == 'compiled blocks':
            model.blocks[index] = torch.compile(model.blocks[index], backend='aot_eager', fullgraph=True)
    torch._dynamo.reset()
    call = torch.compile(model, backend='aot_eager', fullgraph=True) if way == 'compiled whole' else model
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    total, expected = torch.zeros(()), torch.zeros(())
    # Two forward passes before one backward pass; a whole loop that is recomputed takes the ids that are armed then.
    for seed in range(1 if routed and way == 'whole' else 2):
        kept = sample_kept(4, N, 0.5, generator=torch.Generator().manual_seed(seed))
        if routing is not None:
            routing.arm([kept], num_tokens=N)
        out, tapped, outputs = call(x), taps.read(), []
        reference = explicit(twin.blocks, y, *(([(1, 4)], [kept]) if routed else ([], [])), outputs)
        total = total + loss_of(out, {at: tap.tokens for at, tap in tapped.items()})
        expected = expected + loss_of(reference, {at: outputs[at] for at in EVERYWHERE})
        for at, (seen, ids) in tapped.items():
            torch.testing.assert_close(seen, outputs[at], rtol=1e-6, atol=1e-6)
            on_route = routed and at in (1, 3, 4)
            assert torch.equal(ids, kept) if on_route else ids is None
    if routing is not None and way != 'whole':
        routing.disarm()
    total.backward()
    expected.backward()
    pairs = zip([x, *model.parameters()], [y, *twin.parameters()], strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(RoutingError, match='no forward pass went through block 0 since'):
        taps.read()  # a recomputed pass leaves nothing


def test_taps_cost_no_further_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('aot_eager')
    model = Busy().train()
    routing, taps = apply_tread(model, Route(1, 4, 0.5)), tap_blocks(model, [2, 5], evaluation=True)
    call = torch.compile(model, backend=counter, fullgraph=True)
    for step in range(4):
        routing.arm([sample_kept(4, N, 0.5)], num_tokens=N)
        if step != 1:
            call(tokens().requires_grad_())
        if step == 2:
            assert taps.read()[2].tokens.requires_grad
    model.eval()
    with torch.no_grad():
        call(tokens())
        assert taps.read()[2].tokens.shape == (4, N, 8)
        call(tokens())
    assert counter.frame_count == 2


def test_a_model_that_checkpoints_reentrantly_is_refused():
    class Reentrant(Busy):
        def forward(self, x):
            return self.walk([lambda x, b=block: checkpoint(b, x, use_reentrant=True) for block in self.blocks], x)

    model = Reentrant().train()
    tap_blocks(model, 2)
    with pytest.raises(RoutingError, match='block 2 is called inside of reentrant activation checkpointing'):
        model(tokens().requires_grad_())


def test_taps_stand_beside_each_other_come_and_go_and_leave_evaluation_alone():
    model, plain = Busy().train(), Busy().train()
    taps, always = tap_blocks(model, [1, 3]), tap_blocks(model, 3, evaluation=True)
    model(tokens())
    assert torch.equal(taps.read()[3].tokens, always.read()[3].tokens)
    model.eval()(tokens())
    assert isinstance(always.read()[3], Tapped)
    with pytest.raises(RoutingError, match='no forward pass went through block 1'):
        taps.read()
    model.train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # without the tensors of a graph
        twin(tokens())
    model(tokens())
    assert taps.read()[3].tokens.shape[1] == 8
    taps.remove()
    model(tokens())
    remove_tread(model)
    assert always.read()[3].tokens.shape[1] == 8 and routing.used
    assert torch.equal(model(tokens()), plain(tokens())) and always.read()[3].kept is None
    always.remove()
    assert type(model.blocks) is nn.ModuleList and vars(model.blocks).keys() == vars(plain.blocks).keys()


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'at': 6}, 'at: 6 is no block; there are 6'),
        ({'at': -7}, 'at: -7 is no block'),
        ({'at': True}, 'at: True is no block'),
        ({'at': [1, -5]}, r'at: \[1, -5\] names no block, or one of them twice'),
        ({'at': []}, r'at: \[\] names no block'),
        ({'at': 1, 'tokens_out': -1}, 'tokens_out: -1 is no position'),
        ({'at': 1, 'blocks': 'layers'}, "blocks: the model has no module 'layers'"),
    ],
)
def test_wrong_taps_are_refused_and_leave_the_model_plain(settings, message):
    model = Busy()
    with pytest.raises(ValueError, match=message):
        tap_blocks(model, **settings)
    assert type(model.blocks) is nn.ModuleList
