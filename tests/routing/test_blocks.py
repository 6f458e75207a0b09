"""The routed block list, in plain torch, against an explicit loop (methods.md section 7)."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from tests.helpers import Lengths, tiny_dit
from tread_composer.routing import (
    Route,
    RoutingError,
    apply_tread,
    find_blocks,
    put_back,
    sample_kept,
    take_kept,
)

N = 16


def inputs(batch_size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch_size, 1, 8, 8, generator=generator, requires_grad=True)
    return x, torch.rand(batch_size, generator=generator), torch.arange(batch_size)


def explicit(model, x_BCHW, t_B, labels_B, kept, spans):
    """DiT's forward with the routes written out as a loop."""
    x = model.x_embedder(x_BCHW) + model.pos_embed
    c = model.t_embedder(t_B) + model.y_embedder(labels_B)
    route = 0
    for index in range(len(model.blocks)):
        start, end = spans[route] if route < len(spans) else (None, None)
        if index == start:
            full, x = x, take_kept(x, kept[route])
        x = model.blocks[index](x, c)
        if index == end:
            x, route = put_back(full, x, kept[route]), route + 1
    return x, c


def outputs_of(model, *arguments):
    """What enters the final layer: tokens and condition."""
    seen = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args))
    model(*arguments)
    handle.remove()
    return seen[0]


