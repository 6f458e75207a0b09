"""Walking over a routed list: slices and children route in a forward pass; elsewhere the plain blocks come out."""

import collections
import copy

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers import Lengths
from tests.routing.small import Busy, N, explicit, tokens
from tread_composer.routing import Route, RoutingError, apply_tread, remove_tread, routing_of, sample_kept

WALKS = {
    'slice': lambda blocks: [blocks[:6]],
    'two slices': lambda blocks: [blocks[:3], blocks[3:]],
    'slice of a slice': lambda blocks: [blocks[1:][:-1]],
    'every second': lambda blocks: [blocks[::2]],
    'sum': lambda blocks: [blocks + blocks],
}


class Walking(Busy):
    """Its loop is written in the given way."""

    style = ''

    def forward(self, x):
        for part in WALKS[self.style](self.blocks) if self.style else [self.blocks]:
            x = self.walk(part, x)
        return x

    def features(self, x):
        return self.walk(self.blocks, x)

    def of_mapping(self, batch):
        return self.walk(self.blocks, batch['image']['tokens'] if 'image' in batch else batch['tokens'])

    def of_keywords(self, **batch):
        return self.walk(self.blocks, batch['tokens'])

    def loaded(self, state):
        assert state
        return list(self.blocks)


def routed(model: nn.Module, **settings):
    """A model with an armed route from 1 to 4, a plain copy of its blocks, and the kept ids."""
    plain, kept = next(copy.deepcopy(model).children()), sample_kept(4, N, 0.5)
    routing = apply_tread(model.train(), Route(1, 4, 0.5), **settings)
    routing.arm([kept], num_tokens=N)
    return routing, plain, kept


@pytest.mark.parametrize('compiled', [False, True])
@pytest.mark.parametrize(
    ('style', 'walked', 'spans'),
    [
        ('slice', slice(0, 6), [(1, 4)]),
        ('two slices', slice(0, 6), [(1, 2), (3, 4)]),  # put back at the end of the first, as between two lists
        ('slice of a slice', slice(1, 5), [(0, 3)]),
    ],
)
def test_a_slice_routes_for_it_knows_its_range(style, walked, spans, compiled):
    model = Walking()
    model.style = style
    routing, blocks, kept = routed(model)
    torch._dynamo.reset()
    run = torch.compile(model, backend='eager', fullgraph=True) if compiled else model
    assert torch.equal(run(tokens()), explicit(blocks[walked], tokens(), spans, [kept] * len(spans)))
    assert routing.used
    assert torch.equal(model.eval()(tokens()), explicit(blocks[walked], tokens(), [], []))


@pytest.mark.parametrize(('style', 'message'), [('every second', 'slice of it with step 2'), ('sum', 'sum of lists')])
def test_walks_that_cannot_route_are_refused(style, message):
    model = Walking()
    model.style = style
    routed(model)
    with pytest.raises(RoutingError, match=message):
        model(tokens())


def test_a_slice_that_is_kept_beside_its_list_routes_with_it():
    class Loop(nn.Module):
        def forward(self, blocks, x):
            for block in blocks:
                x = block(x)
            return x

    model = Walking()
    routing, _, _ = routed(model)
    model.front = model.blocks[:3]
    log = Lengths(list(model.front))
    Loop()(model.front, tokens())
    model.eval()
    Loop()(model.front, tokens())
    assert log.seen == [16, 8, 8, 16, 16, 16] and routing_of(model) is routing


def wrapped(block: nn.Module) -> nn.Module:
    return checkpoint_wrapper(block)


def compiled(block: nn.Module) -> nn.Module:
    return torch.compile(block, backend='eager')


def checkpointed_in_place(block: nn.Module) -> nn.Module:
    """As training scripts do it: the forward of each block is replaced."""
    original = block.forward
    block.forward = lambda *args: checkpoint(original, *args, use_reentrant=False)
    return block


