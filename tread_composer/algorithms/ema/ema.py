"""``EMA``: a float32 average of the weights that survives resume and another number of ranks.

Composer's own EMA names its tensors after the wrapped model. When the wrapping changes between save and load (2 ranks
to 1, say) it silently trains on from the averaged weights; under FSDP2 it saves one rank's shard as if it were the
whole. This one keeps plain names and saves full tensors; in between, each rank averages what it holds.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger
from torch import Tensor

from tread_composer.algorithms.averages import Averages, refuse_hidden_weights
from tread_composer.algorithms.base import AlgorithmBase
from tread_composer.algorithms.schedule import parse_time
from tread_composer.core.errors import ResumeError

__all__ = ['EMA']

_NEGLIGIBLE = 0.01  # share of the initial weights in an average that is not worth a word
_WARMED_UP = 100  # updates: with warm-up, 1 / C(109, 9) = 2e-13 of the initial weights is left after them


class EMA(AlgorithmBase):
    """Average the trainable weights: ``average = decay * average + (1 - decay) * weights`` after each batch.

    The average starts as a copy of the weights on ``Event.FIT_START`` (after a checkpoint was loaded), is updated on
    ``Event.BATCH_END``, and stands in for the weights from ``Event.EVAL_START`` to ``Event.EVAL_END``. A checkpoint
    holds the raw weights under ``state/model`` and the average in this algorithm's state, as full float32 tensors
    under the plain parameter names. Buffers and parameters that need no gradient are not averaged.

    Under FSDP a rank keeps the average of its own shard alone. Saving gathers one parameter after the other into the
    main memory of the first rank, and loading reads the full average into that of every rank until training starts.
    A checkpoint therefore resumes on another number of ranks and under another strategy, as far as Composer can load
    the weights themselves.

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
    """Copies of the trainable weights in float32."""

    def __init__(self, decay: float = 0.9999, update_interval: str = '1ba', warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f'decay: {decay!r} is not in [0, 1); DiT and TREAD use 0.9999')
        interval = parse_time(update_interval, 'update_interval')
        if interval is None or interval.unit != TimeUnit.BATCH or interval.value < 1:
            raise ValueError(f"update_interval: {update_interval!r} is not a number of batches such as '1ba'")
        self.decay, self.update_interval, self.warmup = float(decay), update_interval, warmup
        self._every = int(interval.value)
        self._begun = 0  # batch at which the average began: 0, or where a run went on with it
        self._averages = Averages('EMA', ['average'])
        self._weights: dict[str, Tensor] | None = None  # the raw weights, while the average stands in for them

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to."""
        settings = {'decay': self.decay, 'update_interval': self.update_interval}
        return (
            {**settings, 'warmup': True} if self.warmup else settings
        )  # absent from checkpoints that are older than it

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
        immaturity = self.immaturity(int(state.timestamp.batch) - self._begun)
        return 'averaged weights' + (f' ({immaturity})' if immaturity else '')

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints where the run is too short for the average."""
        immaturity = '' if plan['batches'] is None else self.immaturity(plan['batches'])
        return {'average': f'at the end {immaturity}'} if immaturity else {}

    @contextlib.contextmanager
    def averaged(self, state: State) -> Iterator[None]:
        """The model holds the averaged weights inside of this context, and its own again behind it."""
        swapped_already = self._weights is not None
        if not swapped_already:
            self._on_eval_start(state)
        try:
            yield
        finally:
            if not swapped_already:
                self._on_eval_end(state)

    def state_dict(self) -> dict[str, Any]:
        """Settings and average, full tensors on the CPU of rank 0, which writes them; the other ranks get none.

        To be called on all ranks: shards are gathered.

        Raises:
            RuntimeError: The average stands in for the weights at this moment: what is being saved as the model
                would not be the model.
        """
        if self._weights is not None:
            raise RuntimeError('EMA: a checkpoint cannot be taken while the averaged weights stand in for the weights')
        return {**super().state_dict(), 'average': self._averages.whole().get('average'), 'begun': self._begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a saved average; it is laid out like the parameters when training or evaluation starts.

        Raises:
            ResumeError: It was saved with other settings, or by another algorithm of this name.
        """
        if 'average' not in state:
            raise ResumeError(
                "EMA: the checkpoint's average is of Composer's own EMA, which this one cannot read. "
                'Resume with composer_ema, or start a new run from the weights alone (load_weights_only: true).'
            )
        super().load_state_dict(state)
        self._begun = state.get('begun', 0)
        # None: saved before training had begun.
        self._averages.load({} if state['average'] is None else {'average': state['average']})

    def _on_init(self, state: State, logger: Logger) -> None:
        super()._on_init(state, logger)
        refuse_hidden_weights(self, state)

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        if not (self._averages.local or self._averages.loaded):
            self._begun = int(state.timestamp.batch)
        self._averages.lay_out(state.model)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        if batch % self._every == 0:
            updates = batch // self._every - self._begun // self._every - 1  # before this one
            self._averages.update(state.model, {'average': 1.0 - self._decay_at(updates)})

    def _decay_at(self, updates: int) -> float:
        return min(self.decay, (1 + updates) / (10 + updates)) if self.warmup else self.decay

    @torch.no_grad()
    def _on_eval_start(self, state: State, logger: Logger | None = None) -> None:
        self._averages.lay_out(state.model)
        shards, average = self._averages.shards, self._averages.local['average']
        self._weights = {name: shards[name].local.clone() for name in average}
        for name, value in average.items():
            shards[name].local.copy_(value)

    @torch.no_grad()
    def _on_eval_end(self, state: State, logger: Logger | None = None) -> None:
        if self._weights is None:
            raise RuntimeError('EMA: evaluation ended without having begun; were the events fired out of order?')
        self._averages.lay_out(state.model)  # drops what the forward passes have gathered of the average
        for name, value in self._weights.items():
            self._averages.shards[name].local.copy_(value)
        self._weights = None
