"""What happens when an update of the weights would not be finite, or would be far larger than those before it."""

import math
import statistics
from collections import deque
from collections.abc import Collection, Iterable
from typing import Any, Literal

import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tread_composer.core.batch import RAW_LATENTS, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.core.options import check_bounds
from tread_composer.io.progress import to_stderr

__all__ = ['OnNonfinite', 'RewindError', 'UpdateGuard', 'gradient_norm']

OnNonfinite = Literal['stop', 'skip', 'rewind']

_HISTORY = 100  # norms whose median a spike is measured against
_MIN_HISTORY = 20  # the first updates of a run are large
_MAX_SKIPPED = 20  # in a row: by then the weights are the cause, not a batch
_NAMES_SHOWN = 8


class RewindError(Exception):
    """The run has to go back to its last checkpoint and leave out the batches up to ``batch`` (counted from 0)."""

    def __init__(self, batch: int, reason: str) -> None:
        super().__init__(reason)
        self.batch, self.reason = batch, reason


class UpdateGuard(Callback):
    """Looks at the gradient of each batch before the optimizer does.

    A gradient that holds NaN or infinity never reaches weights, averages or checkpoints: all ranks decide alike, and a
    skipped batch leaves the optimizer's state as it was. Under fp16 the gradient scaler does this work.

    Logs ``gradient_norm``, measured before any clipping, and ``skipped_updates``, the count of this run.

    Args:
        on_nonfinite: ``'stop'`` ends the run with a message that names the samples; ``'skip'`` leaves the batch out and
            goes on; ``'rewind'`` raises ``RewindError`` (``run.train`` restarts from the last checkpoint without
            the batches since then).
        spike_factor: A norm above this multiple of the median of the last 100 is treated like one that is not finite;
            None accepts any finite norm.
        skipped_batches: Batches, counted from 0, that leave the weights as they are: those before a rewind.

    Raises:
        UserError: While training, on ``'stop'``, or after 20 batches in a row that had to be skipped.
    """

    def __init__(
        self,
        on_nonfinite: OnNonfinite = 'stop',
        spike_factor: float | None = None,
        skipped_batches: Collection[int] = (),
    ) -> None:
        check_bounds('on_nonfinite', OnNonfinite, on_nonfinite)
        if spike_factor is not None and not spike_factor > 1:
            raise ValueError(f'spike_factor={spike_factor}: a multiple of the median gradient norm, so more than 1')
        self.on_nonfinite, self.spike_factor = on_nonfinite, spike_factor
        self.skipped_batches = frozenset(skipped_batches)
        self._norms: deque[float] = deque(maxlen=_HISTORY)
        self._skipped = self._skipped_in_a_row = 0
        self._norm: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """The norms that the next ones are compared with: a resumed run decides like one that was never stopped."""
        counts = {'skipped': self._skipped, 'skipped_in_a_row': self._skipped_in_a_row}
        return {'norms': list(self._norms), **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` returned."""
        self._norms = deque(state['norms'], maxlen=_HISTORY)
        self._skipped, self._skipped_in_a_row = state['skipped'], state['skipped_in_a_row']

    def after_backward(self, state: State, logger: Logger) -> None:
        """Measure the gradient so far: behind the last microbatch it is whole, and not clipped yet."""
        scaled = state.scaler is not None and state.scaler.is_enabled()
        self._norm = None if scaled else gradient_norm(state)

    def after_train_batch(self, state: State, logger: Logger) -> None:
        """Keep this batch's gradient from the optimizer if it must not be applied."""
        batch = int(state.timestamp.batch)
        if batch in self.skipped_batches:
            _drop_gradients(state)
            return
        if self._norm is None:
            return
        # The host waits for the device here. It would in Composer's next line, which reads the loss before the
        # optimizer steps (docs/lab_notes.md), so this costs no wait of its own.
        norm = float(self._norm)
        logger.log_metrics({'gradient_norm': norm, 'skipped_updates': self._skipped})
        reason = self._problem(norm)
        if reason is None:
            self._norms.append(norm)
            self._skipped_in_a_row = 0
            return
        text = f'batch {batch}: {reason}. {_samples(state)}'
        if self.on_nonfinite == 'stop':
            raise UserError(
                f'{text}\nNothing of this batch has reached the weights, and the checkpoints are those of before. '
                f'Repair or remove these samples, lower the learning rate, or set on_nonfinite to skip (leave such '
                f'batches out) or rewind (go back to the last checkpoint)'
            )
        if self.on_nonfinite == 'rewind':
            raise RewindError(batch, text)
        self._skip(state, text)

    def _problem(self, norm: float) -> str | None:
        if not math.isfinite(norm):
            return f'the gradient is not finite (its norm is {norm})'
        if self.spike_factor is None or len(self._norms) < _MIN_HISTORY:
            return None
        median = statistics.median(self._norms)
        if norm <= self.spike_factor * median:
            return None
        return (
            f'the norm of the gradient is {norm:.4g}, more than spike_factor={self.spike_factor:g} times the median '
            f'{median:.4g} of the last {len(self._norms)}'
        )

    def _skip(self, state: State, text: str) -> None:
        _drop_gradients(state)
        self._skipped += 1
        self._skipped_in_a_row += 1
        if dist.get_global_rank() == 0:
            to_stderr(f'{text} Skipped: {self._skipped} so far')
        if self._skipped_in_a_row >= _MAX_SKIPPED:
            raise UserError(
                f'{text}\nThis was the {_MAX_SKIPPED}th batch in a row that had to be skipped: the weights have '
                f'diverged. Go back to an earlier checkpoint with a lower learning rate'
            )


def gradient_norm(state: State) -> Tensor:
    """The L2 norm of the whole model's gradient, float32 ``[]`` on the device: no host synchronisation.

    Under FSDP each rank has its shards, and the squares are summed over the ranks; under DDP every rank has it all.
    """
    gradients = [parameter.grad for parameter in state.model.parameters() if parameter.grad is not None]
    gradients = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    gradients = [gradient for gradient in gradients if gradient.numel()]
    if gradients:
        norms = torch._foreach_norm(gradients, 2, dtype=torch.float32)  # type: ignore[attr-defined]
        square = torch.linalg.vector_norm(torch.stack(norms)).square()  # of the norms' norm, in two kernels
    else:
        square = state.device.tensor_to_device(torch.zeros(()))
    if state.fsdp_config is not None and dist.get_world_size() > 1:
        dist.all_reduce(square, reduce_operation='SUM')
        square = square / (getattr(state.fsdp_config, 'data_parallel_replicate_degree', None) or 1)
    return square.sqrt()


def _drop_gradients(state: State) -> None:
    # Every optimizer of torch passes over parameters without a gradient, moments included.
    for parameter in state.model.parameters():
        parameter.grad = None


def _samples(state: State) -> str:
    """The samples to look at: those whose latents are not finite on any rank, else all of the batch."""
    batch, rows = state.batch, []
    if isinstance(batch, dict) and SAMPLE_IDS in batch and RAW_LATENTS in batch:
        finite_B = batch[RAW_LATENTS].flatten(1).isfinite().all(1)
        rows = list(zip(batch[SAMPLE_IDS].tolist(), finite_B.tolist(), strict=True))
    rows = [row for share in dist.all_gather_object(rows) for row in share]
    bad = [sample for sample, is_finite in rows if not is_finite]
    if bad:
        return f'Latents that are not finite: {_named(state, bad)}.'
    return f'Its latents are finite; samples: {_named(state, dict(rows))}.' if rows else 'Its samples have no ids.'


def _named(state: State, samples: Iterable[int]) -> str:
    """Positions in the data set, each with the name of the image that it was made of where the reader has it."""
    name_of = getattr(getattr(state.dataloader, 'dataset', None), 'name_of', None)
    ordered = sorted(set(samples))
    shown = [f'{sample} ({name_of(sample)})' if name_of else str(sample) for sample in ordered[:_NAMES_SHOWN]]
    return ', '.join(shown) + (f' and {len(ordered) - _NAMES_SHOWN} more' if len(ordered) > _NAMES_SHOWN else '')
