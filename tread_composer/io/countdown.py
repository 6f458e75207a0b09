"""A line every few seconds about work of one process that takes minutes: how much, how fast, how much longer."""

import time
from collections.abc import Callable

__all__ = ['Countdown']


class Countdown:
    """Counts units of work and says so now and then.

    Args:
        what: Begins each line, e.g. ``'train'``.
        total: Units in all; None if nobody knows.
        unit: Their name, e.g. ``'samples'``.
        say: Where lines go.
        every: Seconds between two lines; nothing is said before the first of them.
    """

    def __init__(
        self, what: str, total: int | None, unit: str, say: Callable[[str], None], every: float = 10.0
    ) -> None:
        self.what, self.total, self.unit, self.done = what, total, unit, 0
        self._say, self._every = say, every
        self._start = self._last = time.monotonic()

    def advance(self, units: int) -> None:
        """That many more are done."""
        self.done += units
        now = time.monotonic()
        if now - self._last < self._every or not self.done:
            return
        self._last = now
        rate = self.done / (now - self._start)
        if self.total is None:
            self._say(f'{self.what}: {self.done:,} {self.unit} so far, {rate:,.0f}/s')
            return
        minutes, seconds = divmod(int(max(self.total - self.done, 0) / rate), 60)
        self._say(
            f'{self.what}: {self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%}), '
            f'{rate:,.0f}/s, {minutes} min {seconds} s to go'
        )