class AddOne(nn.Module):
    """``depth`` blocks that each add one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x_BND):
            return x_BND + self.one

    def __init__(self, depth: int):
        super().__init__()
        self.blocks = nn.ModuleList(AddOne.Block() for _ in range(depth))

    def forward(self, x_BND):
        for block in self.blocks:
            x_BND = block(x_BND)
        return x_BND


def test_only_kept_tokens_pass_through_the_routed_blocks():
    x_BND, model = torch.randn(2, N, 8), AddOne(6)
    apply_tread(model, Route(1, 4, 0.5))
    change = (model.train()(x_BND) - x_BND).round()[..., 0]
    assert change.unique().tolist() == [2.0, 6.0]
    assert (change == 2.0).sum() == 16


@pytest.mark.parametrize(
    ('depth', 'lengths'), [(12, [16] * 2 + [8] * 7 + [16] * 3), (28, [16] * 2 + [8] * 23 + [16] * 3)]
)
def test_block_call_log(depth, lengths):
    model = tiny_dit(depth=depth)
    apply_tread(model, Route())
    log = Lengths(model.blocks)
    model.train()(*inputs())
    assert log.seen == lengths
    log.seen.clear()
    model.eval()(*inputs())
    assert log.seen == [16] * depth


@pytest.mark.parametrize('spans', [[(1, 4)], [(0, 5)], [(2, 2)], [(0, 1), (3, 4)], [(1, 2), (3, 5)]])
@pytest.mark.parametrize('rate', [0.25, 0.5, 0.75])
def test_forward_and_every_gradient_equal_the_explicit_loop(spans, rate):
    model, reference = tiny_dit().train(), tiny_dit().train()
    routes = [Route(start, end, rate) for start, end in spans]
    kept = [sample_kept(3, N, rate) for _ in spans]
    apply_tread(model, routes).arm(kept, num_tokens=N)
    x, t, labels = inputs()
    tokens, _ = outputs_of(model, x, t, labels)
    expected, _ = explicit(reference, x, t, labels, kept, spans)
    assert torch.equal(tokens, expected)
    tokens.square().sum().backward()
    gradient, x.grad = x.grad, None
    expected.square().sum().backward()
    assert torch.equal(gradient, x.grad)
    assert (gradient != 0).all()  # kept and routed positions alike
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_rate_zero_is_the_dense_model_to_the_bit():
    model, dense = tiny_dit().train(), tiny_dit().train()
    apply_tread(model, Route(1, 4, 0.0))
    assert torch.equal(model(*inputs()), dense(*inputs()))


def test_identity_blocks_on_the_route_give_the_dense_model_with_identities():
    class Identity(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x, c):
            return x

    model, dense = tiny_dit().train(), tiny_dit().train()
    for index in range(1, 5):
        model.blocks[index], dense.blocks[index] = Identity(), Identity()
    apply_tread(model, Route(1, 4, 0.75), blocks='blocks')
    assert torch.equal(model(*inputs()), dense(*inputs()))


def test_a_routed_token_is_unseen_on_the_route_and_seen_behind_it():
    model = tiny_dit().train()
    kept_BK = torch.arange(0, N, 2).expand(3, -1)
    apply_tread(model, Route(1, 4, 0.5)).arm([kept_BK], num_tokens=N)
    seen: dict[int, Tensor] = {}
    for index in range(6):
        block = model.blocks[index]
        block.register_forward_hook(lambda _, __, out, index=index: seen.__setitem__(index, out))
    changed = [None]
    model.blocks[0].register_forward_hook(lambda _, __, out: out if changed[0] is None else out + changed[0])
    model(*inputs())
    before = dict(seen)
    delta = torch.zeros(3, N, 16)
    delta[:, 1] = 1.0  # token 1 is routed
    changed[0] = delta
    model(*inputs())
    for index in range(1, 5):
        assert torch.equal(before[index], seen[index])
    assert not torch.equal(before[5][:, 0], seen[5][:, 0])  # a kept token, behind the route


def test_evaluation_draws_nothing_and_repeats_itself():
    model, plain = tiny_dit(), tiny_dit()
    apply_tread(model, Route(1, 4, 0.5))
    state = torch.get_rng_state()
    first, second = model.eval()(*inputs()), model.eval()(*inputs())
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, second) and torch.equal(first, plain.eval()(*inputs()))


def test_without_armed_ids_every_forward_draws_its_own():
    model = tiny_dit().train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    assert not torch.equal(model(*inputs()), model(*inputs()))
    routing.disarm()
    assert torch.equal(model(*inputs()), tiny_dit().train()(*inputs()))


def test_names_length_indexing_slices_and_attaching_twice():
    model, plain = tiny_dit(), tiny_dit()
    routing = apply_tread(model, Route(1, 4, 0.5))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(model.blocks) == 6 and isinstance(model.blocks, nn.ModuleList)
    assert [type(b) for b in model.blocks[1:3]] == [type(b) for b in plain.blocks[1:3]]
    assert list(model.blocks[1:4].train()) == [model.blocks[index] for index in (1, 2, 3)]  # a slice does not route
    assert apply_tread(model, Route(1, 4, 0.5)) is routing
    with pytest.raises(ValueError, match='routed already with other settings'):
        apply_tread(model, Route(1, 4, 0.25))


def test_pickle_and_deepcopy_keep_the_route_and_share_nothing():
    model = tiny_dit().train()
    apply_tread(model, Route(1, 4, 0.5))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        log = Lengths(twin.blocks)
        twin.blocks.routing.arm([sample_kept(3, N, 0.5)], num_tokens=N)
        model.blocks.routing.disarm()
        twin(*inputs())
        assert log.seen == [16, 8, 8, 8, 8, 16]


class Loop(nn.Module):
    """A model whose loop is written in the given way."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, hidden, rope=None, scale=None):
            q, k, v = self.qkv(hidden).chunk(3, dim=-1)
            if rope is not None:
                q, k = q * rope.cos() + q.flip(-1) * rope.sin(), k * rope.cos() + k.flip(-1) * rope.sin()
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v)
            return hidden + self.out(mixed) * (1 if scale is None else scale)

    def __init__(self, style: str = 'plain', rope: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Loop.Block() for _ in range(6))
        self.style, self.rope = style, rope

    def forward(self, x):
        positions = torch.arange(x.shape[1] * 8.0).view(1, -1, 8).expand(len(x), -1, -1) * 0.01 if self.rope else None
        if self.style == 'plain':
            for block in self.blocks:
                x = block(x, positions)
        elif self.style == 'enumerate':
            for _, block in enumerate(self.blocks):
                x = block(x, rope=positions)
        elif self.style == 'zip':
            for block, scale in zip(self.blocks, [1.0] * 6, strict=True):
                x = block(hidden=x, rope=positions, scale=scale)
        elif self.style == 'checkpoint':
            for block in self.blocks:
                x = checkpoint(block, x, positions, use_reentrant=False)
        elif self.style == 'whole':
            x = checkpoint(self.run, x, positions, use_reentrant=False)
        return x

    def run(self, x, positions):
        for block in self.blocks:
            x = block(x, positions)
        return x


