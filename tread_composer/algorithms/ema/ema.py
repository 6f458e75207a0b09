"""``EMA``: a float32 average of the weights that survives resume and another number of ranks.

Composer's own EMA names its tensors after the wrapped model. When the wrapping changes between save and load (2 ranks
to 1, say) it silently trains on from the averaged weights; under FSDP2 it saves one rank's shard as if it were the
whole. This one keeps plain names and saves full tensors; in between, each rank averages what it holds.
"""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from composer.core import Algorithm, Event, State, TimeUnit
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor

from tread_composer.algorithms.averages import Shard, refuse_hidden_weights, shards_of
from tread_composer.algorithms.rules import refuse_conflicts, refuse_resume
from tread_composer.algorithms.schedule import parse_time
from tread_composer.core.errors import ResumeError

__all__ = ['EMA']

_EVENTS = (Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, Event.EVAL_START, Event.EVAL_END)


class EMA(Algorithm):
    """Average the trainable weights: ``average = decay * average + (1 - decay) * weights`` after each batch.

    The average starts as a copy of the weights on ``Event.FIT_START`` (after a checkpoint was loaded), is updated on
    ``Event.BATCH_END``, and stands in for the weights from ``Event.EVAL_START`` to ``Event.EVAL_END``. A checkpoint
    holds the raw weights under ``state/model`` and the average in this algorithm's state, as full float32 tensors
    under the plain parameter names. Buffers and parameters that need no gradient are not averaged.

    Under FSDP a rank keeps the average of its own shard alone. Saving gathers one parameter after the other into the
    main memory of the first rank, and loading reads the full average into that of every rank until training starts.
    A checkpoint therefore resumes on another number of ranks and under another strategy, as far as Composer can load
    the weights themselves: between full checkpoints, or between sharded ones.

    Args:
        decay: Share of the old average that stays at an update; DiT, SiT and TREAD use 0.9999 (half-life of 6931
            batches), which needs runs much longer than 10,000 batches.
        update_interval: Batches between two updates, as a time string such as ``'1ba'``; ``decay`` is per update.

    Raises:
        ValueError: ``decay`` is not in [0, 1), or the interval is not a number of batches.
        UserError: On ``Event.INIT``: the run has Composer's EMA too, or shards the weights in a way that hides them.
    """

    incompatible_with: ClassVar[Mapping[str, str]] = {
        'EMA': "Composer's EMA exchanges the weights for its own average at the same events, so that each would put "
        'back what the other has put in',
    }

    num_averages = 1
    """Copies of the trainable weights in float32."""

    def __init__(self, decay: float = 0.9999, update_interval: str = '1ba') -> None:
        if not 0 <= decay < 1:
            raise ValueError(f'decay: {decay!r} is not in [0, 1); DiT and TREAD use 0.9999')
        interval = parse_time(update_interval, 'update_interval')
        if interval is None or interval.unit != TimeUnit.BATCH or interval.value < 1:
            raise ValueError(f"update_interval: {update_interval!r} is not a number of batches such as '1ba'")
        self.decay, self.update_interval = float(decay), update_interval
        self._every = int(interval.value)
        self._average: dict[str, Tensor] | None = None  # of this rank's shards
        self._shards: dict[str, Shard] = {}
        self._loaded: dict[str, Tensor] | None = None
        self._weights: dict[str, Tensor] | None = None  # the raw weights, while the average stands in for them

    def __repr__(self) -> str:
        """The call that makes an equal ``EMA``."""
        return f'EMA(decay={self.decay!r}, update_interval={self.update_interval!r})'

    def match(self, event: Event, state: State) -> bool:
        """Whether ``apply`` has something to do at this event."""
        return event in _EVENTS

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Check, start, update, swap in or swap out, according to ``event``."""
        if event == Event.INIT:
            refuse_conflicts(self, state)
            refuse_hidden_weights(self, state)
        elif event == Event.AFTER_LOAD:
            refuse_resume(state)
        elif event == Event.BATCH_END:
            if int(state.timestamp.batch) % self._every == 0:
                self._update(state)
        elif event == Event.FIT_START:
            self._average_of(state)
        elif event == Event.EVAL_START:
            self._swap_in(state)
        else:
            self._swap_out(state)

    @contextlib.contextmanager
    def averaged(self, state: State) -> Iterator[None]:
        """The model holds the averaged weights inside of this context, and its own again behind it."""
        swapped_already = self._weights is not None
        if not swapped_already:
            self._swap_in(state)
        try:
            yield
        finally:
            if not swapped_already:
                self._swap_out(state)

    def state_dict(self) -> dict[str, Any]:
        """Settings and average, full tensors on the CPU of rank 0, which writes them; the other ranks get none.

        To be called on all ranks: shards are gathered.

        Raises:
            RuntimeError: The average stands in for the weights at this moment: what is being saved as the model
                would not be the model.
        """
        if self._weights is not None:
            raise RuntimeError('EMA: a checkpoint cannot be taken while the averaged weights stand in for the weights')
        average: dict[str, Tensor] | None = self._loaded if self._average is None else {}  # saved on untrained
        for name, local in (self._average or {}).items():
            whole = self._shards[name].whole(local)
            if dist.get_global_rank() == 0:
                average[name] = whole  # type: ignore[index]
        return {**super().state_dict(), 'settings': self._settings(), 'average': average}

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
        if state['settings'] != self._settings():
            remedy = (
                'Resume with the saved settings, or start a new run from the weights alone (load_weights_only: true).'
            )
            raise ResumeError.from_differences('EMA: the checkpoint', state['settings'], self._settings(), remedy)
        self._loaded = state['average']
        self._average = None

    def _settings(self) -> dict[str, Any]:
        return {'decay': self.decay, 'update_interval': self.update_interval}

    @torch.no_grad()
    def _average_of(self, state: State) -> dict[str, Tensor]:
        """The average of this rank's shards, begun if need be; ``_shards`` are those of this moment."""
        self._shards = shards_of(state.model)
        if self._average is None:
            self._average = self._begun() if self._loaded is None else self._resumed(self._loaded)
            self._loaded = None
        return self._average

    def _begun(self) -> dict[str, Tensor]:
        return {name: shard.local.float().clone() for name, shard in self._shards.items() if shard.trainable}

    def _resumed(self, loaded: dict[str, Tensor]) -> dict[str, Tensor]:
        # A layer that is frozen by now stays in the average; one that thaws could not be.
        missing = {name for name, shard in self._shards.items() if shard.trainable} - loaded.keys()
        unknown = loaded.keys() - self._shards.keys()
        if missing or unknown:
            raise ResumeError(
                f'EMA: the checkpoint averages other parameters than the model has. Not in the checkpoint: '
                f'{sorted(missing)[:5]}; not in the model: {sorted(unknown)[:5]}'
            )
        return {name: self._shards[name].cut(whole) for name, whole in loaded.items()}

    @torch.no_grad()
    def _update(self, state: State) -> None:
        average = self._average_of(state)
        torch._foreach_lerp_(  # type: ignore[attr-defined]
            list(average.values()), [self._shards[name].local.float() for name in average], 1.0 - self.decay
        )

    @torch.no_grad()
    def _swap_in(self, state: State) -> None:
        average = self._average_of(state)
        self._weights = {name: self._shards[name].local.clone() for name in average}
        for name, value in average.items():
            self._shards[name].local.copy_(value)

    @torch.no_grad()
    def _swap_out(self, state: State) -> None:
        if self._weights is None:
            raise RuntimeError('EMA: evaluation ended without having begun; were the events fired out of order?')
        self._shards = shards_of(state.model)  # drops what the forward passes have gathered of the average
        for name, value in self._weights.items():
            self._shards[name].local.copy_(value)
        self._weights = None
