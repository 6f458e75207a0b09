"""What needs a GPU: NCCL, bfloat16, full checkpoints of FSDP1, automatic microbatches, inductor.

One GPU is enough for these paths; that several processes share a model is tested on the CPU (test_parallel.py).
"""

import pytest
import torch
from composer import Callback

from tests.parallel_worlds import checkpoint, saving, train

pytestmark = pytest.mark.gpu

GPU = {'device': 'gpu'}
ROUNDING = 1e-4  # the GPU's sums, in another order, and its tensor cores


def largest(a, b):
    return max(float((value.double() - b[name].double()).abs().max()) for name, value in a.items())


@pytest.fixture(scope='module')
def cpu():
    """The training of one process on the CPU, which all others are compared with."""
    return train('ddp', evaluate=True)[0]


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2', 'fsdp1'])
@pytest.mark.parametrize('fsdp', [{}, {'activation_checkpointing': True}], ids=['plain', 'recomputed'])
def test_each_strategy_trains_as_the_cpu_does(cpu, strategy, fsdp):
    seen, _ = train(strategy, evaluate=True, fsdp={'state_dict_type': 'full', **fsdp}, precision='fp32', **GPU)
    assert seen['losses'] == pytest.approx(cpu['losses'], rel=1e-3)
    assert largest(seen['average'], cpu['average']) < ROUNDING
    assert largest(seen['average'], seen['at']['eval_start']) == 0
    assert largest(seen['at']['trained'], seen['at']['eval_end']) == 0
    assert seen['eval_losses'] == pytest.approx(cpu['eval_losses'], rel=1e-3)


@pytest.mark.parametrize('kind', ['full', 'sharded'])
@pytest.mark.parametrize('strategy', ['fsdp2', 'fsdp1'])
def test_checkpoints_resume_to_the_bit(tmp_path, strategy, kind):
    settings = {'fsdp': {'state_dict_type': kind}, 'precision': 'fp32', **GPU}
    whole, _ = train(strategy, **saving(tmp_path), **settings)
    resumed, _ = train(strategy, load_path=checkpoint(tmp_path, 2, sharded=kind == 'sharded'), **settings)
    assert largest(resumed['weights'], whole['weights']) == 0
    assert largest(resumed['average'], whole['average']) == 0


def test_a_full_checkpoint_of_fsdp1_goes_on_under_fsdp2_and_unsharded(tmp_path):
    settings = {'precision': 'fp32', **GPU}
    whole, _ = train('fsdp1', fsdp={'state_dict_type': 'full'}, **saving(tmp_path), **settings)
    for strategy in ('fsdp2', 'ddp'):
        resumed, _ = train(strategy, load_path=checkpoint(tmp_path, 2), **settings)
        assert largest(resumed['weights'], whole['weights']) < ROUNDING, strategy
        assert largest(resumed['average'], whole['average']) < ROUNDING, strategy


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2', 'fsdp1'])
def test_bfloat16_keeps_a_float32_average(cpu, strategy):
    seen, _ = train(strategy, evaluate=True, fsdp={'state_dict_type': 'full'}, precision='amp_bf16', **GPU)
    assert all(value.dtype == torch.float32 for value in seen['average'].values())
    assert largest(seen['average'], seen['by_hand']) < 1e-5
    assert seen['losses'] == pytest.approx(cpu['losses'], rel=0.05)


class OutOfMemory(Callback):
    """Fails as CUDA does where more than 6 samples are given at once: the GPU is too large for a model this small."""

    def __init__(self) -> None:
        self.failed = 0

    def after_forward(self, state, logger):
        if len(state.batch['labels']) > 6:
            self.failed += 1
            raise RuntimeError('CUDA out of memory. Made by the test.')


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp1'])
def test_a_batch_run_again_in_smaller_pieces_has_the_same_routes_and_noise(cpu, strategy):
    memory = OutOfMemory()
    settings = {'device_train_microbatch_size': 'auto', 'precision': 'fp32', **GPU}
    seen, trainer = train(strategy, fsdp={'state_dict_type': 'full'}, callbacks=[memory], **settings)
    assert memory.failed == 1 and trainer.state.device_train_microbatch_size == 6
    assert seen['losses'] == pytest.approx(cpu['losses'], rel=1e-3)
    assert largest(seen['average'], cpu['average']) < ROUNDING


def test_automatic_microbatches_under_fsdp2_are_refused_in_words():
    with pytest.raises(ValueError, match='not supported outside of FSDP1'):
        train('fsdp2', device_train_microbatch_size='auto', precision='fp32', **GPU)


@pytest.mark.parametrize('strategy', ['ddp', 'fsdp2', 'fsdp1'])
def test_blocks_compiled_by_inductor_train_the_same(cpu, strategy):
    seen, _ = train(strategy, compiled='inductor', fsdp={'state_dict_type': 'full'}, precision='fp32', **GPU)
    assert seen['losses'] == pytest.approx(cpu['losses'], rel=1e-3)


def test_the_whole_model_compiled_by_inductor_trains_the_same(cpu):
    seen, _ = train('ddp', compile_config={}, precision='fp32', **GPU)
    assert seen['losses'] == pytest.approx(cpu['losses'], rel=1e-3)