@pytest.mark.parametrize('work', [wrapped, compiled, checkpointed_in_place])
def test_work_on_the_blocks_in_training_mode_keeps_parameters_and_the_route(work):
    model = Busy()
    _, blocks, kept = routed(model)
    before = [id(parameter) for parameter in model.parameters()]
    for index, block in enumerate(model.blocks):
        model.blocks[index] = work(block)
    assert [id(parameter) for parameter in model.parameters()] == before and len(before) == 26
    assert torch.equal(model(tokens()), explicit(blocks, tokens(), [(1, 4)], [kept]))


def test_lists_made_of_a_routed_one_in_training_mode_hold_the_blocks():
    model = Busy()
    routed(model)
    blocks = [model.blocks[index] for index in range(6)]
    assert list(nn.ModuleList(model.blocks)) == list(model.blocks) == list(model.blocks.children()) == blocks
    assert list(model.blocks + model.blocks) == blocks * 2
    assert [type(block) for block in model.blocks[2:4]] == [type(block) for block in blocks[2:4]]


METHODS = {
    'tokens': lambda model, x: model.features(x),
    'mapping': lambda model, x: model.of_mapping({'tokens': x, 'label': None}),
    'nested': lambda model, x: model.of_mapping({'image': {'tokens': x}}),
    'user dict': lambda model, x: model.of_mapping(collections.UserDict(tokens=x)),
    'keywords': lambda model, x: model.of_keywords(tokens=x),
}


@pytest.mark.parametrize('call', METHODS)
def test_a_method_that_is_no_forward_and_is_handed_tokens_routes(call):
    """No frame but the method's own has the model and a tensor among its arguments."""
    model = Walking()
    routing, blocks, kept = routed(model)
    expected = explicit(blocks, tokens(), [(1, 4)], [kept])
    assert torch.equal(METHODS[call](model, tokens()), expected) and routing.used


def test_a_loop_of_ones_own_and_a_method_that_takes_a_state_dict_walk_over_the_plain_blocks():
    model = Walking()
    plain = list(model.blocks)
    routed(model)
    x = tokens()
    for block in model.blocks:
        x = block(x)
    assert torch.equal(x, explicit(plain, tokens(), [], []))
    assert all(a is b for a, b in zip(model.loaded(model.state_dict()), plain, strict=True))


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_loop_that_is_checkpointed_as_a_closure_is_recomputed_with_its_route(reentrant):
    class Closure(Busy):
        def forward(self, x):
            def run(x):
                return self.walk(self.blocks, x)

            return checkpoint(run, x, use_reentrant=reentrant)

    model = Closure()
    _, blocks, kept = routed(model, ordered=True)
    gradients = []
    for run in (model, lambda x: explicit(blocks, x, [(1, 4)], [kept])):
        x = tokens().requires_grad_()
        run(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_checkpoint_sequential_walks_over_children_and_routes():
    class Chunks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*Busy().blocks)

        def forward(self, x):
            return checkpoint_sequential(self.layers, 2, x, use_reentrant=False)

    model = Chunks()
    _, blocks, kept = routed(model)
    assert torch.equal(model(tokens()), explicit(blocks, tokens(), [(1, 4)], [kept]))


def test_the_plain_model_comes_back():
    model, plain = Busy().train(), Busy().train()
    apply_tread(model, Route(1, 4, 0.5))
    with pytest.raises(ValueError, match=r"routes: \['1 to 4 at rate 0.5'\], requested: \['2 to 3"):
        apply_tread(model, Route(2, 3, 0.5))
    remove_tread(model)
    assert type(model.blocks) is nn.ModuleList and vars(model.blocks).keys() == vars(plain.blocks).keys()
    assert torch.equal(model(tokens()), plain(tokens())) and routing_of(model) is None
    log = Lengths(list(model.blocks))
    apply_tread(model, Route(2, 3, 0.25))
    model(tokens())
    assert log.seen == [16, 16, 12, 12, 16, 16]
    remove_tread(nn.Linear(1, 1))
