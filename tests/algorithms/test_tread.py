"""``Tread`` through a real ``Trainer``."""

import pytest
import torch
import yaml
from composer import ComposerModel, Evaluator
from composer.core import DataSpec
from composer.loggers import InMemoryLogger
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.data import DataLoader

from tests.helpers import Lengths, assert_equal_weights, fit, loader, make_trainer, tiny_model, trainer_of, weights
from tread_composer.algorithms.tread import Route, Tread
from tread_composer.config.schema import native, signature_model
from tread_composer.config.validation import check
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.routing import Routing, RoutingError

ROUTE = {'start': 1, 'end': -2, 'selection_rate': 0.5}


def losses(*algorithms, **keywords):
    return [float.fromhex(loss) for loss in fit(algorithms, **keywords)[1].losses]


def trained(*algorithms, **keywords):
    """The lengths that the blocks saw, the kept ids of each forward pass, and what was logged."""
    logger, model, kept = InMemoryLogger(), keywords.pop('model', None) or tiny_model(), []
    trainer = make_trainer(model, algorithms, loggers=[logger], **keywords)
    model.denoiser.register_forward_pre_hook(lambda *_: kept.append(model.denoiser.blocks.routing.kept))
    log = Lengths([model.denoiser.blocks[index] for index in range(6)])
    trainer.fit()
    return log.seen, kept, {name: [value for _, value in rows] for name, rows in logger.data.items()}


def test_routes_are_fresh_in_every_batch_and_other_for_every_sample():
    seen, kept, _ = trained(Tread(**ROUTE), data=lambda: loader(shuffle=False))
    assert seen == [16, 8, 8, 8, 8, 16] * 6
    rows = torch.cat([ids[0] for ids in kept]).tolist()
    assert len({tuple(row) for row in rows}) == len(rows) == 48


def test_several_routes_draw_tokens_of_their_own():
    routes = [Route(0, 1, 0.25), {'start': 3, 'end': 4, 'selection_rate': 0.75}]
    seen, _, logged = trained(Tread(routes=routes), max_duration='1ba')
    assert seen == [12, 12, 16, 4, 4, 16]
    assert logged['tread/route_0/kept_tokens'] == [12] and logged['tread/route_1/selection_rate'] == [0.75]
    _, ((a, b),), _ = trained(Tread(routes=[Route(0, 1), Route(3, 4)]), max_duration='1ba')
    assert all(x != y for x, y in zip(a.tolist(), b.tolist(), strict=True))


@pytest.mark.parametrize('always_keep', [3, [2, 1]])
def test_tokens_that_are_always_kept_are_counted_and_seen(always_keep):
    seen, kept, logged = trained(Tread(**ROUTE, always_keep=always_keep), max_duration='2ba')
    assert seen == [16, 10, 10, 10, 10, 16] * 2  # 3 + 13 - int(13 / 2)
    assert logged['tread/kept_tokens'] == [10, 10]
    fixed = [0, 1, 2] if always_keep == 3 else [0, 1, 15]
    assert all(set(fixed) <= set(row) for ids in kept for row in ids[0].tolist())


def test_a_shared_route_is_one_for_all_microbatches_also_the_last_that_is_smaller():
    settings = {'device_train_microbatch_size': 3, 'data': lambda: loader(shuffle=False)}
    _, kept, _ = trained(Tread(**ROUTE, shared=True), **settings)
    assert len(kept) == 6 * 3 and all(ids.shape == (1, 8) for (ids,) in kept)
    batches = [[ids for (ids,) in kept[index : index + 3]] for index in range(0, 18, 3)]
    assert all(torch.equal(ids, batch[0]) for batch in batches for ids in batch)
    assert len({tuple(batch[0][0].tolist()) for batch in batches}) == 6
    small = losses(Tread(**ROUTE, shared=True), device_train_microbatch_size=3)
    assert small == pytest.approx(losses(Tread(**ROUTE, shared=True)), rel=1e-5)


def test_the_model_may_be_trained_again_with_it_and_then_densely_without_it():
    model = tiny_model()
    for algorithms, lengths in (([Tread(**ROUTE)], [16, 8, 8, 8, 8, 16]), ([], [16] * 6)):
        for _ in range(2):
            log = Lengths([model.denoiser.blocks[index] for index in range(6)])
            fit(algorithms, model=model, max_duration='1ba')
            assert log.seen == lengths


