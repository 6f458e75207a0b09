"""Our ``EMA`` through a real ``Trainer``, against an average kept by hand."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from composer import Callback, Evaluator
from composer.algorithms import EMA as ComposerEMA
from diffusers.training_utils import EMAModel

from tests.helpers import assert_equal_weights, fit, loader, make_trainer, tiny_model, weights
from tread_composer.algorithms.ema import EMA
from tread_composer.callbacks.progress import ProgressLines
from tread_composer.core.errors import ResumeError, UserError

DECAY = 0.7


class ByHand(Callback):
    """The closed form, parameter by parameter, on weights seen from outside."""

    def __init__(self, every: int = 1, decays=None):
        self.average, self.every, self.decays = None, every, decays or itertools.repeat(DECAY)

    def fit_start(self, state, logger):
        if self.average is None:
            self.average = {
                n: p.detach().double().clone() for n, p in state.model.named_parameters() if p.requires_grad
            }

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) % self.every == 0:
            decay = next(self.decays)
            for name, parameter in state.model.named_parameters():
                if parameter.requires_grad:
                    self.average[name] = decay * self.average[name] + (1 - decay) * parameter.detach().double()


class Snapshots(Callback):
    """The weights at certain events; callbacks run after the algorithms."""

    def __init__(self):
        self.at: dict[str, dict] = {}

    def _take(self, state):
        return {name: p.detach().clone() for name, p in state.model.named_parameters()}

    def batch_start(self, state, logger):
        self.at['batch_start'] = self._take(state)

    def eval_start(self, state, logger):
        self.at['eval_start'] = self._take(state)

    def eval_end(self, state, logger):
        self.at['eval_end'] = self._take(state)


def averaged_weights(trainer, ema):
    with ema.averaged(trainer.state):
        return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters() if p.requires_grad}


def assert_close(averaged, expected):
    assert averaged.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(averaged[name].double(), value, atol=1e-6), name


NAME = 'denoiser.blocks.0.attn.qkv.weight'


def filled(model, algorithm, first, then):
    """A trainer whose run has begun with one weight ``first``, which it is now ``then``."""
    trainer = make_trainer(model, [algorithm])
    with torch.no_grad():
        model.get_parameter(NAME).fill_(first)
        trainer.engine.run_event('fit_start')
        model.get_parameter(NAME).fill_(then)
    return trainer


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A run of six batches, evaluated and saved at its end, with what it left. Not to be changed."""
    folder, ema, snapshots = tmp_path_factory.mktemp('trained'), EMA(DECAY), Snapshots()
    trainer, recorder = fit(
        [ema], callbacks=[snapshots], save_folder=str(folder), save_interval='6ba', eval_interval='6ba',
        eval_dataloader=Evaluator(label='eval', dataloader=loader(shuffle=False)),
    )  # fmt: skip
    checkpoint = str(folder / 'latest-rank0.pt')
    return SimpleNamespace(ema=ema, trainer=trainer, losses=recorder.losses, at=snapshots.at, checkpoint=checkpoint)


@pytest.mark.parametrize('every', [1, 2])
def test_the_average_is_the_closed_form(every):
    ema, hand = EMA(DECAY, f'{every}ba'), ByHand(every)
    trainer, _ = fit([ema], callbacks=[hand])
    assert_close(averaged_weights(trainer, ema), hand.average)


@pytest.mark.parametrize('every', [1, 2])
def test_warm_up_is_the_usual_one_through_a_resumed_run(every, tmp_path):
    """Behind the first update, which diffusers takes for a copy, against its ``EMAModel``."""
    theirs = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.4)
    decays = [0.1, *(theirs.get_decay(update + 1) for update in range(1, 12))]
    assert decays[4] == 5 / 14 and decays[6] == decays[11] == 0.4
    hand = ByHand(every, iter(decays))
    saved = {'save_folder': str(tmp_path), 'save_interval': '6ba'}
    fit([EMA(0.4, f'{every}ba', warmup=True)], callbacks=[hand], max_duration='6ba', **saved)
    ema = EMA(0.4, f'{every}ba', warmup=True)
    trainer, _ = fit([ema], callbacks=[hand], max_duration='12ba', load_path=str(tmp_path / 'latest-rank0.pt'))
    assert int(trainer.state.timestamp.batch) == 12
    assert_close(averaged_weights(trainer, ema), hand.average)


@pytest.mark.parametrize(('warmup', 'counts'), [(False, (1, 5, 60)), (True, (1, 2, 5, 150))])
def test_the_share_of_the_first_weights_is_what_the_average_has_of_them(warmup, counts):
    ema = EMA(0.99, warmup=warmup)
    trainer = filled(tiny_model(), ema, 1.0, 0.0)
    for batch in range(1, counts[-1] + 1):
        trainer.state.timestamp = trainer.state.timestamp.to_next_batch()
        trainer.engine.run_event('batch_end')
        if batch in counts:
            average = float(ema.state_dict()['average'][NAME].mean())
            assert ema.initial_share(batch) == pytest.approx(average, rel=1e-4, abs=1e-9)


