"""What a route leaves alone and what goes along with it: first tokens, shared routes, tables, several lists."""

import pickle
from typing import Any

import pytest
import torch
from torch import nn

from tests.routing.small import AddOne, N
from tread_composer.routing import Route, RoutingError, apply_tread, routing_of, sample_kept


@pytest.mark.parametrize('always_keep', [3, [3, 2]])
def test_tokens_at_the_ends_never_skip(always_keep):
    x_BND, model = torch.randn(50, N, 3), AddOne(6)
    routing = apply_tread(model, Route(1, 4, 0.75), always_keep=always_keep)
    change = (model.train()(x_BND) - x_BND).round()[..., 0]
    lead, trail = routing.always_keep
    assert (lead, trail) == (3, 0 if always_keep == 3 else 2)
    free = change[:, lead : N - trail]
    assert (change[:, :lead] == 6).all() and (change[:, N - trail :] == 6).all()
    assert (free == 6).sum(dim=1).eq(13 - trail - int((13 - trail) * 0.75)).all()
    assert ((free == 6).sum(dim=0) > 0).all()  # each of the others stays sometimes


def test_one_route_for_all_samples():
    x_BND, model = torch.randn(5, N, 3), AddOne(6)
    routing = apply_tread(model, Route(1, 4, 0.5), shared=True)
    for ids in (None, [sample_kept(1, N, 0.5)]):
        if ids:
            routing.arm(ids, num_tokens=N)
        change = (model.train()(x_BND) - x_BND).round()[..., 0]
        assert (change == change[0]).all() and (change[0] == 6).sum() == 8
    several = apply_tread(AddOne(6), Route(1, 4, 0.5))
    several.arm([sample_kept(1, N, 0.5)], num_tokens=N)
    with pytest.raises(ValueError, match='kept ids for 1 samples, but the block list got 5'):
        several.kept_ids(0, x_BND)


class Tables(AddOne):
    """Each block looks up its tokens in tables of several layouts, and says what it saw."""

    class Block(AddOne.Block):
        def forward(self, x, pair=None, mask=None, text=None):
            self.seen = pair if mask is None else mask
            return x + self.one


def looked_up(settings, kept, **tables):
    model = Tables(3).train()
    routing = apply_tread(model, Route(1, 1, 0.5), ordered=True, **settings)
    routing.arm([kept], num_tokens=N)
    model(torch.randn(2, N, 4), **tables)
    return model.blocks[1].seen


def arguments(**settings):
    return {'token_arguments': settings}


KEPT, BOTH = torch.tensor([[0, 3, 9], [0, 2, 15]]), torch.arange(2)[:, None]
TEXT = torch.randn(2, 5, 7)
WIDE = torch.randn(2, 4, N, N)
BEHIND = torch.cat([KEPT, torch.arange(N, N + 5).expand(2, -1)], dim=1)  # 5 entries behind those of the tokens
LAYOUTS = [
    (arguments(mask=-1), torch.randn(2, N), lambda x: x[BOTH, KEPT]),
    (arguments(mask=[-2, -1]), WIDE, lambda x: torch.stack([x[b][:, KEPT[b]][:, :, KEPT[b]] for b in range(2)])),
    ({'token_arguments': ['mask']}, torch.randn(1, N, 3), lambda x: x[0][KEPT]),  # one for all samples
    (arguments(mask={'dims': 1, 'before': 'text'}), torch.randn(2, N + 5), lambda x: x[BOTH, BEHIND]),
    (arguments(mask={'dims': 1, 'before': 5}), torch.randn(2, N + 5), lambda x: x[BOTH, BEHIND]),
    (
        arguments(mask={'dims': -1, 'after': 2, 'before': 'text'}), torch.randn(2, 2 + N + 5),
        lambda x: x[BOTH, torch.cat([torch.arange(2).expand(2, -1), 2 + BEHIND], dim=1)],
    ),
    (  # no row for the class token
        {**arguments(mask={'dims': 1, 'without_first': 1}), 'always_keep': 1}, torch.randn(2, N - 1, 6),
        lambda x: x[BOTH, KEPT[:, 1:] - 1],
    ),
]  # fmt: skip


