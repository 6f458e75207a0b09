"""Progress of a run: a plain line now and then, in a terminal as in a log file, where a bar would write thousands."""

import time
from collections import deque
from typing import Any

import torch
from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from tread_composer.algorithms.rules import evaluated_weights
from tread_composer.io.progress import duration, to_stderr

__all__ = ['ProgressLines']

_SMOOTHED = 50  # batches whose mean loss is printed: that of one batch says more of its noise and times


class ProgressLines(LoggerDestination):
    """Prints the state of training on rank 0, to standard error: the first batch, every ``seconds``, and the last one.

    Batch, mean loss of the last 50, learning rate, images per second over all ranks, gradient norm (from
    ``UpdateGuard``), the largest GPU memory of this rank, remaining time. Evaluation and sampling count in the
    remaining time (they will come again) but not in the rate.

    Args:
        seconds: Time between two lines.
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self.seconds = seconds
        self._start = self._last_line = 0.0
        self._batch_start = self._in_batches = 0.0
        self._samples = 0
        self._share_at_start = 0.0
        self._losses: deque[Any] = deque(maxlen=_SMOOTHED)
        self._gradient_norm: float | None = None
        self._evaluated = ''  # weights

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say what begins."""
        self._start = self._last_line = time.monotonic()
        self._in_batches, self._share_at_start = 0.0, _share_done(state)
        self._samples = -int(state.timestamp.sample)
        self._losses.clear()
        self._print(f'{state.run_name}: training to {state.max_duration}, now at batch {int(state.timestamp.batch)}')

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self._batch_start = time.monotonic()  # waiting for data is part of a batch's time

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print a line if it is time for one."""
        clock = time.monotonic()
        is_first = self._in_batches == 0.0
        self._in_batches += clock - self._batch_start
        loss = (state.total_loss_dict or {}).get('loss/train/total')
        if loss is not None:
            self._losses.append(loss)  # read when a line is printed: reading waits for the GPU
        if is_first or clock - self._last_line >= self.seconds or _share_done(state) >= 1.0:
            self._last_line = clock
            self._print(self._line(state, clock))

    def eval_start(self, state: State, logger: Logger) -> None:
        """Ask which weights are evaluated."""
        self._evaluated = evaluated_weights(state)

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Print the figures of an evaluation; those of each batch are in the lines already."""
        self._gradient_norm = metrics.get('gradient_norm', self._gradient_norm)
        measured = {name: value for name, value in metrics.items() if name.startswith(('metrics/eval', 'digits/'))}
        if measured:
            figures = ', '.join(f'{name} {float(value):.4g}' for name, value in measured.items())
            is_loss = self._evaluated and any('eval' in name for name in measured)
            self._print(f'batch {step}: {figures}' + (f' of the {self._evaluated}' if is_loss else ''))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say that it is done."""
        self._print(f'{state.run_name}: done in {duration(time.monotonic() - self._start)}')

    def _line(self, state: State, clock: float) -> str:
        share, batch, total = _share_done(state), int(state.timestamp.batch), _total_batches(state)
        rate = (self._samples + int(state.timestamp.sample)) / max(self._in_batches, 1e-9)
        progressed = share - self._share_at_start
        remaining = (clock - self._start) / progressed * (1.0 - share) if progressed > 0 else 0.0
        losses = [float(loss) for loss in self._losses]
        parts = [
            f'batch {batch}{f"/{total}" if total else ""} ({share:.0%})',
            f'loss {sum(losses) / len(losses):.4f}' if losses else 'loss not finite',
            f'lr {state.optimizers[0].param_groups[0]["lr"]:.2e}',
            f'{rate:,.1f} images/s',
        ]
        if self._gradient_norm is not None:
            parts.append(f'gradient norm {self._gradient_norm:.3g}')
        if state.device.name == 'gpu':
            parts.append(f'{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB')
        return ', '.join([*parts, f'{duration(remaining)} left'])

    def _print(self, line: str) -> None:
        if dist.get_global_rank() == 0:
            to_stderr(line)


def _share_done(state: State) -> float:
    total = _total_batches(state)
    if total:  # finer than the elapsed duration, which counts whole epochs where the length is given in epochs
        return int(state.timestamp.batch) / total
    elapsed = state.get_elapsed_duration()
    return 0.0 if elapsed is None else float(elapsed)


def _total_batches(state: State) -> int | None:
    assert state.max_duration is not None
    if state.max_duration.unit == TimeUnit.BATCH:
        return int(state.max_duration)
    if state.max_duration.unit == TimeUnit.EPOCH and state.dataloader_len is not None:
        return int(state.max_duration) * int(state.dataloader_len)
    return None
