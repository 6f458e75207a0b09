"""What a model does between the blocks of a route, or hands past them, is seen: nothing there may count positions."""

import copy
import warnings

import pytest
import torch
from torch import nn

from tests.routing.small import Block, Busy, N, explicit, tokens
from tread_composer.routing import Route, RoutingError, apply_tread, put_back, remove_tread, sample_kept


def pose(model, x):
    """As WanAnimate: something for a range of positions."""
    return torch.cat([x[:, :4] + 1.0, x[:, 4:]], dim=1)


def pose_in_place(model, x):
    with torch.no_grad():
        x[:, :4] += 1.0
    return x


def over_time(model, x):
    """Two samples are two frames of one video; a mean over them."""
    frames = x.unflatten(0, (-1, 2))
    return (frames + frames.mean(dim=1, keepdim=True)).flatten(0, 1)


def prepend(model, x):
    return torch.cat([x[:, :1] * 0.0, x], dim=1)


CHANGED = 'between block 2 and block 3 of .blocks. the model itself changes the tokens. On the route only 8 of 16'


@pytest.mark.parametrize(
    ('work', 'message'),
    [
        (pose, CHANGED),
        (pose_in_place, CHANGED),
        (over_time, CHANGED),
        (prepend, 'between block 2 and block 3 .* adds or drops them there.* End the route at block 2, or begin'),
        (lambda model, x: x.unflatten(0, (2, 2)).flatten(1, 2), 'between block 2 and block 3 .* it folds'),
        (lambda model, x: model.norm(x), r'treats each token alone .* say ordered=True'),
    ],
)
def test_work_between_two_blocks_of_a_route_is_refused_by_name(work, message):
    model = Busy(work).train()
    apply_tread(model, Route(1, 4, 0.5))
    with pytest.raises(RoutingError, match=message):
        model(tokens())


@pytest.mark.parametrize('ordered', [False, True])
def test_what_fails_in_the_models_own_code_on_a_route_is_explained(ordered):
    """As the residuals of a ControlNet, N entries, added to K tokens between two blocks."""
    model = Busy(lambda model, x: x + torch.ones(1, N, 1)).train()
    apply_tread(model, Route(1, 4, 0.5), ordered=ordered)
    message = r"must match the size.*\n'blocks' was on its route, blocks 1 to 4, where 8 of 16 tokens .*ControlNet"
    for copied in (model, copy.deepcopy(model)):
        with pytest.raises(RuntimeError, match=message):
            copied(tokens())
    remove_tread(model)
    assert model(tokens()).shape[1] == N


@pytest.mark.parametrize('at', [0, 1, 5])
def test_work_outside_of_a_route_is_the_models_own_affair(at):
    model = Busy(pose, at).train()
    routing = apply_tread(model, Route(1, 4, 0.5))
    model(tokens())
    assert routing.checked is True


def test_work_on_each_token_alone_is_let_through_in_words():
    model, kept = Busy(lambda model, x: model.norm(x)).train(), sample_kept(4, N, 0.5)
    blocks = list(model.blocks)
    apply_tread(model, Route(1, 4, 0.5), ordered=True).arm([kept], num_tokens=N)
    expected = explicit(
        blocks, tokens(), [(1, 4)], [kept], between=lambda index, x: model.norm(x) if index == 3 else x
    )  # fmt: skip
    assert torch.equal(model(tokens()), expected)


@pytest.mark.parametrize('compiled', ['no', 'partly', 'whole'])
def test_tokens_that_are_added_on_the_way_are_counted_also_where_nothing_is_probed(compiled):
    model = Busy(prepend).train()
    apply_tread(model, Route(1, 4, 0.5), ordered=True).arm([sample_kept(4, N, 0.5)], num_tokens=N)
    torch._dynamo.reset()
    run = model if compiled == 'no' else torch.compile(model, backend='eager', fullgraph=compiled == 'whole')
    # Torch keeps only the name of an error that is raised while it traces a whole graph.
    message = 'RoutingError' if compiled == 'whole' else '8 tokens went onto the route and 9 came off it'
    with pytest.raises(Exception, match=message):
        run(tokens())
    with pytest.raises(ValueError, match='9 tokens came off the route and 8 went onto it'):
        put_back(torch.zeros(1, N, 2), torch.zeros(1, 9, 2), torch.arange(8)[None])


def test_tokens_that_are_written_to_while_they_wait_are_noticed():
    waiting = []

    def overwrite(model, x):
        waiting[0].zero_()
        return x

    model = Busy(overwrite, at=4).train()
    model.blocks[0].register_forward_hook(lambda _, __, out: waiting.append(out))
    apply_tread(model, Route(1, 4, 0.5))
    with torch.no_grad(), pytest.raises(RoutingError, match='tokens that skip it were changed in place'):
        model(tokens())


