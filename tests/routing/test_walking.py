"""Walking over a routed list: slices and children route in a forward pass; elsewhere the plain blocks come out."""

import collections
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.helpers import Lengths
from tests.routing.test_between import Busy, N, tokens
from tread_composer.routing import (
    Route,
    RoutingError,
    apply_tread,
    put_back,
    remove_tread,
    routing_of,
    sample_kept,
    take_kept,
)


class Walking(Busy):
    """Its loop is written in the given way."""

    def __init__(self, style: str):
        super().__init__()
        self.style = style

    def forward(self, x):
        if self.style == 'slice':
            for block in self.blocks[:6]:
                x = block(x)
        elif self.style == 'two slices':
            for block in self.blocks[:3]:
                x = block(x)
            for block in self.blocks[3:]:
                x = block(x)
        elif self.style == 'slice of a slice':
            for block in self.blocks[1:][:-1]:
                x = block(x)
        elif self.style == 'every second':
            for block in self.blocks[::2]:
                x = block(x)
        elif self.style == 'sum':
            for block in self.blocks + self.blocks:
                x = block(x)
        return x

    def features(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def explicit(blocks: list[nn.Module], x: Tensor, spans: list[tuple[int, int]], kept: Tensor) -> Tensor:
    full = x
    for index, block in enumerate(blocks):
        if any(index == start for start, _ in spans):
            full, x = x, take_kept(x, kept)
        x = block(x)
        if any(index == end for _, end in spans):
            x = put_back(full, x, kept)
    return x


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
    model, kept = Walking(style).train(), sample_kept(4, N, 0.5)
    expected = explicit(list(model.blocks)[walked], tokens(), spans, kept)
    routing = apply_tread(model, Route(1, 4, 0.5))
    routing.arm([kept], num_tokens=N)
    torch._dynamo.reset()
    run = torch.compile(model, backend='eager', fullgraph=True) if compiled else model
    assert torch.equal(run(tokens()), expected)
    assert routing.used
    dense = explicit(list(model.blocks)[walked], tokens(), [], kept)
    assert torch.equal(model.eval()(tokens()), dense)


@pytest.mark.parametrize(('style', 'message'), [('every second', 'slice of it with step 2'), ('sum', 'sum of lists')])
def test_walks_that_cannot_route_are_refused(style, message):
    model = Walking(style).train()
    apply_tread(model, Route(1, 4, 0.5))
    with pytest.raises(RoutingError, match=message):
        model(tokens())


def test_a_slice_that_is_kept_beside_its_list_routes_with_it():
    model = Walking('slice').train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    model.front = model.blocks[:3]
    log = Lengths(list(model.front))
    _run(model.front, tokens())
    assert log.seen == [16, 8, 8]
    model.eval()
    log.seen.clear()
    _run(model.front, tokens())
    assert log.seen == [16, 16, 16] and routing_of(model) is routing


def _run(blocks: nn.Module, x: Tensor) -> Tensor:
    class Loop(nn.Module):
        def forward(self, x):
            for block in blocks:
                x = block(x)
            return x

    return Loop()(x)


def wrapped_one_by_one(blocks: nn.ModuleList) -> nn.ModuleList:
    for index, block in enumerate(blocks):
        blocks[index] = checkpoint_wrapper(block)
    return blocks


def compiled_one_by_one(blocks: nn.ModuleList) -> nn.ModuleList:
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend='eager')
    return blocks


def checkpointed_in_place(blocks: nn.ModuleList) -> nn.ModuleList:
    """As training scripts do it: the forward of each block is replaced."""

    def around(block):
        original = block.forward
        return lambda *args: checkpoint(original, *args, use_reentrant=False)

    for block in blocks:
        block.forward = around(block)
    return blocks


@pytest.mark.parametrize('work', [wrapped_one_by_one, compiled_one_by_one, checkpointed_in_place])
def test_work_on_the_blocks_in_training_mode_keeps_parameters_and_the_route(work):
    model, kept = Busy().train(), sample_kept(4, N, 0.5)
    expected = explicit(list(copy.deepcopy(model).blocks), tokens(), [(1, 4)], kept)
    apply_tread(model, Route(1, 4, 0.5)).arm([kept], num_tokens=N)
    before = [id(parameter) for parameter in model.parameters()]
    work(model.blocks)
    assert [id(parameter) for parameter in model.parameters()] == before and len(before) == 26
    assert torch.equal(model(tokens()), expected)