def test_rate_zero_equals_the_run_without_it_bit_for_bit():
    (plain, dense), (routed, zero) = fit(), fit([Tread(1, -2, 0.0)])
    assert dense.losses == zero.losses and len(dense.losses) == 6
    assert_equal_weights(weights(plain), weights(routed))
    assert fit([Tread(**ROUTE)])[1].losses != dense.losses


def test_the_global_generator_is_left_alone():
    states = []
    for algorithms in ([], [Tread(**ROUTE)]):
        fit(algorithms, data=lambda: loader(shuffle=False))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize(
    ('window', 'routed'),
    [
        ({}, [1, 1, 1, 1, 1, 1]),
        ({'end_time': '0.5dur'}, [1, 1, 1, 0, 0, 0]),
        ({'start_time': '2ba'}, [0, 0, 1, 1, 1, 1]),
        ({'start_time': '1ba', 'end_time': '1ep'}, [0, 1, 1, 0, 0, 0]),
    ],
)
def test_routing_is_on_within_its_time_window_only(window, routed):
    seen, _, logged = trained(Tread(**ROUTE, **window))
    assert seen[2::6] == logged['tread/kept_tokens'] == [8 if on else 16 for on in routed]
    assert logged['tread/selection_rate'] == [0.5 * on for on in routed]


def test_a_forward_pass_that_raised_does_not_route_a_batch_after_the_window():
    model = tiny_model()
    trainer = make_trainer(model, [Tread(**ROUTE, end_time='0.5dur')], max_duration='100ba')

    def fail(*_):
        raise RuntimeError('out of luck')

    hook = model.denoiser.final_layer.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match='out of luck'):
        trainer.fit()
    hook.remove()
    trainer.state.max_duration = '2ba'
    trainer.state.timestamp = trainer.state.timestamp.copy(batch=1)
    log = Lengths([model.denoiser.blocks[index] for index in range(6)])
    trainer.fit()
    assert log.seen == [16] * 6


def test_evaluation_and_sampling_are_those_of_the_plain_model_bit_for_bit():
    trainer, _ = fit([Tread(**ROUTE)])
    routed, plain = trainer.state.model, tiny_model()
    assert list(routed.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(routed.state_dict())
    arguments = ([0, 3, 10], [1, 2, 3])
    assert torch.equal(routed.sample(*arguments, num_steps=3), plain.sample(*arguments, num_steps=3))
    results = []
    for model in (routed, plain):
        other = make_trainer(model, eval_dataloader=Evaluator(label='eval', dataloader=loader(shuffle=False)))
        other.eval()
        results.append({name: m.compute().item() for name, m in other.state.eval_metrics['eval'].items()})
    assert results[0]['loss'] == results[1]['loss'] > 0


def test_evaluation_within_training_changes_nothing():
    with_evaluation = losses(Tread(**ROUTE), eval_dataloader=loader(shuffle=False), eval_interval='2ba')
    assert with_evaluation == losses(Tread(**ROUTE))


def test_losses_do_not_depend_on_the_microbatch_size():
    whole, *cut = (losses(Tread(**ROUTE), device_train_microbatch_size=size) for size in (8, 4, 2))
    for values in cut:
        assert values == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize('kind', [CheckpointImpl.NO_REENTRANT, CheckpointImpl.REENTRANT])
def test_losses_do_not_depend_on_activation_checkpointing(kind):
    model = tiny_model()
    for index, block in enumerate(model.denoiser.blocks):
        model.denoiser.blocks[index] = checkpoint_wrapper(block, checkpoint_impl=kind)
    assert losses(Tread(**ROUTE), model=model) == losses(Tread(**ROUTE))


@pytest.mark.parametrize(
    'settings',
    [
        {},  # with routes and times: ``test_contract.py``
        {'token_arguments': ('rope',)},
        {'token_arguments': ()},
        {'token_arguments': {'rope': {'dims': 0, 'after': 'text'}}, 'shared': True, 'always_keep': 2, 'ordered': True},
        {'blocks': ['one', 'two']},
        {'blocks': {'one': {}, 'two': {'always_keep': 3}}, 'always_keep': [0, 4]},
    ],
)
def test_repr_rebuilds_it(settings):
    first = Tread(**settings)
    again = eval(repr(first), {'Tread': Tread, 'Route': Route})
    assert repr(again) == repr(first) and again.state_dict() == first.state_dict()


def test_a_route_that_does_not_fit_is_refused_by_the_trainer():
    with pytest.raises(ValueError, match=r'denoiser\.blocks: the route from block 2 to block 9 does not fit 6 blocks'):
        make_trainer(algorithms=[Tread(2, 9)])
    with pytest.raises(UserError, match=r"token_arguments: 'rope' is one name; write a list"):
        make_trainer(algorithms=[Tread(token_arguments='rope')])


def test_a_checkpoint_of_another_route_is_refused_with_the_difference(tmp_path):
    fit([Tread(**ROUTE)], save_folder=str(tmp_path), save_interval='3ba', max_duration='3ba')
    path = str(tmp_path / 'latest-rank0.pt')
    with pytest.raises(ResumeError, match=r'routes\.0\.end: saved -2, now -3'):
        make_trainer(algorithms=[Tread(1, -3, 0.5)], load_path=path)
    with pytest.raises(ResumeError, match=r"end_time: saved None, now '0.9dur'"):
        make_trainer(algorithms=[Tread(**ROUTE, end_time='0.9dur')], load_path=path)
    # Settings that came later bind a checkpoint only where they are used.
    assert set(Tread(**ROUTE).settings()) == {'routes', 'start_time', 'end_time', 'float32_after'}
    with pytest.raises(ResumeError, match='always_keep: saved absent, now 1'):
        make_trainer(algorithms=[Tread(**ROUTE, always_keep=1)], load_path=path)
    with pytest.raises(ResumeError, match='shared: saved absent, now True'):
        make_trainer(algorithms=[Tread(**ROUTE, shared=True)], load_path=path)
    make_trainer(algorithms=[Tread(**ROUTE, always_keep=0, shared=False)], load_path=path)
    make_trainer(algorithms=[Tread(1, -3, 0.5)], load_path=path, load_weights_only=True)


class Foreign(ComposerModel):
    """Somebody else's model: batches are tuples, nothing is declared."""

    def __init__(self, style: str = 'loop'):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True) for _ in range(6)]
        self.layers = nn.Sequential(*layers) if style == 'sequential' else nn.ModuleList(layers)
        self.head, self.style = nn.Linear(16, 1), style

    def forward(self, batch):
        x, _ = batch
        if self.style == 'sequential':
            x = self.layers(x)
        elif self.style == 'index':
            for index in range(6):
                x = self.layers[index](x)
        else:
            for layer in self.layers:
                x = layer(x)
        return self.head(x)[..., 0]

    def loss(self, outputs, batch):
        return (outputs - batch[1]).square().mean()