@pytest.mark.parametrize(('settings', 'table', 'expected'), LAYOUTS)
def test_tables_of_any_layout_follow_their_tokens(settings, table, expected):
    assert torch.equal(looked_up(settings, KEPT, mask=table, text=TEXT), expected(table))


def test_a_pair_of_tables_follows_one_route_for_all():
    table, places = (torch.randn(5 + N, 6), torch.randn(5 + N, 6)), torch.tensor([0, 1, 2, 3, 4, 5, 8, 14])
    for after, text in (('text', TEXT), (5, None)):
        settings = {**arguments(pair={'dims': 0, 'after': after}), 'shared': True}
        seen = looked_up(settings, KEPT[:1], pair=table, text=text)
        assert type(seen) is tuple and all(torch.equal(a, b[places]) for a, b in zip(seen, table, strict=True))


def test_members_of_tuples_and_dicts():
    image, text = torch.randn(2, N, 6), torch.randn(2, 5, 6)
    seen = looked_up(arguments(pair={'dims': 1, 'members': [0]}), KEPT, pair=(image, text, None))
    assert torch.equal(seen[0], image[BOTH, KEPT]) and seen[1] is text and seen[2] is None
    seen = looked_up({'token_arguments': ['pair']}, KEPT, pair=[image, None])
    assert type(seen) is list and torch.equal(seen[0], image[BOTH, KEPT]) and seen[1] is None
    tables = {'image': image, 'text': text}
    seen = looked_up(arguments(pair={'dims': 1, 'members': ['image']}), KEPT, pair=tables)
    assert torch.equal(seen['image'], image[BOTH, KEPT]) and seen['text'] is text
    assert tables['image'] is image  # the model's own


class Growing(nn.Module):
    """A second list whose sequence has text in front of the tokens of the first, and more behind."""

    def __init__(self):
        super().__init__()
        self.a, self.b = AddOne(3).blocks, Tables(3).blocks

    def forward(self, x, mask):
        for block in self.a:
            x = block(x)
        x = torch.cat([torch.zeros(len(x), 4, 3), x, torch.zeros(len(x), 2, 3)], dim=1)
        for block in self.b:
            x = block(x, mask=mask)
        return x[:, 4:-2]


@pytest.mark.parametrize('armed', [True, False])
def test_lists_with_settings_of_their_own_keep_the_same_tokens_on_one_route(armed):
    model, x = Growing().train(), torch.randn(2, N, 3)
    own = {'a': None, 'b': {'always_keep': [4, 2], 'token_arguments': {'mask': 1}}}
    routing = apply_tread(model, Route(1, 4, 0.5), blocks=own, shared=True)
    kept, mask = sample_kept(1, N, 0.5), torch.randn(2, N + 6)
    asked = []
    if armed:
        routing.arm([kept], num_tokens=N)
    else:  # the sampler too is asked in the layout of the first list
        routing.arm(sampler=lambda route, batch, num_tokens: asked.append(num_tokens) or kept)
    change = (model(x, mask) - x).round()[0, :, 0]
    assert change.tolist() == [6.0 if index in kept[0] else 2.0 for index in range(N)]
    places = torch.cat([torch.arange(4), kept[0] + 4, torch.arange(2) + N + 4])
    assert torch.equal(model.b[0].seen, mask[:, places])
    assert asked == ([] if armed else [N, N])


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'token_arguments': {'pair': 0}}, r"'pair' counts tokens in dimension 0.*shared=True"),
        ({'token_arguments': 'pair'}, r"'pair' is one name; write a list, \['pair'\]"),
        ({'token_arguments': ['rope']}, "token_arguments: Block.forward has no argument 'rope'"),
        ({'token_arguments': {'pair': []}}, r"'pair': \[\] names no dimensions"),
        ({'token_arguments': {'pair': [1, 1]}}, r"'pair': \[1, 1\] names no dimensions"),
        ({'token_arguments': {'pair': 'all'}}, "'pair': 'all' names no dimensions"),
        ({'token_arguments': {'pair': True}}, "'pair': True names no dimensions"),
        ({'token_arguments': {'pair': {'dim': 1}}}, r"'pair': \{'dim': 1\} is not understood"),
        ({'token_arguments': {'pair': {'dims': 1, 'after': 'prompt'}}}, "'pair': after: .* no argument 'prompt'"),
        ({'token_arguments': {'pair': {'dims': 1, 'after': -1}}}, 'after: -1 is not a number of tokens or an'),
        ({'token_arguments': {'pair': {'dims': 1, 'before': True}}}, 'before: True is not a number of tokens or'),
        (
            {'token_arguments': {'pair': {'dims': 1, 'without_first': -1}}},
            'without_first: -1 is not a number of tokens',
        ),
        (
            {'token_arguments': {'pair': {'dims': 1, 'without_first': 2}}, 'always_keep': 1},
            "'pair' has no entry for the first 2 tokens, so these must never skip: always_keep=2",
        ),
        ({'token_arguments': {'pair': {'dims': 1, 'members': []}}}, r"'pair': members: \[\] is no list of places"),
        ({'token_arguments': {'pair': {'dims': 1, 'members': 'cos'}}}, "'pair': members: 'cos' is no list of places"),
        ({'always_keep': [1, 2, 3]}, r'always_keep: \[1, 2, 3\] is not a number of tokens; give 0 or more, or \['),
        ({'always_keep': [1, -2]}, r'always_keep: \[1, -2\] is not a number of tokens'),
        (
            {'blocks': {'blocks': {'rate': 0.5}}},
            r"blocks: 'blocks': \{'rate': 0.5\}: expected settings of one list",
        ),
        ({'blocks': {'blocks': 3}}, "blocks: 'blocks': 3: expected settings of one list"),
        ({'tokens_out': -1}, 'tokens_out: -1 is no position in a tuple; count from 0'),
        ({'tokens_out': True}, 'tokens_out: True is no position'),
        ({'tokens_out': 'hidden'}, "tokens_out: 'hidden' is no position"),
        ({'always_keep': -1}, 'always_keep: -1 is not a number of tokens'),
        ({'always_keep': True}, 'always_keep: True is not a number of tokens'),
        ({'blocks': []}, 'names no list'),
        ({'blocks': ['blocks', 'blocks']}, 'one of them twice'),
    ],
)
def test_wrong_settings_are_refused_in_words(settings, message):
    with pytest.raises(ValueError, match=message):
        apply_tread(Tables(3), Route(1, 1, 0.5), **settings)


