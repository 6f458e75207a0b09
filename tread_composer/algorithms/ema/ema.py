"""``EMA``: a float32 average of the weights that survives resume and another number of ranks.

Composer's own EMA names its tensors after the wrapped model: when the wrapping changes between save and load (2 ranks
to 1, say) it trains on from the averaged weights without a word. Under FSDP2 it saves one rank's shard as the whole.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger
from torch import Tensor

from tread_composer.algorithms.averages import Averages, AveragingAlgorithm
from tread_composer.algorithms.schedule import parse_time
from tread_composer.core.errors import ResumeError

__all__ = ['EMA']

_NEGLIGIBLE = 0.01  # share of the initial weights in an average that is not worth a word
_WARMED_UP = 100  # updates: with warm-up, 1 / C(109, 9) = 2e-13 of the initial weights is left after them


class EMA(AveragingAlgorithm):
    """Average the trainable weights: ``average = decay * average + (1 - decay) * weights`` after each batch.

    The average starts as a copy of the weights on ``Event.FIT_START`` (after a checkpoint was loaded), is updated on
    ``Event.BATCH_END``, and stands in for the weights from ``Event.EVAL_START`` to ``Event.EVAL_END``. A checkpoint
    holds it in this algorithm's state, as full float32 tensors under the plain parameter names, beside the raw weights.
    Buffers and parameters that need no gradient are not averaged.

    Under FSDP a rank keeps the average of its own shard alone. Saving gathers one parameter after the other on the
    first rank, so a checkpoint resumes on another number of ranks and under another strategy.

    Args:
        decay: Share of the old average that stays at an update; DiT, SiT and TREAD use 0.9999 (half-life of 6931
            batches), which needs runs much longer than 10,000 batches.
        update_interval: Batches between two updates, as a time string such as ``'1ba'``; ``decay`` is per update.
        warmup: Update number n, from 0, decays by ``min(decay, (1 + n) / (10 + n))``: the first weights, which are
            noise, are forgotten within some batches, and the average is short while the run is (TensorFlow's
            ``ExponentialMovingAverage`` with ``num_updates``). Off in the published recipes, whose runs are long.

    Raises:
        ValueError: ``decay`` is not in [0, 1), or the interval is not a number of batches.
        UserError: On ``Event.INIT``: the run has Composer's EMA too, or shards the weights in a way that hides them.
    """

    incompatible_with: ClassVar[Mapping[str, str]] = {
        'EMA': "Composer's EMA exchanges the weights for its own average at the same events, so that each would put "
        'back what the other has put in',
    }

    joins_later: ClassVar[bool] = True

    num_averages: ClassVar[int] = 1

    def __init__(self, decay: float = 0.9999, update_interval: str = '1ba', warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f'decay: {decay!r} is not in [0, 1); DiT and TREAD use 0.9999')
        interval = parse_time(update_interval, 'update_interval')
        if interval is None or interval.unit != TimeUnit.BATCH or interval.value < 1:
            raise ValueError(f"update_interval: {update_interval!r} is not a number of batches such as '1ba'")
        self.decay, self.update_interval, self.warmup = float(decay), update_interval, warmup
        self._every = int(interval.value)
        self._first_batch = 0  # batch at which the average began: 0, or where a run went on with it
        self._averages = Averages('EMA', ['average'])
        self._weights: dict[str, Tensor] | None = None  # the raw weights, while the average stands in for them

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to."""
        settings = {'decay': self.decay, 'update_interval': self.update_interval}
        # Checkpoints that are older than it have no such key.
        return {**settings, 'warmup': True} if self.warmup else settings

    def initial_share(self, num_batches: int) -> float:
        """The share of the average, ``num_batches`` after it began, that is the weights with which it began."""
        updates = num_batches // self._every
        if not self.warmup:
            return self.decay**updates
        return math.prod(self._decay_at(update) for update in range(min(updates, _WARMED_UP)))

    def immaturity(self, num_batches: int) -> str:
        """What is to be said of an average that is mostly of the beginning; empty where that is below 1 %."""
        share = self.initial_share(num_batches)
        if share <= _NEGLIGIBLE:
            return ''
        remedy = '' if self.warmup else '; a smaller algorithms.ema.decay or algorithms.ema.warmup: true forgets them'
        return f'{share:.0%} of the average is still the weights that it began with{remedy}'

    def in_evaluation(self, state: State) -> str:
        """Which weights an evaluation sees at this moment, in words."""
        immaturity = self.immaturity(int(state.timestamp.batch) - self._first_batch)
        return 'averaged weights' + (f' ({immaturity})' if immaturity else '')

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints where the run is too short for the average."""
        immaturity = '' if plan['batches'] is None else self.immaturity(plan['batches'])
        return {'average': f'at the end {immaturity}'} if immaturity else {}

    @contextlib.contextmanager
    def averaged(self, state: State) -> Iterator[None]:
        """The model holds the averaged weights inside of this context, and its own again behind it."""
        if self._weights is not None:  # an evaluation has put them there
            yield
            return
        self._on_eval_start(state)
        try:
            yield
        finally:
            self._on_eval_end(state)

    def state_dict(self) -> dict[str, Any]:
        """Settings and average, full tensors on the CPU of rank 0, which writes them. Called on all ranks.

        ``RuntimeError`` while the average stands in for the weights: the checkpoint's model would not be the model.
        """
        if self._weights is not None:
            raise RuntimeError('EMA: a checkpoint cannot be taken while the averaged weights stand in for the weights')
        return {
            **super().state_dict(),
            'average': self._averages.whole().get('average'),
            'first_batch': self._first_batch,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved average; ``ResumeError`` if its settings differ, or it is of Composer's ``EMA``."""
        if 'average' not in state:
            raise ResumeError(
                "EMA: the checkpoint's average is of Composer's own EMA, which this one cannot read. "
                'Resume with composer_ema, or start a new run from the weights alone (load_weights_only: true).'
            )
        super().load_state_dict(state)
        self._first_batch = state.get('first_batch', 0)
        # None: saved before training had begun.
        self._averages.load({} if state['average'] is None else {'average': state['average']})

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        self._give_back(state)
        if not (self._averages.local or self._averages.loaded):
            self._first_batch = int(state.timestamp.batch)
        super()._on_fit_start(state, logger)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if batch % self._every == 0:
            updates = batch // self._every - self._first_batch // self._every - 1  # before this one
            self._averages.update(state.model, {'average': 1.0 - self._decay_at(updates)})

    def _decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @torch.no_grad()
    def _on_eval_start(self, state: State, logger: Logger | None = None) -> None:
        self._give_back(state)
        self._averages.lay_out(state.model)
        shards, average = self._averages.shards, self._averages.local['average']
        self._weights = {name: shards[name].local.clone() for name in average}
        for name, value in average.items():
            shards[name].local.copy_(value)

    def _on_eval_end(self, state: State, logger: Logger | None = None) -> None:
        self._give_back(state)

    @torch.no_grad()
    def _give_back(self, state: State) -> None:
        """Put the raw weights back: after an evaluation, and before what follows one that was interrupted."""
        if self._weights is None:
            return
        self._averages.lay_out(state.model)  # drops what the forward passes have gathered of the average
        for name, value in self._weights.items():
            self._averages.shards[name].local.copy_(value)
        self._weights = None