def foreign(style='loop', microbatch=8, kind=None, data=None, **settings):
    """Two batches of tuples: what the blocks saw, and the last loss."""
    generator = torch.Generator().manual_seed(3)
    rows = [(torch.randn(12, 16, generator=generator), torch.randn(12, generator=generator)) for _ in range(16)]
    model = (kind or Foreign)(style)
    data, algorithms = data or DataLoader(rows, batch_size=8), [Tread(**ROUTE, **settings)]
    trainer = trainer_of(model, data, algorithms, max_duration='2ba', device_train_microbatch_size=microbatch, seed=1)
    log = Lengths([model.layers[index] for index in range(6)])
    trainer.fit()
    return log.seen, trainer.state.total_loss_dict['loss/train/total']


@pytest.mark.parametrize('style', ['loop', 'sequential'])
@pytest.mark.parametrize('num_tokens', [None, 12])
def test_a_foreign_model_with_tuple_batches(style, num_tokens):
    seen, loss = foreign(style, num_tokens=num_tokens)
    assert seen == [12, 6, 6, 6, 6, 12] * 2
    seen, cut = foreign(style, microbatch=2, num_tokens=num_tokens)
    assert seen == [12, 6, 6, 6, 6, 12] * 8
    assert cut == pytest.approx(loss, rel=1e-5)


class Views(Foreign):
    """Sees two views of each sample, one after the other in its batch."""

    def forward(self, batch):
        x, _ = batch
        both = super().forward((torch.cat([x, x.flip(-1)]), None))
        return both[: len(x)] + both[len(x) :]


