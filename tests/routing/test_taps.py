"""Taps against an explicit loop: tokens, kept ids and all gradients, whatever recomputes or compiles."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.helpers import tiny_dit
from tests.routing.foreign import FAMILIES, LOOPED, B
from tests.routing.test_between import Busy, N, tokens
from tests.routing.test_blocks import inputs
from tests.routing.test_foreign import DEPTHS, run
from tread_composer.models import LightningDiT
from tread_composer.routing import (
    Route,
    RoutingError,
    Tapped,
    apply_tread,
    put_back,
    remove_tread,
    sample_kept,
    take_kept,
    tap_blocks,
)

EVERYWHERE = [0, 1, 3, 4, -1]  # before, at the start of, inside, at the end of and behind a route from 1 to 4


class Recomputing(Busy):
    """Checkpoints itself in the given way."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style

    def loop(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.style == 'each block' else block(x)
        return x

    def forward(self, x):
        return checkpoint(self.loop, x, use_reentrant=False) if self.style == 'whole loop' else self.loop(x)


def explicit(model: nn.Module, x: Tensor, kept: Tensor | None) -> tuple[Tensor, dict[int, Tensor]]:
    """The loop with a route from 1 to 4, if there is one, and what the blocks returned."""
    outputs, full = [], x
    for index in range(6):
        if index == 1 and kept is not None:
            full, x = x, take_kept(x, kept)
        x = model.blocks[index](x)
        outputs.append(x)
        if index == 4 and kept is not None:
            x = put_back(full, x, kept)
    return x, {at: outputs[at] for at in EVERYWHERE}


def loss_of(out: Tensor, features: dict[int, Tensor]) -> Tensor:
    """Each tap counts, by another weight."""
    return out.square().mean() + sum((at + 2.5) * feature.pow(3).mean() for at, feature in features.items())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


WAYS = ['plain', 'each block', 'whole loop', *CheckpointImpl, 'compiled whole', 'compiled blocks']


@pytest.mark.parametrize('routed', [True, False])
@pytest.mark.parametrize('way', WAYS)
def test_tokens_ids_and_gradients_equal_the_explicit_loop(way, routed):
    model = Recomputing(way if isinstance(way, str) else 'plain').train()
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
    for seed in range(1 if routed and way == 'whole loop' else 2):
        kept = sample_kept(4, N, 0.5, generator=torch.Generator().manual_seed(seed)) if routed else None
        if routing is not None:
            routing.arm([kept], num_tokens=N)
        out, tapped = call(x), taps.read()
        wanted, features = explicit(twin, y, kept)
        total = total + loss_of(out, {at: tap.tokens for at, tap in tapped.items()})
        expected = expected + loss_of(wanted, features)
        for at, (seen, ids) in tapped.items():
            torch.testing.assert_close(seen, features[at], rtol=1e-6, atol=1e-6)
            on_route = routed and at in (1, 3, 4)
            assert torch.equal(ids, kept) if on_route else ids is None
    if routing is not None and way != 'whole loop':
        routing.disarm()
    total.backward()
    expected.backward()
    for one, other in zip(gradients(model, x), gradients(twin, y), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with pytest.raises(RoutingError, match='no forward pass went through block 0 since'):
        taps.read()  # a recomputed pass leaves nothing


@pytest.fixture(params=FAMILIES)
def case(request):
    torch.manual_seed(0)
    family = FAMILIES[request.param]
    model = family.build()
    return family, model, copy.deepcopy(model), DEPTHS.get(request.param, 4)


@pytest.mark.parametrize('routed', [True, False])
def test_taps_on_other_peoples_models_equal_the_explicit_loop(case, routed):
    family, model, plain, depth = case
    taken = {name: family.settings[name] for name in ('blocks', 'tokens_out') if name in family.settings}
    first, kept = family.settings.get('always_keep', 0), torch.arange(family.tokens).expand(B, -1)
    span = (1, depth - 2) if routed else (depth, depth)
    if routed:
        routing = apply_tread(model, Route(*span, 0.5), **family.settings)
        kept = torch.cat([torch.arange(first), torch.arange(first, family.tokens, 2)]).unique().expand(B, -1)
        routing.arm([kept[:1] if routing.shared else kept], num_tokens=family.tokens)
        taken = {}
    taps = tap_blocks(model, range(depth), **taken)
    loss = run(family, model.train()).square().mean()
    tapped = taps.read()
    (loss + sum((at + 1) * tap.tokens.pow(3).mean() for at, tap in tapped.items())).backward()
    wanted = run(family, plain.train(), explicit=(span, kept)).square().mean()
    (wanted + sum((at + 1) * out.pow(3).mean() for at, out in enumerate(LOOPED))).backward()
    for at, out in enumerate(LOOPED):
        torch.testing.assert_close(tapped[at].tokens, out, rtol=1e-5, atol=1e-5)
        ids = tapped[at].kept
        assert (ids is not None and torch.equal(ids, kept)) if span[0] <= at <= span[1] else ids is None
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-4, msg=name)


def lightning() -> nn.Module:
    torch.manual_seed(0)
    sizes = {'patch_size': 2, 'hidden_size': 16, 'depth': 6, 'num_heads': 2}
    model = LightningDiT(latent_size=8, in_channels=1, num_classes=10, **sizes)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize('make', [tiny_dit, lightning])
def test_taps_on_our_backbones_equal_a_loop_over_the_same_blocks(make):
    """Hooks on the blocks of a twin see what its blocks returned; none of them knows of taps."""
    model, twin, kept = make().train(), make().train(), sample_kept(3, N, 0.5)
    seen: dict[int, Tensor] = {}
    for index in range(6):
        twin.blocks[index].register_forward_hook(lambda _, __, out, index=index: seen.__setitem__(index, out))
    for one in (model, twin):
        apply_tread(one, Route(1, 4, 0.5)).arm([kept], num_tokens=N)
    taps = tap_blocks(model, range(6))
    out, tapped = model(*inputs()), taps.read()
    assert torch.equal(out, twin(*inputs()))
    for index in range(6):
        assert torch.equal(tapped[index].tokens, seen[index])
        assert tapped[index].tokens.shape[1] == (8 if 1 <= index <= 4 else 16)
    tapped[3].tokens.square().sum().backward()
    seen[3].square().sum().backward()
    for (name, one), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name  # None for blocks behind the tap and the final layer
        assert one.grad is None or torch.equal(one.grad, other.grad), name


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


def test_a_target_on_all_tokens_is_reduced_with_the_kept_ids():
    model = Busy().train()
    apply_tread(model, Route(1, 4, 0.5), shared=True)
    taps = tap_blocks(model, 2)
    model(tokens())
    feature, kept = taps.read()[2]
    assert kept.shape == (4, 8) and take_kept(tokens(), kept).shape == feature.shape


def test_a_model_that_checkpoints_reentrantly_is_refused():
    class Reentrant(Busy):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=True)
            return x

    model = Reentrant().train()
    tap_blocks(model, 2)
    with pytest.raises(RoutingError, match='block 2 is called inside of reentrant activation checkpointing'):
        model(tokens().requires_grad_())


def test_taps_stand_beside_each_other_come_and_go_and_leave_evaluation_alone():
    model, plain = Busy().train(), Busy().train()
    one, other = tap_blocks(model, [1, 3]), tap_blocks(model, 3, evaluation=True)
    model(tokens())
    assert torch.equal(one.read()[3].tokens, other.read()[3].tokens)
    model.eval()(tokens())
    assert isinstance(other.read()[3], Tapped)
    with pytest.raises(RoutingError, match='no forward pass went through block 1'):
        one.read()
    model.train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # without the tensors of a graph
        twin(tokens())
    model(tokens())
    assert one.read()[3].tokens.shape[1] == 8
    one.remove()
    model(tokens())
    remove_tread(model)
    assert other.read()[3].tokens.shape[1] == 8 and routing.used
    assert torch.equal(model(tokens()), plain(tokens())) and other.read()[3].kept is None
    other.remove()
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
