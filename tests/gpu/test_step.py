"""A training step on a GPU: it never waits for the device, and mixed precision is what a recipe says."""

import pytest
import torch
from composer import Callback

from tests.helpers import fit, tiny_model
from tread_composer.algorithms.tread import Tread

pytestmark = pytest.mark.gpu

ROUTE = {'start': 1, 'end': -2, 'selection_rate': 0.5}
PROBED = 2  # batches in which Tread tries its blocks out, which asks the device for an answer


class NoWaiting(Callback):
    """Any synchronisation between the draw of the route and the end of the backward pass is an error."""

    def __init__(self) -> None:
        self.watched = 0

    def before_train_batch(self, state, logger):
        if int(state.timestamp.batch) >= PROBED:
            self.watched += 1
            torch.cuda.set_sync_debug_mode('error')

    def after_backward(self, state, logger):
        torch.cuda.set_sync_debug_mode('default')


@pytest.fixture(autouse=True)
def _mode_is_given_back():
    yield
    torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize(
    'algorithms', [[], [Tread(**ROUTE)], [Tread(**ROUTE, float32_after=True)]], ids=['dense', 'routed', 'float32']
)
@pytest.mark.parametrize('precision', ['fp32', 'amp_bf16'])
def test_forward_and_backward_do_not_wait_for_the_device(algorithms, precision):
    watch = NoWaiting()
    fit(algorithms, callbacks=[watch], device='gpu', precision=precision, max_duration='6ba')
    assert watch.watched == 4


def test_the_watch_would_notice():
    class Waits(Callback):
        def before_forward(self, state, logger):
            torch.ones(1, device='cuda').item()

    with pytest.raises(RuntimeError, match='synchroniz'):
        fit(callbacks=[NoWaiting(), Waits()], device='gpu', max_duration='6ba')


class Dtypes(Callback):
    """In which precision each block computed, by its last product."""

    def __init__(self, model) -> None:
        self.seen: dict[int, torch.dtype] = {}
        for number, block in enumerate(model.denoiser.blocks):
            block.mlp.fc1.register_forward_hook(
                lambda _, args, out, number=number: self.seen.update({number: out.dtype})
            )


def test_bfloat16_blocks_with_one_in_float32_behind_the_route_over_float32_weights():
    model = tiny_model()
    dtypes = Dtypes(model)
    trainer, _ = fit(
        [Tread(**ROUTE, float32_after=True)], model=model, callbacks=[dtypes], device='gpu', precision='amp_bf16'
    )
    behind = len(model.denoiser.blocks) - 1  # the route ends at -2
    assert dtypes.seen == {n: torch.float32 if n == behind else torch.bfloat16 for n in range(len(dtypes.seen))}
    assert {p.dtype for p in trainer.state.model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())


@pytest.mark.parametrize('name', ['fp32', 'amp_bf16'])
def test_a_routed_step_computes_what_the_cpu_does(name):
    on_cpu = fit([Tread(**ROUTE)], max_duration='3ba')[1].losses
    on_gpu = fit([Tread(**ROUTE)], max_duration='3ba', device='gpu', precision=name)[1].losses
    rounding = 1e-3 if name == 'fp32' else 0.05
    assert [float.fromhex(x) for x in on_gpu] == pytest.approx([float.fromhex(x) for x in on_cpu], rel=rounding)