def test_a_hook_on_the_route_is_told_how_many_tokens_it_sees():
    model, seen = Busy().train(), []
    model.blocks[3].register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    model.blocks[5].register_forward_hook(lambda *_: None)
    apply_tread(model, Route(1, 4, 0.5))
    with pytest.warns(UserWarning, match=r'have hooks, which see 8 of 16 tokens \(tests\..*lambda> on 1 .*tap_blocks'):
        model(tokens())
    assert seen == [8]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(tokens())


class Reading(Busy):
    """As REPA's SiT: a projection of the tokens behind block ``at - 1``, for a loss on features."""

    def __init__(self, at):
        super().__init__(self.read, at)
        self.projector = nn.Linear(8, 3)

    @staticmethod
    def read(model, x):
        model.zs = model.projector(x)
        return x


@pytest.mark.parametrize(('at', 'named'), [(1, False), (3, True), (4, True), (5, False)])
def test_a_model_that_reads_its_tokens_on_the_route_is_told_how_many_they_are(at, named):
    model, plain = Reading(at).double().train(), Busy().double().train()
    routing, kept = apply_tread(model, Route(1, 4, 0.5)), sample_kept(4, N, 0.5)
    routing.arm([kept], num_tokens=N)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        (model(tokens().double()).square().sum() + model.zs.square().sum()).backward()
    texts = [str(warning.message) for warning in caught if 'the model reads' in str(warning.message)]
    expected = [f"block {at - 1} of 'blocks': the model reads what it returned"] if named else []
    assert [text.partition(' (')[0] for text in texts] == expected
    assert all('8 of 16 tokens. tap_blocks' in text for text in texts)
    if at == 1:  # all tokens, before the route takes its own
        return
    # Looking changes no gradient but by the order of a sum: those of the loop written out, with the same reading.
    read = []

    def note(index, x):
        read.extend([x] if index == at else [])
        return x

    out = explicit(list(plain.blocks), tokens().double(), [(1, 4)], [kept], between=note)
    (out.square().sum() + model.projector(read[0]).square().sum()).backward()
    for parameter, reference in zip(model.blocks.parameters(), plain.blocks.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-10, atol=1e-10)


def test_a_route_that_skips_nothing_says_so():
    model = Busy().train()
    apply_tread(model, Route(1, 4, 0.5))
    with pytest.warns(UserWarning, match=r'nothing is skipped on route 0: .* got 1 tokens for each of 16 samples'):
        model(tokens(4).transpose(0, 1)[:, :1])
    model = Busy().train()
    apply_tread(model, Route(1, 4, 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        model(tokens())


class Long(nn.Module):
    """Long skip connections as in U-ViT and HunyuanDiT: the last blocks receive what the first ones returned."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(skips=index >= 4) for index in range(8))

    def forward(self, x):
        skips = []
        for index, block in enumerate(self.blocks):
            x = block(x) if index < 4 else block(x, skip=skips.pop())
            if index < 4:
                skips.append(x)
        return x


def test_long_skip_connections_within_a_route_are_sound_and_pass_the_check():
    model, kept = Long().train(), sample_kept(4, N, 0.5)
    routing = apply_tread(model, Route(2, 5, 0.5))
    routing.arm([kept], num_tokens=N)
    blocks, outputs = list(model.blocks), []
    late = [lambda x, at=at: blocks[at](x, skip=outputs[7 - at]) for at in range(4, 8)]
    expected = explicit([*blocks[:4], *late], tokens(), [(2, 5)], [kept], outputs)
    with warnings.catch_warnings():  # blocks of the route that read earlier ones are no strangers
        warnings.simplefilter('error')
        out = model(tokens())
        out.sum().backward()
    assert torch.equal(out, expected)
    assert routing.checked is True


@pytest.mark.parametrize('ordered', [False, True])
@pytest.mark.parametrize(
    ('route', 'message'),
    [
        (Route(2, 4, 0.5), r"block 5 of 'blocks', behind the route.*\n'skip' \(.*8, 8.*both ends"),
        (Route(3, 6, 0.5), r"block 5 of 'blocks' failed on 8 of 16.*\n.*'skip' .*long skip connection"),
    ],
)
def test_a_long_skip_connection_across_the_edge_of_a_route_is_explained(route, message, ordered):
    model = Long().train()
    apply_tread(model, route, ordered=ordered)
    with pytest.raises(RoutingError, match=message):
        model(tokens())


@pytest.mark.parametrize('kind', [list, nn.ModuleList])
def test_another_list_of_the_same_blocks_is_refused_by_name(kind):
    model = Busy()
    model.early = kind(list(model.blocks)[:3])
    with pytest.raises(ValueError, match=r"'early' holds blocks of 'blocks'.*unnoticed"):
        apply_tread(model, Route(1, 4, 0.5), blocks='blocks')
