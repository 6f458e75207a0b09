"""Long work in one line every few seconds: how much is done, how fast, how much longer.

Lines, not bars: a job's output goes to a log file, where a bar would leave thousands of them.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError
from tread_composer.io.files import UNFINISHED, read_json, write_json

__all__ = ['Progress', 'RankProgress', 'duration', 'silent', 'to_stderr']

_WINDOW = 60.0  # seconds: a rate over all of a day's work would hide that the disk has become slow


def duration(seconds: float) -> str:
    """``'1 h 02 min'``, ``'3 min 05 s'`` or ``'7 s'``."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f'{hours} h {minutes:02d} min'
    return f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'


def silent(line: str) -> None:
    """Say nothing, on ranks that must not."""
    del line


def to_stderr(line: str) -> None:
    """Print at once, beside the output of the command."""
    print(line, file=sys.stderr, flush=True)


class Progress:
    """Counts units of work, and prints share, rate and remaining time every few seconds; nothing for quick work.

    Args:
        label: Begins each line, e.g. ``'scanning /data'``; may be empty.
        total: Units in all; None if nobody knows yet.
        done_before: Units that earlier runs have finished: they count in the share, not in the rate.
        interval: Seconds between two lines.
    """

    def __init__(
        self,
        label: str,
        total: int | None = None,
        unit: str = 'files',
        *,
        done_before: int = 0,
        log: Callable[[str], None] = to_stderr,
        interval: float = 10.0,
    ) -> None:
        self._label, self._total, self._unit, self._before = label, total, unit, done_before
        self._log, self._interval = log, interval
        self._count = 0
        self._start = time.monotonic()
        self._next = self._start + interval
        self._history: deque[tuple[float, int]] = deque([(self._start, 0)])
        self._last_add = self._start

    def add(self, units: int = 1) -> None:
        """Count, and print if it is time."""
        self._count += units
        clock = self._last_add = time.monotonic()
        if clock >= self._next:
            self._next = clock + self._interval
            self._log(self._line(clock))

    def within(self, count: int, parts: str) -> None:
        """Print, if it is time, how many ``parts`` of the units in work are done: where a unit takes minutes."""
        clock = time.monotonic()
        if clock >= self._next:
            self._next = clock + self._interval
            rate = count / max(clock - self._last_add, 1e-9)
            self._log(f'{self._line(clock)}; in work: {count:,} {parts}, {rate:,.2g} {parts}/s')

    def tick(self) -> None:
        """Called often, while waiting too; here nobody else is to be heard."""

    def summary(self) -> str:
        """What this process did, for the end."""
        seconds = time.monotonic() - self._start
        rate = self._count / max(seconds, 1e-9)
        return f'{self._count:,} {self._unit} in {duration(seconds)}, {rate:,.1f} {self._unit}/s'

    def _line(self, clock: float) -> str:
        count = self._all()
        self._history.append((clock, count))
        while len(self._history) > 2 and clock - self._history[1][0] > _WINDOW:
            self._history.popleft()
        start, before = self._history[0]
        rate = (count - before) / max(clock - start, 1e-9)
        speed = f'{rate:,.1f} {self._unit}/s' if rate < 100 else f'{rate:,.0f} {self._unit}/s'
        label, done = f'{self._label}: ' if self._label else '', self._before + count
        if self._total is None:
            return f'{label}{done:,} {self._unit}, {speed}'
        share, left = done / max(self._total, 1), max(self._total - done, 0)
        eta = f'about {duration(left / rate)} left' if rate > 0 else 'no estimate yet'
        return f'{label}{done:,} of {self._total:,} {self._unit} ({share:.1%}), {speed}, {eta}'

    def _all(self) -> int:
        return self._count


class RankProgress(Progress):
    """Progress of all ranks together: each writes its number into a folder, rank 0 adds them up and prints.

    Also how ranks learn of each other's failures: a rank that waits in a collective would not. ``scratch`` is a folder
    that all ranks share; ``settings`` are those of ``Progress``, for the whole job.
    """

    def __init__(self, scratch: Path, rank: int, *, unit: str = 'images', **settings: Any) -> None:
        super().__init__('', unit=unit, **settings)
        self._scratch, self._rank = scratch, rank
        self._last_look = 0.0

    @staticmethod
    def clear(scratch: Path) -> None:
        """Forget what earlier runs wrote. By rank 0, before the others begin."""
        for path in (*scratch.glob('rank-*.json'), *scratch.glob(f'{UNFINISHED}rank-*'), scratch / 'failure.json'):
            path.unlink(missing_ok=True)

    def add(self, units: int = 1) -> None:
        """Count; ``tick`` prints."""
        self._count += units
        self._last_add = time.monotonic()

    def within(self, count: int, parts: str) -> None:
        """As of ``Progress``, by rank 0; the others say nothing of their units in work."""
        if self._rank == 0:
            super().within(count, parts)

    def tick(self) -> None:
        """Print or publish if it is time. Call it often, while waiting too.

        Raises:
            UserError: Another rank has failed; raised on rank 0, with the message of the other.
        """
        clock = time.monotonic()
        failure = self._scratch / 'failure.json'
        if self._rank == 0 and clock - self._last_look > 1:
            self._last_look = clock
            if failure.exists():
                content = read_json(failure)
                raise UserError(f'on rank {content["rank"]}: {content["text"]}')
        if clock < self._next:
            return
        self._next = clock + self._interval
        if self._rank == 0:
            self._log(self._line(clock))
        else:
            with contextlib.suppress(OSError):  # progress reporting must not fail the run
                write_json(self._scratch / f'rank-{self._rank}.json', self._count)

    def tell_failure(self, text: str) -> None:
        """Let rank 0 know, so that it ends with this message instead of being stopped without one."""
        with contextlib.suppress(OSError):  # perhaps the disk is full, which is the failure; the launcher helps then
            write_json(self._scratch / 'failure.json', {'rank': self._rank, 'text': text})

    def _all(self) -> int:
        count = self._count
        for path in self._scratch.glob('rank-*.json'):
            with contextlib.suppress(OSError, ValueError):  # being replaced on a slow network file system
                count += int(path.read_text())
        return count
