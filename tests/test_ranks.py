"""Two real processes (gloo, DDP): every rank, sample and step has a route of its own."""

import pytest
from composer.core import Event
from composer.utils import dist

from tests.helpers import Recorder, loader, make_trainer, tiny_model
from tests.warm import on_ranks
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.tread import Tread
from tread_composer.core.batch import NOISE, SAMPLE_IDS


class WithoutIds(Tread):
    """Sees a foreign batch: nothing says which sample a row is."""

    def apply(self, event, state, logger):
        hidden = state.batch.pop(SAMPLE_IDS) if event == Event.BATCH_START else None
        super().apply(event, state, logger)
        if hidden is not None:
            state.batch[SAMPLE_IDS] = hidden


def record(method):
    """Train 6 batches of 8 samples on all ranks together; what this rank saw of each."""
    model, recorder, kept = tiny_model(), Recorder(), []
    size = 8 // dist.get_world_size()
    algorithms = [method(1, -2, 0.5), EMA(0.7)]
    trainer = make_trainer(model, algorithms, [recorder], data=lambda: loader(batch_size=size, shuffle=False))
    routing = model.denoiser.blocks.routing
    model.denoiser.register_forward_pre_hook(lambda *_: kept.append(routing.kept[0].tolist()))
    trainer.fit()
    samples, noise = ([batch[key] for batch in recorder.batches] for key in (SAMPLE_IDS, NOISE))
    return {'kept': kept, 'samples': samples, 'noise': noise, 'losses': recorder.losses}


def by_sample(rank, entry):
    """What each (batch, sample) had."""
    return {
        (batch, sample): value
        for batch, samples in enumerate(rank['samples'])
        for sample, value in zip(samples, rank[entry][batch], strict=True)
    }


@pytest.mark.parametrize('method', [Tread, WithoutIds])
def test_routes_differ_between_ranks_samples_and_steps(method):
    both = on_ranks(2, record, method)
    assert both[0]['losses'] == both[1]['losses']  # reduced over the ranks
    routes = [tuple(row) for rank in both for batch in rank['kept'] for row in batch]
    assert len(routes) == 2 * 6 * 4 and len(set(routes)) == len(routes)


def test_one_rank_and_two_draw_the_same_for_a_sample():
    alone, both = record(Tread), on_ranks(2, record, Tread)
    for entry in ('kept', 'noise'):
        assert by_sample(alone, entry) == by_sample(both[0], entry) | by_sample(both[1], entry)
    losses = [[float.fromhex(loss) for loss in run['losses']] for run in (alone, both[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