MISFITS = [
    ({'mask': -1}, {'mask': torch.zeros(2, 1, 1, 5)}, r"'mask': expected .* 16 tokens in dimension -1, .*1, 1, 5\)"),
    ({'mask': 3}, {'mask': torch.zeros(2, N)}, r"'mask': expected a tensor with 16 tokens in dimension 3"),
    (['mask'], {'mask': torch.zeros(4, N)}, r"'mask': expected a tensor of 2 samples x 16 tokens"),
    (['mask'], {'mask': 'all'}, "'mask': .* the block got a str"),
    ({'pair': {'dims': 1, 'after': 3}}, {'pair': torch.zeros(2, N)}, '16 tokens after 3 others in dimension 1'),
    (
        {'pair': {'dims': 1, 'after': 'text'}}, {'pair': torch.zeros(2, N)},
        "of 'text', which should be .* got nothing",
    ),
    (
        {'pair': {'dims': 1, 'members': [-1]}}, {'pair': (torch.zeros(2, N), None)},
        r"'pair': members \['-1'\] are not in a tuple",
    ),
    (
        ['pair'], {'pair': (torch.zeros(2, N, 6), torch.zeros(2, 5, 6))},
        r'got a tensor of shape \(2, 5, 6\) \(member 1; where not all follow, name',
    ),
    (
        {'pair': {'dims': 1, 'members': [0]}}, {'pair': torch.zeros(2, N, 6)},
        r"'pair': a tensor of shape .* has no members",
    ),
    ({'pair': -2}, {'pair': torch.randn(N, 6)}, r"'pair': .* has no dimension for the samples.*shared=True"),
    (['pair'], {'pair': torch.randn(N, 6)}, r"Is it dimension \[0\].*\{'pair': \[0\]\}, shared=True"),
]  # fmt: skip


@pytest.mark.parametrize(('settings', 'tables', 'message'), MISFITS)
def test_tables_that_do_not_fit_are_refused_by_name(settings, tables, message):
    with pytest.raises(RoutingError, match=message):
        looked_up({'token_arguments': settings}, torch.tensor([[0, 3], [1, 2]]), **tables)


