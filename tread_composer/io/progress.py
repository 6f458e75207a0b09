"""Long work in one line every few seconds: how much is done, how fast, how much longer.

Lines, not bars: a job's output goes to a log file, where a bar would leave thousands of them.
"""

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

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
        unit: Plural noun, e.g. ``'samples'``.
        done_before: Units that earlier runs have finished: they count in the share, not in the rate.
        log: Prints a line.
        interval: Seconds between two lines.
        show: False for silence.
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
        show: bool = True,
    ) -> None:
        self._label, self._total, self._unit, self._before = label, total, unit, done_before
        self._log, self._interval, self._show = log, interval, show
        self._count = 0
        self._start = time.monotonic()
        self._next = self._start + interval
        self._history: deque[tuple[float, int]] = deque([(self._start, 0)])

    def add(self, units: int = 1) -> None:
        """Count, and print if it is time."""
        self._count += units
        now = time.monotonic()
        if self._show and now >= self._next:
            self._next = now + self._interval
            self._log(self.line(now))

    def line(self, now: float) -> str:
        """The line at this moment of ``time.monotonic``."""
        count = self._all()
        self._history.append((now, count))
        while len(self._history) > 2 and now - self._history[1][0] > _WINDOW:
            self._history.popleft()
        start, before = self._history[0]
        rate = (count - before) / max(now - start, 1e-9)
        speed = f'{rate:,.1f} {self._unit}/s' if rate < 100 else f'{rate:,.0f} {self._unit}/s'
        label, done = f'{self._label}: ' if self._label else '', self._before + count
        if self._total is None:
            return f'{label}{done:,} {self._unit}, {speed}'
        share, left = done / max(self._total, 1), max(self._total - done, 0)
        eta = f'about {duration(left / rate)} left' if rate > 0 else 'no estimate yet'
        return f'{label}{done:,} of {self._total:,} {self._unit} ({share:.1%}), {speed}, {eta}'

    def summary(self) -> str:
        """What this process did, for the end."""
        seconds = time.monotonic() - self._start
        rate = self._count / max(seconds, 1e-9)
        return f'{self._count:,} {self._unit} in {duration(seconds)}, {rate:,.1f} {self._unit}/s'

    def _all(self) -> int:
        return self._count


class RankProgress(Progress):
    """Progress of all ranks together: each writes its number into a folder, the first one adds them up and prints.

    Also how ranks learn of each other's failures: a rank that waits in a collective would not.

    Args:
        scratch: Folder that all ranks share.
        rank: This process, among all nodes.
        total: Units of the whole job.
        done_before: Units that earlier runs have finished.
        log: Prints a line; called on the first rank only.
        interval: Seconds between two lines.
        unit: Plural noun.
    """

    def __init__(
        self,
        scratch: Path,
        rank: int,
        *,
        total: int,
        done_before: int,
        log: Callable[[str], None],
        interval: float = 10.0,
        unit: str = 'images',
    ) -> None:
        super().__init__('', total, unit, done_before=done_before, log=log, interval=interval)
        self._scratch, self._rank = scratch, rank
        self._last_look = 0.0

    @staticmethod
    def clear(scratch: Path) -> None:
        """Forget what earlier runs wrote. By the first rank, before the others begin."""
        for path in (*scratch.glob('rank-*.json'), *scratch.glob(f'{UNFINISHED}rank-*'), scratch / 'failure.json'):
            path.unlink(missing_ok=True)

    def add(self, units: int = 1) -> None:
        """Count; ``tick`` prints."""
        self._count += units

    def tick(self) -> None:
        """Print or publish if it is time. Call it often, while waiting too.

        Raises:
            UserError: Another rank has failed; raised on the first rank, with the message of the other.
        """
        now = time.monotonic()
        if self._rank == 0 and now - self._last_look > 1:
            self._last_look = now
            self._raise_failure()
        if now < self._next:
            return
        self._next = now + self._interval
        if self._rank == 0:
            self._log(self.line(now))
        else:
            with contextlib.suppress(OSError):  # progress reporting must not fail the run
                write_json(self._scratch / f'rank-{self._rank}.json', self._count)

    def tell_failure(self, text: str) -> None:
        """Let the first rank know, so that it ends with this message instead of being stopped without one."""
        with contextlib.suppress(OSError):  # perhaps the disk is full, which is the failure; the launcher helps then
            write_json(self._scratch / 'failure.json', {'rank': self._rank, 'text': text})

    def _all(self) -> int:
        return self._count + sum(_number(path) for path in self._scratch.glob('rank-*.json'))

    def _raise_failure(self) -> None:
        path = self._scratch / 'failure.json'
        if path.exists():
            failure = read_json(path)
            raise UserError(f'on rank {failure["rank"]}: {failure["text"]}')


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # being replaced at this moment on a slow network file system
        return 0
