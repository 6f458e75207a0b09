"""Run under the launcher by test_ranks.py: trains with ``Tread`` and writes what each rank saw to a file."""

import json
import sys
from pathlib import Path

from composer.utils import dist, get_device

from tests.helpers import Recorder, make_trainer, tiny_model
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.tread import Tread


def main(folder: str, keyed_by: str) -> None:
    """Train 6 batches of 8 samples on all ranks together."""
    dist.initialize_dist(get_device('cpu'))
    from tests import helpers
    from tread_composer.core.batch import SAMPLE_IDS

    model, recorder, kept = tiny_model(), Recorder(), []
    if keyed_by == 'rank':  # as in a foreign batch: nothing says which sample a row is

        class WithoutIds(Tread):
            def apply(self, event, state, logger):
                hidden = state.batch.pop(SAMPLE_IDS) if str(event) == 'Event.BATCH_START' else None
                super().apply(event, state, logger)
                if hidden is not None:
                    state.batch[SAMPLE_IDS] = hidden

        tread = WithoutIds(1, -2, 0.5)
    else:
        tread = Tread(1, -2, 0.5)
    size = 8 // dist.get_world_size()
    trainer = make_trainer(
        model, [tread, EMA(0.7)], [recorder], data=lambda: helpers.loader(batch_size=size, shuffle=False)
    )
    routing = model.denoiser.blocks.routing
    model.denoiser.register_forward_pre_hook(lambda *_: kept.append(routing.kept[0].tolist()))
    trainer.fit()
    seen = {
        'kept': kept,
        'samples': [batch[SAMPLE_IDS] for batch in recorder.batches],
        'noise': [batch['noise'] for batch in recorder.batches],
        'losses': recorder.losses,
    }
    Path(folder, f'{dist.get_global_rank()}.json').write_text(json.dumps(seen))


if __name__ == '__main__':
    main(*sys.argv[1:])
