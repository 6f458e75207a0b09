"""Our ``EMA`` through a real ``Trainer``, against an average kept by hand."""

import pytest
import torch
from composer import Callback, Evaluator
from composer.algorithms import EMA as ComposerEMA

from tests.helpers import assert_equal_weights, fit, loader, make_trainer, tiny_model, weights
from tread_composer.algorithms.ema import EMA
from tread_composer.core.errors import ResumeError

DECAY = 0.7


class ByHand(Callback):
    """The closed form, parameter by parameter, on weights seen from outside."""

    def __init__(self, every: int = 1):
        self.average, self.every = None, every

    def fit_start(self, state, logger):
        if self.average is None:
            self.average = {
                n: p.detach().double().clone() for n, p in state.model.named_parameters() if p.requires_grad
            }

    def batch_end(self, state, logger):
        if int(state.timestamp.batch) % self.every == 0:
            for name, parameter in state.model.named_parameters():
                if parameter.requires_grad:
                    self.average[name] = DECAY * self.average[name] + (1 - DECAY) * parameter.detach().double()


class Snapshots(Callback):
    """The weights at certain events; callbacks run after the algorithms."""

    def __init__(self):
        self.at: dict[str, dict] = {}

    def _take(self, state):
        return {name: p.detach().clone() for name, p in state.model.named_parameters()}

    def eval_start(self, state, logger):
        self.at['eval_start'] = self._take(state)

    def eval_end(self, state, logger):
        self.at['eval_end'] = self._take(state)


def averaged_weights(trainer, ema):
    with ema.averaged(trainer.state):
        return {name: p.detach().clone() for name, p in trainer.state.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize('every', [1, 2])
def test_the_average_is_the_closed_form_and_trains_the_same(every):
    ema, hand = EMA(DECAY, f'{every}ba'), ByHand(every)
    trainer, recorder = fit([ema], callbacks=[hand])
    averaged = averaged_weights(trainer, ema)
    assert averaged.keys() == hand.average.keys()
    for name, value in hand.average.items():
        assert torch.allclose(averaged[name].double(), value, atol=1e-6), name
    _, plain = fit([])
    assert recorder.losses == plain.losses


def test_evaluation_sees_the_average_and_training_gets_its_weights_back():
    ema, snapshots = EMA(DECAY), Snapshots()
    trainer, recorder = fit(
        [ema], callbacks=[snapshots], eval_dataloader=Evaluator(label='eval', dataloader=loader(shuffle=False)),
        eval_interval='6ba', max_duration='6ba',
    )  # fmt: skip
    averaged = averaged_weights(trainer, ema)
    for name, value in averaged.items():
        assert torch.equal(snapshots.at['eval_start'][name], value)
    raw = dict(trainer.state.model.named_parameters())
    assert any(not torch.equal(raw[name], value) for name, value in averaged.items())
    for name, value in snapshots.at['eval_end'].items():
        assert torch.equal(value, raw[name])
    assert recorder.losses == fit([])[1].losses


def test_a_checkpoint_holds_raw_weights_and_a_float32_average_under_plain_names(tmp_path):
    ema = EMA(DECAY)
    trainer, _ = fit([ema], save_folder=str(tmp_path), save_interval='6ba')
    state = torch.load(tmp_path / 'latest-rank0.pt', weights_only=False)['state']
    assert_equal_weights(dict(state['model']), weights(trainer))
    average = dict(state['algorithms'])['EMA']['average']
    trainable = {n for n, p in tiny_model().named_parameters() if p.requires_grad}
    assert set(average) == trainable and 'denoiser.blocks.0.attn.qkv.weight' in average
    assert all(value.dtype == torch.float32 for value in average.values())
    for name, value in averaged_weights(trainer, ema).items():
        assert torch.equal(average[name], value)


def test_loaded_for_evaluation_alone_it_evaluates_the_average(tmp_path):
    ema = EMA(DECAY)
    trainer, _ = fit([ema], save_folder=str(tmp_path), save_interval='6ba')
    snapshots = Snapshots()
    other = make_trainer(
        algorithms=[EMA(DECAY)], callbacks=[snapshots], load_path=str(tmp_path / 'latest-rank0.pt'),
        eval_dataloader=Evaluator(label='eval', dataloader=loader(shuffle=False)),
    )  # fmt: skip
    other.eval()
    for name, value in averaged_weights(trainer, ema).items():
        assert torch.equal(snapshots.at['eval_start'][name], value)


def test_saved_again_before_it_trains_it_still_has_the_average():
    trained = EMA(DECAY)
    fit([trained], max_duration='3ba')
    again = EMA(DECAY)
    again.load_state_dict(trained.state_dict())
    assert_equal_weights(again.state_dict()['average'], trained.state_dict()['average'])


def test_bfloat16_weights_are_averaged_in_float32():
    """1000 updates far below bfloat16's resolution add up as the closed form says."""
    model, ema = tiny_model().to(torch.bfloat16), EMA(0.999)
    trainer = make_trainer(model, [ema])
    name, parameter = 'denoiser.blocks.0.attn.qkv.weight', model.denoiser.blocks[0].attn.qkv.weight
    with torch.no_grad():
        parameter.fill_(1.0)
    trainer.engine.run_event('fit_start')
    with torch.no_grad():
        parameter.fill_(1.0078125)  # the next bfloat16
    for _ in range(1000):
        trainer.engine.run_event('batch_end')
    average = ema.state_dict()['average'][name]
    expected = 1.0078125 - 0.0078125 * 0.999**1000
    assert torch.allclose(average, torch.full_like(average, expected), atol=2e-5)
    assert 1.004 < average.mean() < 1.006


def test_a_frozen_parameter_is_left_alone():
    model, ema = tiny_model(), EMA(DECAY)
    model.denoiser.x_embedder.requires_grad_(False)
    fit([ema], model=model)
    assert not any('x_embedder' in name or 'pos_embed' in name for name in ema.state_dict()['average'])


def test_other_settings_and_composers_average_are_refused(tmp_path):
    fit([EMA(DECAY)], save_folder=str(tmp_path / 'a'), save_interval='6ba')
    with pytest.raises(ResumeError, match=r'decay: saved 0\.7, now 0\.9'):
        make_trainer(algorithms=[EMA(0.9)], load_path=str(tmp_path / 'a' / 'latest-rank0.pt'))
    fit([ComposerEMA(half_life='3ba')], save_folder=str(tmp_path / 'b'), save_interval='6ba')
    with pytest.raises(ResumeError, match="Composer's own EMA"):
        make_trainer(algorithms=[EMA(DECAY)], load_path=str(tmp_path / 'b' / 'latest-rank0.pt'))


def test_no_checkpoint_while_the_average_stands_in():
    ema = EMA(DECAY)
    trainer, _ = fit([ema])
    with ema.averaged(trainer.state), pytest.raises(RuntimeError, match='stand in for the weights'):
        ema.state_dict()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((1.0,), 'decay: 1.0'),
        ((-0.1,), 'decay'),
        ((0.9, '1ep'), 'not a number of batches'),
        ((0.9, '0ba'), 'update_interval'),
    ],
)
def test_wrong_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        EMA(*arguments)