def test_ids_of_ones_own_must_be_shared_where_a_table_has_no_samples():
    with pytest.raises(RoutingError, match=r"'pair': .* has no dimension for the samples.*shared=True"):
        looked_up({**arguments(pair=0), 'shared': True}, KEPT, pair=torch.randn(N, 6))


class Declaring(Tables):
    """Says itself what belongs to its blocks' tokens, as the backbones of this package do."""

    def __init__(self):
        super().__init__(3)
        self.token_arguments: Any = {'mask': -1}


def test_what_the_model_declares_is_the_default_and_what_is_said_counts_more():
    kept, mask = torch.tensor([[0, 3], [1, 2]]), torch.randn(2, 1, N)
    for settings, seen in (({}, 2), ({'token_arguments': {'mask': 2}}, 2), ({'token_arguments': ()}, N)):
        model = nn.ModuleDict({'inner': Declaring()}).train()
        routing = apply_tread(model, Route(1, 1, 0.5), ordered=True, **settings)
        routing.arm([kept], num_tokens=N)
        model['inner'](torch.randn(2, N, 4), mask=mask)
        assert model['inner'].blocks[1].seen.shape[-1] == seen
    foreign = Declaring()
    foreign.token_arguments = lambda text: text.split()  # something else of that name
    assert apply_tread(foreign, Route(1, 1, 0.5)).settings.lists[0].token_arguments == ()
    foreign = Declaring()
    foreign.token_arguments = ['rope']
    with pytest.raises(ValueError, match=r"token_arguments: Block\.forward has no argument 'rope'"):
        apply_tread(foreign, Route(1, 1, 0.5))


class TwoLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = AddOne(3).blocks, AddOne(4).blocks

    def forward(self, x):
        for block in self.a:
            x = block(x)
        x = 2 * x
        for block in self.b:
            x = block(x)
        return x


@pytest.mark.parametrize('spans', [[(1, 5)], [(0, 2)], [(3, 6)], [(0, 0), (2, 3), (5, 6)]])
def test_several_lists_count_as_one_and_a_route_may_cross_their_border(spans):
    model, kept = TwoLists().train(), [sample_kept(2, N, 0.5) for _ in spans]
    routing = apply_tread(model, [Route(*span, 0.5) for span in spans], blocks=['a', 'b'])
    routing.arm(kept, num_tokens=N)
    x = torch.randn(2, N, 3)
    expected = x.clone()
    for index in range(7):
        expected = 2 * expected if index == 3 else expected
        on = [ids for (start, end), ids in zip(spans, kept, strict=True) if start <= index <= end]
        added = torch.zeros(2, N, 1).scatter_(1, on[0][..., None], 1.0) if on else 1.0
        expected = expected + added
    assert torch.equal(model(x), expected)
    assert routing.used and routing_of(model) is routing
    assert list(model.state_dict()) == list(TwoLists().state_dict())
    twin = pickle.loads(pickle.dumps(model))
    assert twin.a.routing is twin.b.routing is routing_of(twin) is not routing
    assert torch.equal(twin(x), expected)


class Halting(TwoLists):
    """Indexes the blocks of its first list, and runs the second only if asked."""

    def forward(self, x, second=True):
        for index in range(3):
            x = self.a[index](x)
        for block in self.b if second else ():
            x = block(x)
        return x


def test_a_list_that_is_passed_by_is_named():
    model = Halting().train()
    routing = apply_tread(model, Route(1, 5, 0.5), blocks=['a', 'b'])
    model(torch.zeros(2, N, 3), second=False)
    assert not routing.used and routing.unused_paths == ['a', 'b']
    model(torch.zeros(2, N, 3))
    assert not routing.used and routing.unused_paths == ['a']
    TwoLists.forward(model, torch.zeros(2, N, 3))
    assert routing.used and routing.unused_paths == []


def test_parts_that_were_routed_one_by_one_have_no_routing_together():
    model = nn.ModuleDict({'one': AddOne(3), 'two': AddOne(3)})
    one, two = (apply_tread(model[name], Route(0, 1, 0.5)) for name in model)
    assert routing_of(model['one']) is one and routing_of(model['two']) is two
    with pytest.raises(ValueError, match=r"2 routings, of 'one\.blocks', 'two\.blocks'"):
        routing_of(model)