def test_lists_made_of_a_routed_one_in_training_mode_hold_the_blocks():
    model = Busy().train()
    apply_tread(model, Route(1, 4, 0.5))
    blocks = [model.blocks[index] for index in range(6)]
    assert list(nn.ModuleList(model.blocks)) == list(model.blocks) == blocks
    assert list(model.blocks + model.blocks) == blocks * 2
    assert list(model.blocks.children()) == blocks
    assert [type(block) for block in model.blocks[2:4]] == [type(block) for block in blocks[2:4]]


def test_a_method_that_is_no_forward_and_is_handed_tokens_routes():
    model, kept = Walking('').train(), sample_kept(4, N, 0.5)
    apply_tread(model, Route(1, 4, 0.5)).arm([kept], num_tokens=N)
    expected = explicit([model.blocks[index] for index in range(6)], tokens(), [(1, 4)], kept)
    assert torch.equal(model.features(tokens()), expected)
    # A loop of one's own around the blocks is no forward pass of the model.
    x = tokens()
    for block in model.blocks:
        x = block(x)
    assert torch.equal(x, explicit(list(model.blocks), tokens(), [], kept))


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_loop_that_is_checkpointed_as_a_closure_is_recomputed_with_its_route(reentrant):
    class Closure(Busy):
        def forward(self, x):
            def run(x):
                for block in self.blocks:
                    x = block(x)
                return x

            return checkpoint(run, x, use_reentrant=reentrant)

    model, kept = Closure().train(), sample_kept(4, N, 0.5)
    twin = copy.deepcopy(model)
    apply_tread(model, Route(1, 4, 0.5), ordered=True).arm([kept], num_tokens=N)
    gradients = []
    for run in (model, lambda x: explicit(list(twin.blocks), x, [(1, 4)], kept)):
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

    model, kept = Chunks().train(), sample_kept(4, N, 0.5)
    apply_tread(model, Route(1, 4, 0.5)).arm([kept], num_tokens=N)
    expected = explicit([model.layers[index] for index in range(6)], tokens(), [(1, 4)], kept)
    assert torch.equal(model(tokens()), expected)


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


class Trunk(Busy):
    """Methods that walk over the blocks themselves, called beside any module's call."""

    def of_mapping(self, batch):
        x = batch['image']['tokens'] if 'image' in batch else batch['tokens']
        for block in self.blocks:
            x = block(x)
        return x

    def of_keywords(self, **batch):
        x = batch['tokens']
        for block in self.blocks:
            x = block(x)
        return x

    def loaded(self, state):
        assert state
        return list(self.blocks)


BATCHES = {
    'mapping': lambda x: {'tokens': x, 'label': None},
    'nested': lambda x: {'image': {'tokens': x}},
    'user dict': lambda x: collections.UserDict(tokens=x),
}


@pytest.mark.parametrize('batch', BATCHES)
def test_a_method_that_takes_a_mapping_of_tensors_routes(batch):
    model, kept = Trunk().train(), sample_kept(4, N, 0.5)
    expected = explicit(list(model.blocks), tokens(), [(1, 4)], kept)
    routing = apply_tread(model, Route(1, 4, 0.5))
    routing.arm([kept], num_tokens=N)
    # No frame but the method's own has the model and a tensor among its arguments.
    assert torch.equal(model.of_mapping(BATCHES[batch](tokens())), expected) and routing.used
    routing.arm([kept], num_tokens=N)
    assert torch.equal(model.of_keywords(tokens=tokens()), expected) and routing.used


def test_a_method_that_takes_a_state_dict_walks_over_the_plain_blocks():
    model = Trunk().train()
    plain = list(model.blocks)
    apply_tread(model, Route(1, 4, 0.5))
    walked = model.loaded(model.state_dict())
    assert all(one is other for one, other in zip(walked, plain, strict=True))