# 'whole' recomputes the loop itself, so its ids must still be armed then: Tread disarms after the backward pass.
RECOMPUTED = [
    *itertools.product(['plain', 'enumerate', 'zip', 'checkpoint'], [1, 2], ['kept', 'replaced', 'disarmed']),
    ('whole', 1, 'kept'),
]


@pytest.mark.parametrize('wrapper', [None, CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
@pytest.mark.parametrize(('style', 'forwards', 'afterwards'), RECOMPUTED)
def test_gradients_are_exact_whatever_recomputes(style, wrapper, forwards, afterwards):
    x = torch.randn(3, N, 8, generator=torch.Generator().manual_seed(1))
    kept = [sample_kept(3, N, 0.5, generator=torch.Generator().manual_seed(i)) for i in range(forwards)]

    def gradients(routed: bool):
        model = Loop(style if routed else 'plain').train()
        if routed:
            routing = apply_tread(model, Route(1, 4, 0.5))
        if wrapper is not None:
            for index in range(6):
                model.blocks[index] = checkpoint_wrapper(model.blocks[index], checkpoint_impl=wrapper)
        total, start = torch.zeros(()), x.clone().requires_grad_()
        for ids in kept:
            if routed:
                routing.arm([ids], num_tokens=N)
                total = total + model(start).square().sum()
            else:
                h, blocks = start, [model.blocks[i] for i in range(6)]
                h = blocks[0](h)
                full, h = h, take_kept(h, ids)
                for block in blocks[1:5]:
                    h = block(h)
                total = total + blocks[5](put_back(full, h, ids)).square().sum()
        if routed and afterwards == 'replaced':
            routing.arm([sample_kept(3, N, 0.5)], num_tokens=N)
        if routed and afterwards == 'disarmed':
            routing.disarm()
        total.backward()
        return {'x': start.grad} | {
            name.replace('_checkpoint_wrapped_module.', ''): p.grad for name, p in model.named_parameters()
        }

    routed, reference = gradients(True), gradients(False)
    assert routed.keys() == reference.keys()
    for name, gradient in reference.items():
        assert torch.equal(routed[name], gradient), name


def test_rotary_tables_follow_their_tokens():
    """Kept ids in another order move tokens and table alike: the restored output stays."""
    model = Loop('zip', rope=True).train()
    routing = apply_tread(model, Route(1, 4, 0.5), token_arguments=('rope',))
    x, kept_BK = torch.randn(3, N, 8), sample_kept(3, N, 0.5)
    routing.arm([kept_BK], num_tokens=N)
    expected = model(x)
    routing.arm([kept_BK[:, torch.randperm(8)]], num_tokens=N)
    assert torch.allclose(model(x), expected, atol=1e-6)

    forgetful = Loop('plain', rope=True).train()
    apply_tread(forgetful, Route(1, 4, 0.5))
    with pytest.raises(RuntimeError, match=r"failed on 8 of 16 tokens.*\n.*'rope'"):  # the table is longer
        forgetful(x)


def test_a_token_argument_of_another_length_is_refused_by_name():
    class Short(Loop):
        def forward(self, x):
            for block in self.blocks:
                x = block(x, torch.zeros(3, 5, 8))
            return x

    model = Short().train()
    apply_tread(model, Route(0, 4, 0.5), token_arguments=('rope',))
    with pytest.raises(RoutingError, match="token argument 'rope': expected a tensor of 3 samples x 16 tokens"):
        model(torch.randn(3, N, 8))


@pytest.mark.parametrize('device_type', ['cpu'])
def test_the_block_behind_the_route_runs_in_float32_on_request(device_type):
    model = tiny_dit().train()
    dtypes = []
    for index in range(6):
        model.blocks[index].attn.qkv.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    apply_tread(model, Route(1, 3, 0.5), float32_after=True)
    with torch.autocast(device_type, dtype=torch.bfloat16):
        model(*inputs())
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] + [torch.bfloat16]


def test_a_sequential_is_routed_too():
    model = nn.Sequential(*(AddOne.Block() for _ in range(6))).train()
    apply_tread(model, Route(1, 4, 0.5))
    assert model(torch.zeros(2, N, 3)).unique().tolist() == [2.0, 6.0]


def test_tuple_outputs_need_a_name_and_then_work():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, text, image):
            return text + self.one, image + self.one

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Pair() for _ in range(6))

        def forward(self, text, image):
            for block in self.blocks:
                text, image = block(text, image=image)
            return text, image

    unnamed = Two().train()
    apply_tread(unnamed, Route(1, 4, 0.5), tokens='image')
    with pytest.raises(RoutingError, match=r'tokens_out=0'):
        unnamed(torch.zeros(2, 3, 4), torch.zeros(2, N, 4))
    named = Two().train()
    apply_tread(named, Route(1, 4, 0.5), tokens='image', tokens_out=1)
    text, image = named(torch.zeros(2, 3, 4), torch.zeros(2, N, 4))
    assert text.unique().tolist() == [6.0] and image.unique().tolist() == [2.0, 6.0]
    outside = Two().train()
    apply_tread(outside, Route(1, 4, 0.5), tokens='image', tokens_out=2)
    with pytest.raises(RoutingError, match='tokens_out: 2 is outside of the tuple of 2'):
        outside(torch.zeros(2, 3, 4), torch.zeros(2, N, 4))


