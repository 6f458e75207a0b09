"""Progress for a log file: a plain line now and then, where a bar would write thousands of them."""

import sys
import time
from typing import Any, TextIO

from composer.core import State, TimeUnit
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

__all__ = ['ProgressLines']


class ProgressLines(LoggerDestination):
    """Prints batch, loss, rate and remaining time on rank 0: the first batch, every ``seconds``, and the last one.

    Evaluation and sampling count in the remaining time (they will come again) but not in the rate.

    Args:
        seconds: Time between two lines.
        stream: Where to print. (Default: standard error as it is when training starts.)
    """

    def __init__(self, seconds: float = 10.0, stream: TextIO | None = None) -> None:
        self.seconds, self._stream = seconds, stream
        self._start = self._last_line = 0.0
        self._batch_began = self._in_batches = 0.0
        self._batches = 0
        self._share_at_start = 0.0

    def fit_start(self, state: State, logger: Logger) -> None:
        """Say what begins."""
        self._start = self._last_line = time.monotonic()
        self._in_batches, self._batches, self._share_at_start = 0.0, 0, _share_done(state)
        self._print(f'{state.run_name}: training to {state.max_duration}, now at batch {int(state.timestamp.batch)}')

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """Start the clock."""
        self._batch_began = time.monotonic()  # waiting for data is part of a batch's time

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print a line if it is time for one."""
        now = time.monotonic()
        self._in_batches += now - self._batch_began
        self._batches += 1
        if self._batches == 1 or now - self._last_line >= self.seconds or _share_done(state) >= 1.0:
            self._last_line = now
            self._print(self._line(state, now))

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        """Print the figures of an evaluation; those of each batch are in the lines already."""
        measured = {name: value for name, value in metrics.items() if name.startswith(('metrics/eval', 'digits/'))}
        if measured:
            self._print(f'batch {step}: ' + ', '.join(f'{name} {float(value):.4g}' for name, value in measured.items()))

    def fit_end(self, state: State, logger: Logger) -> None:
        """Say that it is done."""
        self._print(f'{state.run_name}: done in {_clock(time.monotonic() - self._start)}')

    def _line(self, state: State, now: float) -> str:
        share = _share_done(state)
        losses = state.total_loss_dict or {}
        loss = losses.get('loss/train/total')
        rate = self._batches / max(self._in_batches, 1e-9)
        progressed = share - self._share_at_start
        remaining = (now - self._start) / progressed * (1.0 - share) if progressed > 0 else 0.0
        batch, total = int(state.timestamp.batch), _total_batches(state)
        return (
            f'batch {batch}{f"/{total}" if total else ""} ({share:.0%}), '
            f'loss {f"{float(loss):.4f}" if loss is not None else "not finite"}, '
            f'{rate:.2f} batches/s, {_clock(remaining)} left'
        )

    def _print(self, line: str) -> None:
        if dist.get_global_rank() == 0:
            print(line, file=self._stream or sys.stderr, flush=True)


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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{rest:02}'
