"""``DirectionSchedule``: turns the velocity-direction loss of ``FlowMatching`` on and off in the course of a run.

Not two more settings of the objective, which is a pure function that knows nothing of a run.
"""

from collections.abc import Iterator
from typing import Any

import torch
from composer.core import State
from composer.loggers import Logger

from tread_composer.algorithms.base import AlgorithmBase
from tread_composer.algorithms.schedule import Window
from tread_composer.core.batch import DIRECTION_SWITCH, RAW_LATENTS
from tread_composer.core.errors import UserError

__all__ = ['DirectionSchedule']


class DirectionSchedule(AlgorithmBase):
    """Trains with the velocity-direction loss from ``start_time`` to ``end_time`` only.

    The weight is ``FlowMatching``'s (``direction_weight``). On ``Event.BATCH_START`` this writes the entry
    ``direction_switch`` into the batch, 1 or 0 for each sample: a compiled model sees another value, not another
    program. Evaluation is not touched.

    Logs ``direction/switch``.

    Args:
        start_time: Composer time string from which on the loss counts, for example ``'0.1dur'``; the beginning if None.
        end_time: Composer time string from which on it no longer counts; never if None.

    Raises:
        ValueError: No time is given, one is no time string, or the window is empty; on ``Event.INIT``, the model has
            no direction loss.

    Example:
        ``Trainer(model=LatentDiffusion(denoiser, FlowMatching(direction_weight=1.0), ...),
        algorithms=[DirectionSchedule(end_time='0.5dur')], callbacks=[KeyedDraws()], ...)``
    """

    def __init__(self, start_time: str | None = None, end_time: str | None = None) -> None:
        if start_time is None and end_time is None:
            raise ValueError('DirectionSchedule: give start_time, end_time or both; without it the loss is always on')
        self.start_time, self.end_time = start_time, end_time
        self._window = Window(start_time, end_time, 'the loss would never be on')
        self._on = False

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """What speaks against it in a run with this ``Config``: a window of an absent loss would have no effect."""
        if (fault := _fault(config.objective.instance)) is not None:
            yield '', fault

    def _on_init(self, state: State, logger: Logger) -> None:
        super()._on_init(state, logger)
        if (fault := _fault(getattr(state.model, 'objective', None))) is not None:
            raise UserError(f'algorithms.direction_schedule: {fault}')

    def _on_batch_start(self, state: State, logger: Logger) -> None:
        self._on = self._window.holds(state)
        size = state.batch[RAW_LATENTS].shape[0]
        state.batch[DIRECTION_SWITCH] = torch.full((size,), float(self._on))  # [B]: cut like any other entry

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        logger.log_metrics({'direction/switch': float(self._on)})


def _fault(objective: Any) -> str | None:
    """What an objective lacks."""
    weight = getattr(objective, 'direction_weight', None)
    if weight:
        return None
    fault = 'objective.direction_weight is 0; set it, for example to 1.0, or remove this'
    if weight is None:
        name = getattr(objective, 'name', type(objective).__name__)
        fault = f'objective {name!r} has none; take flow_matching, or remove this'
    return f'opens and closes the velocity-direction loss, and {fault}'
