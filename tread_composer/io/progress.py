"""How far all ranks are: each writes a number into the scratch folder, the first adds them up and prints."""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from tread_composer.core.errors import UserError
from tread_composer.io.files import UNFINISHED, read_json, write_json

__all__ = ['Progress']

_WINDOW = 60.0  # seconds over which a rate is taken


class Progress:
    """Images/s, share and remaining time, every few seconds; also how ranks learn of each other's failures.

    Args:
        scratch: Folder that all ranks share.
        rank: Of this process.
        total: Images of the whole conversion.
        done_before: Of these, how many were finished by earlier runs.
        log: Prints a line; called on the first rank only.
        interval: Seconds between two lines.
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
    ) -> None:
        self._scratch, self._rank = scratch, rank
        self._total, self._before = total, done_before
        self._log, self._interval = log, interval
        self._mine = 0
        self._began = self._next = time.monotonic()
        self._next += interval
        self._looked = 0.0
        self._history: deque[tuple[float, int]] = deque([(self._began, 0)])

    @staticmethod
    def clear(scratch: Path) -> None:
        """Forget what earlier runs wrote. By the first rank, before the others begin."""
        for path in (*scratch.glob('rank-*.json'), *scratch.glob(f'{UNFINISHED}rank-*'), scratch / 'failure.json'):
            path.unlink(missing_ok=True)

    def add(self, images: int) -> None:
        """So many more are done on this rank."""
        self._mine += images

    def tick(self) -> None:
        """Print or publish if it is time. Call it often.

        Raises:
            UserError: On the first rank: another one has failed, with its message.
        """
        now = time.monotonic()
        if self._rank == 0 and now - self._looked > 1:
            self._looked = now
            self._raise_failure()
        if now < self._next:
            return
        self._next = now + self._interval
        if self._rank == 0:
            self._log(self.line(now))
        else:
            with contextlib.suppress(OSError):  # a number for the eye is no reason to stop
                write_json(self._scratch / f'rank-{self._rank}.json', self._mine)

    def line(self, now: float) -> str:
        """Rate, share and remaining time of all ranks together."""
        done = self._mine + sum(_number(path) for path in self._scratch.glob('rank-*.json'))
        self._history.append((now, done))
        while len(self._history) > 2 and now - self._history[1][0] > _WINDOW:
            self._history.popleft()
        (then, before), left = self._history[0], self._total - self._before - done
        rate = (done - before) / max(now - then, 1e-9)
        share = (self._before + done) / max(self._total, 1)
        eta = f'about {_duration(left / rate)} left' if rate > 0 else 'no estimate yet'
        return f'{self._before + done:,} of {self._total:,} images ({share:.1%}), {rate:,.1f} images/s, {eta}'

    def summary(self) -> str:
        """What this rank did, for the end."""
        seconds = time.monotonic() - self._began
        return f'{self._mine:,} images in {_duration(seconds)}, {self._mine / max(seconds, 1e-9):,.1f} images/s'

    def tell_failure(self, text: str) -> None:
        """Let the first rank know, so that it ends with this message instead of being stopped without one."""
        with contextlib.suppress(OSError):  # perhaps the disk is full, which is the failure; the launcher helps then
            write_json(self._scratch / 'failure.json', {'rank': self._rank, 'text': text})

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


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours} h {minutes:02d} min' if hours else f'{minutes} min {seconds:02d} s' if minutes else f'{seconds} s'
