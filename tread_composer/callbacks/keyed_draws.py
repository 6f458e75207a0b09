"""Draws what the objective needs, for the whole device batch, before Composer cuts it into microbatches."""

import math

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor

from tread_composer.callbacks.sampling import bare_model
from tread_composer.core.batch import LABEL_DROPPED, NOISE, POSTERIOR_NOISE, RAW_LATENTS, SAMPLE_IDS, TIME_QUANTILES
from tread_composer.core.randomness import KeyedRandom

__all__ = ['KeyedDraws']

_GOLDEN = (math.sqrt(5) - 1) / 2
_EVAL_SEED = 0


class KeyedDraws(Callback):
    """Adds noise, time quantiles and label dropout to each batch of a ``LatentDiffusion`` model.

    While training (``Event.BATCH_START``) they are keyed by (seed, purpose, batch, sample). A resumed run, another
    number of ranks and another microbatch size see the same numbers, and so do two runs of one seed that differ in
    their algorithms: their losses compare batch by batch.

    In evaluation (``Event.EVAL_BATCH_START``) noise and time depend on the sample alone, not even on the run's seed,
    so the losses of any two runs compare. Sample ``i`` gets the time quantile ``frac(1/2 + i * (sqrt(5) - 1) / 2)``: a
    low-discrepancy sequence that covers all times evenly.
    """

    def batch_start(self, state: State, logger: Logger) -> None:
        """Draw for a training batch."""
        random = KeyedRandom(state.rank_zero_seed, int(state.timestamp.batch), _sample_ids(state).tolist())
        entries = self._gaussian(random, state)
        entries[TIME_QUANTILES] = random.uniform('time')
        entries[LABEL_DROPPED] = random.uniform('label dropout') < bare_model(state).label_dropout
        state.batch.update(entries)  # Composer moves each microbatch to the device

    def eval_batch_start(self, state: State, logger: Logger) -> None:
        """Draw for an evaluation batch."""
        sample_ids = _sample_ids(state)
        entries = self._gaussian(KeyedRandom(_EVAL_SEED, 0, sample_ids.tolist()), state)
        quantiles = (0.5 + sample_ids.double().cpu() * _GOLDEN).frac().float()
        entries[TIME_QUANTILES] = quantiles.clamp(2.0**-20, 1 - 2.0**-20)
        entries[LABEL_DROPPED] = torch.zeros(len(sample_ids), dtype=torch.bool)
        state.batch.update({key: state.device.tensor_to_device(value) for key, value in entries.items()})

    def _gaussian(self, random: KeyedRandom, state: State) -> dict[str, Tensor]:
        model = bare_model(state)
        entries = {NOISE: random.normal('noise', *model.latent_shape)}
        if state.batch[RAW_LATENTS].shape[1] != model.latent_shape[0]:
            entries[POSTERIOR_NOISE] = random.normal('posterior', *model.latent_shape)
        return entries


def _sample_ids(state: State) -> Tensor:
    if SAMPLE_IDS not in state.batch:
        raise ValueError(
            f'KeyedDraws: the batch has no {SAMPLE_IDS!r}: give each sample its position in the data set, int64 [B]'
        )
    return state.batch[SAMPLE_IDS]
