"""The routed block list, in plain torch and while sampling, against an explicit loop (methods.md section 7)."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper

from tests.helpers import Lengths, tiny_dit
from tests.routing.small import AddOne, Loop, N, explicit, inputs, tokens
from tread_composer.routing import Route, RoutingError, apply_tread, find_blocks, routing_of, sample_kept


def explicit_dit(model, x_BCHW, t_B, labels_B, kept, spans):
    """What enters the final layer of a DiT, by a loop over its blocks."""
    c = model.t_embedder(t_B) + model.y_embedder(labels_B)
    blocks = [lambda x, block=model.blocks[index]: block(x, c) for index in range(len(model.blocks))]
    return explicit(blocks, model.x_embedder(x_BCHW) + model.pos_embed, spans, kept)


def outputs_of(model, *arguments):
    """What enters the final layer: tokens, beside the condition."""
    seen = []
    handle = model.final_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(*arguments)
    handle.remove()
    return seen[0]


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
    kept = [sample_kept(3, N, rate) for _ in spans]
    apply_tread(model, [Route(start, end, rate) for start, end in spans]).arm(kept, num_tokens=N)
    x, t, labels = inputs()
    out = outputs_of(model, x, t, labels)
    expected = explicit_dit(reference, x, t, labels, kept, spans)
    assert torch.equal(out, expected)
    out.square().sum().backward()
    gradient, x.grad = x.grad, None
    expected.square().sum().backward()
    assert torch.equal(gradient, x.grad)
    assert (gradient != 0).all()  # kept and routed positions alike
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name


def test_evaluation_draws_nothing_and_repeats_itself():
    model, plain = tiny_dit(), tiny_dit()
    apply_tread(model, Route(1, 4, 0.5))
    state = torch.get_rng_state()
    outs = [model.eval()(*inputs()) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*outs) and torch.equal(outs[0], plain.eval()(*inputs()))


def test_without_armed_ids_every_forward_draws_its_own():
    model = tiny_dit().train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    assert not torch.equal(model(*inputs()), model(*inputs()))
    routing.disarm()
    assert torch.equal(model(*inputs()), tiny_dit().train()(*inputs()))


def test_names_length_indexing_slices_and_attaching_twice():
    model, plain = tiny_dit(), tiny_dit()
    assert routing_of(model) is None
    routing = apply_tread(model, Route(1, 4, 0.5))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert len(model.blocks) == 6 and isinstance(model.blocks, nn.ModuleList)
    assert [type(b) for b in model.blocks[1:3]] == [type(b) for b in plain.blocks[1:3]]
    assert list(model.blocks[1:4].train()) == [model.blocks[index] for index in (1, 2, 3)]  # a slice does not route
    assert routing_of(nn.Sequential(model)) is routing_of(nn.Sequential(model.blocks[:2])) is routing
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


# 'whole' recomputes the loop itself, so its ids must still be armed then: Tread disarms after the backward pass.
RECOMPUTED = [
    *itertools.product(['plain', 'enumerate', 'zip', 'checkpoint'], [1, 2], ['kept', 'replaced', 'disarmed']),
    ('whole', 1, 'kept'),
]


@pytest.mark.parametrize('wrapper', [None, CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
@pytest.mark.parametrize(('style', 'forwards', 'afterwards'), RECOMPUTED)
def test_gradients_are_exact_whatever_recomputes(style, wrapper, forwards, afterwards):
    kept = [sample_kept(4, N, 0.5, generator=torch.Generator().manual_seed(i)) for i in range(forwards)]
    model, plain = Loop(style).train(), Loop().train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    for blocks in (model.blocks, plain.blocks) if wrapper is not None else ():
        for index in range(6):
            blocks[index] = checkpoint_wrapper(blocks[index], checkpoint_impl=wrapper)
    x, y = tokens().requires_grad_(), tokens().requires_grad_()
    total, expected = torch.zeros(()), torch.zeros(())
    for ids in kept:
        routing.arm([ids], num_tokens=N)
        total = total + model(x).square().sum()
        expected = expected + explicit(plain.blocks, y, [(1, 4)], [ids]).square().sum()
    if afterwards == 'replaced':
        routing.arm([sample_kept(4, N, 0.5)], num_tokens=N)
    if afterwards == 'disarmed':
        routing.disarm()
    total.backward()
    expected.backward()
    assert torch.equal(x.grad, y.grad)
    for (name, parameter), reference in zip(model.blocks.named_parameters(), plain.blocks.parameters(), strict=True):
        assert torch.equal(parameter.grad, reference.grad), name


def test_the_block_behind_the_route_runs_in_float32_on_request():
    model = tiny_dit().train()
    dtypes = []
    for index in range(6):
        model.blocks[index].attn.qkv.register_forward_hook(lambda _, __, out: dtypes.append(out.dtype))
    apply_tread(model, Route(1, 3, 0.5), float32_after=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        model(*inputs())
    assert dtypes == [torch.bfloat16] * 4 + [torch.float32] + [torch.bfloat16]


class Two(AddOne):
    """Each block returns text and image."""

    class Block(AddOne.Block):
        def forward(self, text, image):
            return text + self.one, image + self.one

    def forward(self, text, image):
        for block in self.blocks:
            text, image = block(text, image=image)
        return text, image


def test_tuple_outputs_need_a_name_and_then_work():
    def routed(**settings):
        model = Two(6).train()
        apply_tread(model, Route(1, 4, 0.5), tokens='image', **settings)
        return model(torch.zeros(2, 3, 4), torch.zeros(2, N, 4))

    text, image = routed(tokens_out=1)
    assert text.unique().tolist() == [6.0] and image.unique().tolist() == [2.0, 6.0]
    with pytest.raises(RoutingError, match=r'tokens_out=0'):
        routed()
    with pytest.raises(RoutingError, match='tokens_out: 2 is outside of the tuple of 2'):
        routed(tokens_out=2)


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


class Gating(AddOne):
    """Writes on its blocks in its loop."""

    def forward(self, x):
        for index, block in enumerate(self.blocks):
            block.one.data.fill_(10.0**index)
            block.gate = index
            x = block(x)
        return x


def test_what_a_model_writes_on_its_blocks_in_the_loop_arrives_there():
    model = Gating(4).train()
    apply_tread(model, Route(1, 2, 0.5))
    assert model(torch.zeros(2, N, 3)).unique().tolist() == [1001.0, 1111.0]
    assert [model.blocks[index].gate for index in range(4)] == [0, 1, 2, 3]


def test_finding_the_list():
    assert find_blocks(tiny_dit())[0] == 'blocks'
    two = nn.ModuleDict({'a': tiny_dit(), 'b': tiny_dit()})
    assert find_blocks(two, 'b.blocks') == ('b.blocks', two['b'].blocks)
    for model, path, message in (
        (two, None, r"'a\.blocks' \(6 blocks\), 'b\.blocks' \(6 blocks\).*blocks='"),
        (nn.Linear(2, 2), None, 'found none'),
        (two, 'c.blocks', r"no module 'c\.blocks'"),
        (two, 'a', 'is a DiT'),
    ):
        with pytest.raises(ValueError, match=message):
            find_blocks(model, path)


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