def test_an_average_that_is_mostly_of_the_beginning_says_so(tmp_path, capsys):
    """In training, beside the loss that it has; in `plan`; and a run that goes on with it counts from there."""
    evaluated = {'eval_dataloader': Evaluator(label='eval', dataloader=loader(shuffle=False)), 'eval_interval': '6ba'}
    ema = EMA(0.9999)
    fit([ema], max_duration='6ba', loggers=[ProgressLines()], **evaluated)
    text = capsys.readouterr().err
    assert 'of the averaged weights (100% of the average is still the weights that it began with;' in text
    assert ema.plan_rows({'batches': 10_000})['average'].startswith('at the end 37% of the average is still')
    assert ema.plan_rows({'batches': 50_000}) == {} == ema.plan_rows({'batches': None})
    assert EMA(0.9999, warmup=True).plan_rows({'batches': 150}) == {}
    for algorithms, words in (([], 'of the raw weights'), ([EMA(0.2)], 'of the averaged weights\n')):
        fit(algorithms, max_duration='6ba', loggers=[ProgressLines()], **evaluated)
        assert words in capsys.readouterr().err
    fit([], save_folder=str(tmp_path), save_interval='6ba', max_duration='6ba')
    later = EMA(0.5)
    trainer, _ = fit([later], load_path=str(tmp_path / 'latest-rank0.pt'), max_duration='8ba')
    assert '(25% of the average' in later.in_evaluation(trainer.state)


def test_evaluation_sees_the_average_and_training_gets_its_weights_back(trained):
    averaged = averaged_weights(trained.trainer, trained.ema)
    for name, value in averaged.items():
        assert torch.equal(trained.at['eval_start'][name], value)
    raw = dict(trained.trainer.state.model.named_parameters())
    assert any(not torch.equal(raw[name], value) for name, value in averaged.items())
    for name, value in trained.at['eval_end'].items():
        assert torch.equal(value, raw[name])
    assert trained.losses == fit([])[1].losses


def test_a_checkpoint_holds_raw_weights_and_a_float32_average_under_plain_names(trained):
    state = torch.load(trained.checkpoint, weights_only=False)['state']
    assert_equal_weights(dict(state['model']), weights(trained.trainer))
    average = dict(state['algorithms'])['EMA']['average']
    trainable = {n for n, p in tiny_model().named_parameters() if p.requires_grad}
    assert set(average) == trainable and NAME in average
    assert all(value.dtype == torch.float32 for value in average.values())
    assert_equal_weights(average, averaged_weights(trained.trainer, trained.ema))


def test_loaded_for_evaluation_alone_it_evaluates_the_average(trained):
    snapshots = Snapshots()
    loaded = make_trainer(
        algorithms=[EMA(DECAY)], callbacks=[snapshots], load_path=trained.checkpoint,
        eval_dataloader=Evaluator(label='eval', dataloader=loader(shuffle=False)),
    )  # fmt: skip
    loaded.eval()
    for name, value in averaged_weights(trained.trainer, trained.ema).items():
        assert torch.equal(snapshots.at['eval_start'][name], value)


def test_saved_again_before_it_trains_it_still_has_the_average(trained):
    again = EMA(DECAY)
    again.load_state_dict(trained.ema.state_dict())
    assert_equal_weights(again.state_dict()['average'], trained.ema.state_dict()['average'])


def test_bfloat16_weights_are_averaged_in_float32():
    """1000 updates far below bfloat16's resolution add up as the closed form says."""
    ema = EMA(0.999)
    trainer = filled(tiny_model().to(torch.bfloat16), ema, 1.0, 1.0078125)  # the next bfloat16
    for _ in range(1000):
        trainer.engine.run_event('batch_end')
    average = ema.state_dict()['average'][NAME]
    expected = 1.0078125 - 0.0078125 * 0.999**1000
    assert torch.allclose(average, torch.full_like(average, expected), atol=2e-5)
    assert 1.004 < average.mean() < 1.006


def test_a_frozen_parameter_is_left_alone():
    model, ema = tiny_model(), EMA(DECAY)
    model.denoiser.x_embedder.requires_grad_(False)
    fit([ema], model=model)
    assert not any('x_embedder' in name or 'pos_embed' in name for name in ema.state_dict()['average'])


def test_a_parameter_that_thaws_in_a_run_is_refused():
    """It had no average, and evaluation saw its raw weights beside the averaged ones."""
    model = tiny_model()
    model.denoiser.x_embedder.requires_grad_(False)

    class Thaw(Callback):
        def batch_start(self, state, logger):
            model.denoiser.x_embedder.requires_grad_(int(state.timestamp.batch) >= 2)

    with pytest.raises(UserError, match=r'frozen when the average began and train by now .*x_embedder'):
        fit([EMA(DECAY)], model=model, callbacks=[Thaw()])


@pytest.mark.parametrize('then', ['eval', 'fit'])
def test_an_interrupted_evaluation_loses_no_weights(then):
    """Ctrl-C in a notebook: whatever comes next begins with the raw weights."""

    class Interrupt(Callback):
        def eval_batch_start(self, state, logger):
            raise KeyboardInterrupt

    interrupt, at_start = Interrupt(), Snapshots()
    trainer, _ = fit([EMA(DECAY)], eval_dataloader=loader())
    raw = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    trainer.state.callbacks.append(interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.eval()
    trainer.state.callbacks.remove(interrupt)
    trainer.state.callbacks.append(at_start)
    if then == 'eval':
        trainer.eval()
        assert_equal_weights(at_start.at['eval_end'], raw)
    else:
        trainer.fit(duration='1ba')
        assert_equal_weights(at_start.at['batch_start'], raw)


def test_other_settings_and_composers_average_are_refused(trained, tmp_path):
    with pytest.raises(ResumeError, match=r'decay: saved 0\.7, now 0\.9'):
        make_trainer(algorithms=[EMA(0.9)], load_path=trained.checkpoint)
    fit([ComposerEMA(half_life='3ba')], save_folder=str(tmp_path), save_interval='6ba')
    with pytest.raises(ResumeError, match="Composer's own EMA"):
        make_trainer(algorithms=[EMA(DECAY)], load_path=str(tmp_path / 'latest-rank0.pt'))


def test_no_checkpoint_while_the_average_stands_in(trained):
    with trained.ema.averaged(trained.trainer.state), pytest.raises(RuntimeError, match='stand in for the weights'):
        trained.ema.state_dict()
