"""The composition contract: each algorithm of ours alone and beside each of the others makes the same promises.

It trains, evaluates densely, draws what a run without it draws, saves, resumes to the bit in the middle of an epoch,
does not care for the order of the algorithms, and says itself in its ``repr``. Where Composer's partner cannot, the run
is refused with the reason, by a Trainer written by hand and by the loader of YAML files alike.
"""

import ast
import itertools
import math
import re
from pathlib import Path

import composer.algorithms as theirs
import pytest
import torch
from composer import Callback
from torch import nn

from tests.algorithms.settings import (
    ALL,
    BATCHES,
    OURS,
    PAIRS,
    Run,
    Seen,
    built,
    expected_tokens,
    foreign,
    model,
    objective,
    prepared,
    refusal,
    same,
    saved,
    train,
)
from tests.helpers import make_trainer, weights
from tests.runs import YAMLS
from tread_composer.algorithms.direction_schedule import DirectionSchedule
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.maskdit import MaskDiT
from tread_composer.algorithms.power_ema import PowerEMA
from tread_composer.algorithms.tread import Route, Tread
from tread_composer.config import load_config
from tread_composer.config.errors import ConfigError
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.run.plan import format_plan, make_plan

pytestmark = pytest.mark.filterwarnings('ignore')  # Composer's, of what is tried here on purpose