@pytest.mark.parametrize('shared', [False, True])
@pytest.mark.parametrize('num_tokens', [None, 12])
def test_two_views_of_each_sample_are_routed_each_on_its_own(monkeypatch, num_tokens, shared):
    kept = []
    original = Routing.kept_ids
    monkeypatch.setattr(Routing, 'kept_ids', lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    seen, _ = foreign(kind=Views, num_tokens=num_tokens, shared=shared)
    assert seen == [12, 6, 6, 6, 6, 12] * 2
    ids = kept[0]
    assert ids.shape == ((1, 6) if shared else (16, 6))
    assert shared or len({tuple(row) for row in ids.tolist()}) > 12  # views do not share a route


class Odd(Foreign):
    def forward(self, batch):
        return super().forward((torch.cat([batch[0], batch[0][:3]]), None))[: len(batch[0])]


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'kind': Odd}, 'the batch has 8 samples, but the block list got 11, which is no multiple'),
        ({'style': 'index'}, 'never iterated over the routed block list'),  # an error, not a dense run
    ],
)
def test_what_is_not_routed_as_a_whole_is_refused(settings, message):
    with pytest.raises(RoutingError, match=message):
        foreign(**settings)


class Numbered(Foreign):
    def forward(self, batch):
        return super().forward((batch['x'], None))

    def loss(self, outputs, batch):
        return (outputs - batch['y']).square().mean()


def test_a_batch_may_hold_numbers_beside_its_samples():
    """Composer itself cannot split them; a DataSpec of the user's can."""
    x, y = torch.randn(4, 12, 16), torch.randn(4, 12)
    data = DataSpec(
        [{'number': torch.tensor(k), 'x': x, 'y': y} for k in range(2)],
        split_batch=lambda batch, _: [batch],
        get_num_samples_in_batch=lambda batch: len(batch['x']),
    )
    seen, _ = foreign(kind=Numbered, data=data, microbatch=4, num_tokens=12)
    assert seen == [12, 6, 6, 6, 6, 12] * 2


@pytest.mark.parametrize(
    ('ids', 'described'),
    [(['a.png'] * 4, 'a list'), (torch.zeros(4, 1).long(), r'shape \(4, 1\)'), (torch.arange(4) - 1, 'int64')],
)
def test_sample_ids_of_another_meaning_are_refused(ids, described):
    batch = {'x': torch.randn(4, 12, 16), 'y': torch.randn(4, 12), 'sample_ids': ids}
    data = DataSpec([batch], get_num_samples_in_batch=lambda batch: 4, split_batch=lambda batch, _: [batch])
    with pytest.raises(UserError, match=f"'sample_ids' of the batch is .*{described}"):
        foreign(kind=Numbered, data=data, microbatch=4)


def test_a_foreign_attribute_of_that_name_is_not_believed():
    model = tiny_model()
    model.denoiser.num_tokens = 1000  # a vocabulary, say
    seen, _, logged = trained(Tread(**ROUTE), model=model, device_train_microbatch_size=4, max_duration='3ba')
    assert seen == [16, 8, 8, 8, 8, 16] * 6
    assert logged['tread/kept_tokens'] == [8, 8, 8]


def test_a_whole_compiled_model_is_said_not_to_be_checked(caplog):
    torch._dynamo.reset()
    fit([Tread(**ROUTE)], compile_config={'backend': 'eager'}, max_duration='2ba')
    assert sum('were not checked' in one.message for one in caplog.records) == 1
    caplog.clear()
    fit([Tread(**ROUTE)], max_duration='2ba')
    assert 'were not checked' not in caplog.text


@pytest.mark.parametrize(
    ('written', 'expected'),
    [
        ('[rope]', ('rope',)),
        ('{attention_mask: [-2, -1]}', {'attention_mask': [-2, -1]}),
        ('{rope: {dims: 0, after: text}}', {'rope': {'dims': 0, 'after': 'text'}}),
    ],
)
def test_yaml_can_write_the_settings(written, expected):
    text = f'{{token_arguments: {written}, blocks: [a, b], always_keep: 4, shared: true, ordered: true}}'
    section, problems = check(signature_model(Tread), yaml.safe_load(text))
    assert problems == []
    tread = Tread(**native(section))
    assert tread.token_arguments == expected and tread.blocks == ['a', 'b'] and tread.always_keep == 4
    text = '{always_keep: [1, 4], blocks: {a: null, b: {always_keep: 7, token_arguments: {rope: 0}}}}'
    section, problems = check(signature_model(Tread), yaml.safe_load(text))
    assert problems == []
    tread = Tread(**native(section))
    assert tread.always_keep == [1, 4]
    assert tread.blocks == {'a': {}, 'b': {'always_keep': 7, 'token_arguments': {'rope': 0}}}
    _, problems = check(signature_model(Tread), {'always_keep': '4', 'shared': 1})
    assert len(problems) == 2
