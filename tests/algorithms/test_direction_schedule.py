"""``DirectionSchedule`` in real tiny runs: on and off, in microbatches, resumed, compiled; and what it refuses."""

import pytest
import torch
from composer.loggers import InMemoryLogger
from torch._dynamo.testing import CompileCounter

from tests.helpers import assert_equal_weights, fit, loader, make_trainer, tiny_dit, weights
from tread_composer.algorithms.direction_schedule import DirectionSchedule
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import FlowMatching


def model(depth=6, **settings):
    objective = FlowMatching(**{'direction_weight': 1.0, 'direction_patch': 2, **settings})
    return LatentDiffusion(tiny_dit(depth), objective, latent_shape=(1, 8, 8), num_classes=10)


def train(*algorithms, **keywords):
    """The trainer, and each loss that was logged, batch by batch."""
    logger = InMemoryLogger()
    trainer, _ = fit(algorithms, loggers=[logger], **{'model': model(), **keywords})
    names = ('total', 'mse', 'direction')
    return trainer, {name: [float(value) for _, value in logger.data[f'loss/train/{name}']] for name in names}


def switches(losses):
    """1 where the total is the sum of both terms, 0 where it is the squared error alone."""
    rows = zip(losses['total'], losses['mse'], losses['direction'], strict=True)
    shares = [(total - mse) / direction for total, mse, direction in rows]
    rounded = [round(share) for share in shares]
    assert shares == pytest.approx(rounded, abs=1e-4)
    return rounded


@pytest.mark.parametrize(
    ('times', 'expected'),
    [
        ({'end_time': '2ba'}, [1, 1, 0, 0, 0, 0]),
        ({'start_time': '1ep'}, [0, 0, 0, 1, 1, 1]),  # an epoch is three batches
        ({'start_time': '16sp', 'end_time': '0.75dur'}, [0, 0, 1, 1, 1, 0]),
        ({'start_time': '0dur', 'end_time': '1dur'}, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_window(times, expected):
    assert switches(train(DirectionSchedule(**times))[1]) == expected


def test_a_closed_window_is_the_plain_loss_and_an_open_one_the_loss_without_schedule():
    trainer, losses = train(DirectionSchedule(end_time='0ba'))
    plain, _ = fit(model=model(direction_weight=0.0))
    assert_equal_weights(weights(trainer), weights(plain))
    assert min(losses['direction']) > 0  # measured all the same
    scheduled, _ = train(DirectionSchedule(end_time='1dur'))
    always, losses = train()
    assert_equal_weights(weights(scheduled), weights(always))
    assert switches(losses) == [1] * 6


def test_microbatches_give_the_same_terms():
    _, whole = train(DirectionSchedule(start_time='2ba'))
    _, cut = train(DirectionSchedule(start_time='2ba'), device_train_microbatch_size=2)
    assert switches(cut) == switches(whole) == [0, 0, 1, 1, 1, 1]
    for name, values in whole.items():
        assert values == pytest.approx(cut[name], rel=1e-4)


def test_a_checkpoint_of_another_window_is_refused(tmp_path):
    train(DirectionSchedule('1ba', '5ba'), save_folder=str(tmp_path), save_interval='2ba', max_duration='2ba')
    with pytest.raises(ResumeError, match="end_time: saved '5ba', now '4ba'"):
        train(DirectionSchedule('1ba', '4ba'), load_path=str(tmp_path / 'ep0-ba2-rank0.pt'))


def test_evaluation_reports_the_plain_error_at_any_time():
    trainer = make_trainer(model(), [DirectionSchedule(end_time='3ba')], eval_dataloader=loader(shuffle=False))
    plain = make_trainer(model(direction_weight=0.0), eval_dataloader=loader(shuffle=False))
    for one in (trainer, plain):
        one.eval()
    found, expected = (one.state.eval_metrics['eval'] for one in (trainer, plain))
    assert found['loss'].compute() == expected['loss'].compute() > 0
    assert found['loss_time_quarter_2'].compute() == expected['loss_time_quarter_2'].compute()


def test_turning_it_off_does_not_compile_again():
    torch._dynamo.reset()
    counter = CompileCounter()
    _, losses = train(
        DirectionSchedule(start_time='1ba', end_time='3ba'),
        model=model(depth=2),
        compile_config={'backend': counter, 'fullgraph': True},
        max_duration='4ba',
    )
    assert switches(losses) == [0, 1, 1, 0]
    assert counter.frame_count == 1


def test_a_model_without_the_loss_is_refused():
    with pytest.raises(UserError, match=r'direction_weight is 0; set it, for example to 1\.0'):
        make_trainer(model(direction_weight=0.0), [DirectionSchedule(end_time='2ba')])