TOGETHER = [pair for pair in PAIRS if not refusal(pair)]
REFUSED = [pair for pair in PAIRS if refusal(pair)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """``PowerEMA`` writes its snapshots into the folder where the run is started."""
    monkeypatch.chdir(tmp_path)


def ids(pair):
    return ' + '.join(pair)


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
    """Runs without any algorithm, by objective, with their checkpoints."""
    runs = {}
    for kind in ('flow_matching', 'direction', 'edm'):
        folder = tmp_path_factory.mktemp(kind)
        runs[kind] = train([], kind, folder), folder
    return runs


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """The uninterrupted run of a pair, made once, and the folder that it saves to if it can."""
    runs: dict[tuple[str, ...], tuple[Run, Path]] = {}

    def run(pair: tuple[str, ...]) -> tuple[Run, Path]:
        if pair not in runs:
            folder = tmp_path_factory.mktemp('whole')
            unsaved = any(ALL[name].unsaved for name in pair)
            runs[pair] = train(built(pair), objective(pair), None if unsaved else folder), folder
        return runs[pair]

    return run


@pytest.mark.parametrize('pair', TOGETHER, ids=ids)
def test_trains_and_evaluates_in_any_order_on_the_same_draws(pair, plain, whole):
    kind = objective(pair)
    (first, _), second = whole(pair), train(built(pair)[::-1], kind)
    losses = [float.fromhex(loss) for loss in first.recorder.losses]
    assert len(losses) == BATCHES and all(map(math.isfinite, losses))
    after = weights(first.trainer)
    moved = [name for name, value in first.before.items() if not torch.equal(value, after[name])]
    assert len(moved) > len(first.before) * 0.8
    passes = 2 if 'sam' in pair else 1
    assert first.recorder.batches == [row for row in plain[kind][0].recorder.batches for _ in range(passes)]
    assert first.seen.training == expected_tokens(pair)
    assert first.seen.evaluation == [[16] * 4] * 2 and all(map(math.isfinite, first.metrics.values()))
    assert first.recorder.losses == second.recorder.losses and first.metrics == second.metrics
    others = tuple(name for name in pair if not ALL[name].observes)
    if others != pair:
        assert first.recorder.losses == (whole(others)[0] if others else plain[kind][0]).recorder.losses
    if 'composer_ema' not in pair:  # which leaves its average in the model after a checkpoint
        assert same(after, weights(second.trainer)) == []


RESUMED = [
    (pair, at)
    for pair in TOGETHER
    for at in ((2, 4) if len(pair) == 1 else (2,))  # 4 is the end of an epoch
    if not any(ALL[name].unsaved or ALL[name].unresumed for name in pair)
]


@pytest.mark.parametrize(('pair', 'at'), RESUMED, ids=lambda value: ids(value) if isinstance(value, tuple) else value)
def test_resumes_to_the_bit_in_another_order_of_the_algorithms(pair, at, whole, tmp_path):
    first, folder = whole(pair)
    (path,) = folder.glob(f'ep*-ba{at}-rank0.pt')
    second = train(built(pair)[::-1], objective(pair), tmp_path, load_path=str(path))
    assert second.recorder.losses == first.recorder.losses[at:]
    assert second.recorder.batches == first.recorder.batches[at:]
    assert second.metrics == first.metrics
    assert same(saved(folder), saved(tmp_path)) == []


@pytest.mark.parametrize('pair', REFUSED, ids=ids)
def test_what_cannot_stand_together_is_refused_with_the_reason(pair):
    for algorithms in (built(pair), built(pair)[::-1]):
        with pytest.raises(UserError, match=refusal(pair)):
            prepared(algorithms, objective(pair))


@pytest.mark.parametrize('pair', [p for p in TOGETHER if any(ALL[name].unsaved for name in p)], ids=ids)
def test_what_cannot_be_saved_is_refused_where_the_run_saves(pair, tmp_path):
    reason = ''.join(ALL[name].unsaved for name in pair)
    for algorithms in (built(pair), built(pair)[::-1]):
        with pytest.raises(UserError, match=f'{reason}.*train without saving'):
            prepared(algorithms, objective(pair), tmp_path)


@pytest.mark.parametrize('pair', [p for p in TOGETHER if any(ALL[name].unresumed for name in p)], ids=ids)
def test_what_cannot_be_resumed_saves_and_is_refused_to_go_on(pair, whole):
    reason, kind = ''.join(ALL[name].unresumed for name in pair), objective(pair)
    run, folder = whole(pair)
    assert same(saved(folder)['model'], weights(run.trainer)) == []
    path = str(folder / 'ep0-ba2-rank0.pt')
    for algorithms in (built(pair), built(pair)[::-1]):
        with pytest.raises(ResumeError, match=f'{reason}.*load_weights_only: true'):
            prepared(algorithms, kind, load_path=path)
    prepared(built(pair), kind, load_path=path, load_weights_only=True)


@pytest.mark.parametrize('name', OURS)
def test_repr_is_the_call_that_makes_it_again(name):
    first = OURS[name].make()
    again = eval(repr(first), {'__builtins__': {}, **{one.__name__: one for one in OURS[name].names}})
    assert repr(again) == repr(first) and again.state_dict() == first.state_dict()
    calls = {node.func.id for node in ast.walk(ast.parse(repr(first))) if isinstance(node, ast.Call)}
    assert calls <= {one.__name__ for one in OURS[name].names}  # plain values: no object's own words


@pytest.mark.parametrize('name', OURS)
def test_a_checkpoint_with_it_and_a_run_without_it_and_the_other_way_round(name, plain, whole):
    entry, kind = OURS[name], objective((name,))
    assert type(entry.make()).required_on_load() is entry.required_on_load
    with_it, without = (str(folder / 'ep0-ba2-rank0.pt') for _, folder in (whole((name,)), plain[kind]))
    if entry.gone:
        with pytest.raises((RuntimeError, KeyError), match=entry.gone):
            prepared([], kind, load_path=with_it)
    else:
        rest = train([], kind, load_path=with_it)
        assert rest.seen.training == [[16] * 4] * (BATCHES - 2)
    if entry.new:
        with pytest.raises(ResumeError, match=entry.new):
            prepared([entry.make()], kind, load_path=without)
    else:
        rest = train([entry.make()], kind, load_path=without)
        assert rest.recorder.losses == plain[kind][0].recorder.losses[2:]


@pytest.mark.parametrize('name', OURS)
def test_twice_in_the_list_is_refused(name):
    remedy = re.escape('One routes several lists: blocks=[...]' if OURS[name].names[0] is Tread else 'Take one out')
    with pytest.raises(UserError, match=f'the run has two.* {remedy}'):
        prepared([OURS[name].make(), OURS[name].make()], objective((name,)))


WRONG = [
    (Tread, {'selection_rate': 1.5}, 'selection_rate: 1.5'),
    (Tread, {'routes': []}, 'routes is empty'),
    (Tread, {'routes': [Route()], 'start': 3}, 'not both'),
    (Tread, {'end_time': '92%'}, "end_time: '92%' is not a time"),
    (Tread, {'start_time': '10sec'}, 'wall-clock'),
    (Tread, {'end_time': '5tok'}, 'no token count'),
    (Tread, {'start_time': '0.9dur', 'end_time': '0.1dur'}, 'nothing would be routed'),
    (Tread, {'end_time': '92dur'}, "end_time: '92dur' is no time within a run"),
    (Tread, {'start_time': '-5ba'}, "start_time: '-5ba' is no time within a run"),
    (Tread, {'routes': Route()}, 'is no list of routes'),
    (Tread, {'routes': {'start': 2}}, 'is no list of routes'),
    (Tread, {'routes': [{'start': 2, 'stop': 5}]}, "'stop': 5} is no route; write Route"),
    (Tread, {'always_keep': 1.5}, r'always_keep: 1\.5 is not a number of tokens'),
    (Tread, {'always_keep': -2}, 'always_keep: -2 is not a number of tokens'),
    (Tread, {'always_keep': [1]}, r'always_keep: \[1\] is not a number of tokens'),
    (Tread, {'num_tokens': '6'}, "Tread: num_tokens: '6' must be a whole number"),
    (MaskDiT, {'mask_ratio': '0.5'}, "mask_ratio: '0.5' must be a number"),
    (MaskDiT, {'mae_weight': None}, 'mae_weight: None must be a number'),
    (MaskDiT, {'decoder_depth': '8'}, "decoder_depth: '8' must be a whole number"),
    (MaskDiT, {'decoder_hidden_size': 8.0}, 'decoder_hidden_size: 8.0 must be a whole number'),
    (MaskDiT, {'decoder_num_heads': True}, 'decoder_num_heads: True must be a whole number'),
    (MaskDiT, {'mask_ratio': 1.0}, r'mask_ratio: 1\.0 is not in \[0, 1\)'),
    (MaskDiT, {'mae_weight': -1.0}, 'mae_weight'),
    (MaskDiT, {'unmask': 'cosine9'}, "unmask: 'cosine9' is none of at_once"),
    (MaskDiT, {'unmask': 'cosine4'}, 'unmask_time must be the share'),
    (MaskDiT, {'unmask': 'cosine4', 'unmask_time': '100ba'}, "not '100ba'"),
    (MaskDiT, {'unmask_time': '90%'}, "unmask_time: '90%' is not a time"),
    (MaskDiT, {'unmask_time': '0.9dur', 'mask_ratio': 0.0}, 'masks nothing'),
    (DirectionSchedule, {}, 'give start_time, end_time or both'),
    (DirectionSchedule, {'end_time': '5min'}, "end_time: '5min' is not a time"),
    (DirectionSchedule, {'start_time': '5ba', 'end_time': '5ba'}, 'the loss would never be on'),
    (EMA, {'decay': 1.0}, 'decay: 1.0'),
    (EMA, {'decay': -0.1}, 'decay'),
    (EMA, {'update_interval': '1ep'}, 'not a number of batches'),
    (EMA, {'update_interval': '0ba'}, 'update_interval'),
    (PowerEMA, {'widths': []}, r'widths: \[\] must be one or more'),
    (PowerEMA, {'widths': [0.1, 0.1]}, 'must be one or more, each another'),
    (PowerEMA, {'widths': [0.05, 0.3]}, 'widths: 0.3 is no width'),
    (PowerEMA, {'interval': '0ba'}, "interval: '0ba' is not a time above 0"),
    (PowerEMA, {'interval': '10sec'}, 'interval'),
]


@pytest.mark.parametrize(('algorithm', 'settings', 'message'), WRONG)
def test_wrong_settings_are_refused_at_once(algorithm, settings, message):
    with pytest.raises(ValueError, match=message):
        algorithm(**settings)


class Passes:
    """What the network gets in each training pass, and which tokens block 1 gets of those that block 0 returns."""

    def __init__(self, network: nn.Module, blocks: nn.ModuleList) -> None:
        self.rows: list[tuple] = []
        self.first: list[torch.Tensor] = []
        network.register_forward_pre_hook(self._inputs)
        blocks[0].register_forward_hook(self._outputs)
        blocks[1].register_forward_pre_hook(self._route)

    def _inputs(self, network: nn.Module, args: tuple) -> None:
        if network.training:
            self.rows.append(args)

    def _outputs(self, block: nn.Module, args: tuple, out_BND: torch.Tensor) -> None:
        if block.training:
            self.first.append(out_BND.detach())

    def _route(self, block: nn.Module, args: tuple) -> None:
        if not block.training:
            return
        x_BKD = args[0].detach()
        equal_BKN = (x_BKD[:, :, None] == self.first[-1][:, None]).all(3)
        assert (equal_BKN.sum(2) == 1).all()
        self.rows[-1] += (equal_BKN.int().argmax(2),)


def assert_pairs(passes: Passes, microbatches: int) -> None:
    """Of each batch all microbatches came twice: the same inputs and routes, at other weights."""
    step = 2 * microbatches
    assert len(passes.rows) == 3 * step
    for first in range(0, 3 * step, step):
        middle = first + microbatches
        assert same(passes.rows[first:middle], passes.rows[middle : first + step]) == []
        assert same(passes.first[first:middle], passes.first[middle : first + step]) != []
        assert passes.rows[first][-1].shape[1] == 8
    assert same(passes.rows[0][-1], passes.rows[step][-1]) != []


@pytest.mark.parametrize('microbatch', [4, 2])
@pytest.mark.parametrize('tuples', [False, True])
def test_both_passes_of_a_sam_step_have_the_same_noise_and_the_same_route(microbatch, tuples):
    algorithms = [Tread(1, -2), theirs.SAM(rho=0.1)]
    settings = {'max_duration': '3ba', 'device_train_microbatch_size': microbatch}
    trainer = foreign(*algorithms, **settings) if tuples else prepared(algorithms, **settings).trainer
    network = trainer.state.model.module if tuples else trainer.state.model.denoiser
    passes = Passes(network, network.layers if tuples else network.blocks)
    trainer.fit()
    assert_pairs(passes, 4 // microbatch)


@pytest.mark.parametrize('name', ['tread', 'ema'])
@pytest.mark.parametrize('mode', ['resize', 'crop'])
def test_images_that_grow_in_the_course_of_a_run(name, mode, tmp_path):
    """``ProgressiveResizing`` beside ours, on a model that takes images of any size: 4 tokens, later 9 and 16."""
    finals = []
    for part in ('whole', 'rest'):
        resizing = theirs.ProgressiveResizing(
            mode, initial_scale=0.5, delay_fraction=0.0, finetune_fraction=0.2, size_increment=2
        )
        algorithms = [OURS[name].make(), resizing]
        load = {} if part == 'whole' else {'load_path': str(tmp_path / 'whole' / 'ep0-ba2-rank0.pt')}
        trainer = foreign(
            *(algorithms if part == 'whole' else algorithms[::-1]),
            save_folder=str(tmp_path / part),
            save_interval='2ba',
            **load,
        )
        layers = trainer.state.model.module.layers
        seen = Seen(layers)
        trainer.fit()
        finals.append((seen.training, saved(tmp_path / part)))
    lengths = [4, 4, 9, 9, 16, 16]
    inner = {4: 2, 9: 5, 16: 8} if name == 'tread' else {n: n for n in lengths}
    assert finals[0][0] == [[n, inner[n], inner[n], n] for n in lengths]
    assert finals[1][0] == finals[0][0][2:]
    assert same(finals[0][1], finals[1][1]) == []


def test_a_frozen_layer_stays_and_its_average_goes_on_towards_it():
    average = EMA(0.5)
    run = prepared([average, theirs.LayerFreezing(0.0, 0.7)], max_duration='8ba')  # the first epoch ends after 4
    averages, raw, taking_part = [], [], []

    class Look(Callback):
        def batch_end(self, state, logger):
            averages.append(average.state_dict()['average'])
            raw.append({name: p.detach().clone() for name, p in state.model.named_parameters()})
            taking_part.append({name for name, p in state.model.named_parameters() if p.requires_grad})

    run.trainer.state.callbacks.append(Look())
    run.trainer.fit()
    frozen = taking_part[3] - taking_part[4]
    assert 5 < len(frozen) < len(taking_part[0]) == len(averages[-1])
    for name in frozen:
        assert torch.equal(raw[3][name], raw[7][name]) and not torch.equal(raw[2][name], raw[3][name])
        for before, after in itertools.pairwise(averages[3:]):
            assert torch.allclose(after[name], 0.5 * before[name] + 0.5 * raw[7][name], atol=1e-6)


def test_adaptive_clipping_is_refused_where_weights_start_at_zero():
    """Tried: the head of a fresh DiT stays zero to the last bit, and the loss falls as if nothing were wrong."""
    for name in OURS:
        kind = objective((name,))
        run_model = model(kind)
        nn.init.zeros_(run_model.denoiser.final_layer.linear.weight)
        clipping = theirs.GradientClipping('adaptive', 0.01)
        with pytest.raises(UserError, match='would stay zero'):
            make_trainer(run_model, [clipping, OURS[name].make()])


IN_YAML = [pair for pair in PAIRS if all(ALL[name].yaml for name in pair)]


def loaded(pair, *overrides):
    """``digits.yaml`` with these algorithms and no others."""
    objectives = {'direction': '{name: flow_matching, direction_weight: 1.0}', 'edm': '{name: edm}'}
    kind = objective(pair)
    entries = [f'algorithms.{name}=null' for name in ('ema', 'gradient_clipping') if name not in pair]
    entries += [f'objective={objectives[kind]}'] if kind in objectives else []
    entries += ['algorithms={' + ', '.join(ALL[name].yaml for name in pair) + '}', 'callbacks=null', *overrides]
    return load_config(YAMLS / 'digits.yaml', entries)


@pytest.mark.parametrize('pair', IN_YAML, ids=ids)
def test_yaml_files_are_accepted_and_refused_alike(pair):
    unfit = refusal(pair) or ''.join(ALL[name].unfit for name in pair)
    remedies = [ALL[name].remedy for name in pair if ALL[name].remedy]
    if unfit:
        with pytest.raises(ConfigError, match=rf'algorithms\.[a-z_]+: .*({unfit})'):
            loaded(pair)
    if refusal(pair) or (unfit and not remedies):
        with pytest.raises(ConfigError, match=unfit):
            loaded(pair, *remedies)
    else:
        config = loaded(pair, *remedies)
        assert len(config.algorithms) == len(pair)


def test_a_yaml_that_resumes_sam_is_refused_and_one_that_starts_from_its_weights_is_not():
    load = ('autoresume=false', 'load_path=x.pt')
    with pytest.raises(ConfigError, match=r'algorithms\.sam: .*load_weights_only=true to start a new run'):
        loaded(('ema', 'sam'), *load)
    loaded(('ema', 'sam'), *load, 'load_weights_only=true')


def test_the_name_of_a_layer_that_stochastic_depth_does_not_know_is_refused_too():
    with pytest.raises(ConfigError, match='target_layer_name DiTBlock is not supported'):
        loaded(('tread',), 'algorithms.stochastic_depth={target_layer_name: DiTBlock}')


def test_the_plan_says_what_the_run_cannot_do():
    config, averaged = loaded(('tread', 'sam'), 'autoresume=false'), loaded(('tread', 'ema'))
    text = format_plan(config, make_plan(config, 1), '')
    assert 'limit of sam' in text and 'cannot be resumed: its checkpoints hold nothing' in ' '.join(text.split())
    assert 'rule of' not in text  # maskdit and tread do not go together, but nobody asked for maskdit
    assert 'limit of' not in format_plan(averaged, make_plan(averaged, 1), '')