def test_what_a_model_writes_on_its_blocks_in_the_loop_arrives_there():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.one = 0.0, nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x + self.gate * self.one

    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Gated() for _ in range(4))

        def forward(self, x):
            for index, block in enumerate(self.blocks):
                block.gate = 10.0**index
                x = block(x)
            return x

    model = Loop().train()
    apply_tread(model, Route(1, 2, 0.5))
    assert model(torch.zeros(2, N, 3)).unique().tolist() == [1001.0, 1111.0]


def test_finding_the_list():
    assert find_blocks(tiny_dit())[0] == 'blocks'
    two = nn.ModuleDict({'a': tiny_dit(), 'b': tiny_dit()})
    with pytest.raises(ValueError, match=r"'a\.blocks' \(6 blocks\), 'b\.blocks' \(6 blocks\).*blocks='"):
        find_blocks(two)
    assert find_blocks(two, 'b.blocks') == ('b.blocks', two['b'].blocks)
    with pytest.raises(ValueError, match='found none'):
        find_blocks(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no module 'c\.blocks'"):
        find_blocks(two, 'c.blocks')
    with pytest.raises(ValueError, match='is a DiT'):
        find_blocks(two, 'a')


def test_mistakes_are_refused_in_words():
    with pytest.raises(ValueError, match=r'blocks: the route from block 2 to block 9 does not fit 6 blocks'):
        apply_tread(tiny_dit(), Route(2, 9))
    with pytest.raises(ValueError, match=r"tokens: DiTBlock\.forward has no argument 'hidden'"):
        apply_tread(tiny_dit(), Route(1, 4), tokens='hidden')
    model = tiny_dit().train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    routing.arm([sample_kept(3, 64, 0.5)], num_tokens=64)
    with pytest.raises(ValueError, match='drawn for 64 tokens, the block list got 16'):
        model(*inputs())
    routing.arm([sample_kept(2, N, 0.5)], num_tokens=N)
    with pytest.raises(ValueError, match='kept ids for 2 samples, but the block list got 3'):
        model(*inputs())
