"""How long a run waits for its data."""

import time
from collections import deque

from composer.core import Callback, State
from composer.loggers import Logger

__all__ = ['DataWait']


class DataWait(Callback):
    """Logs ``time/data_wait``: the share of the time of the last 100 batches in which the loader was waited for.

    Of this rank, between Composer's events around the loader. A GPU that still works on the batch before hides such
    waits, so this is the most that a faster loader could save.
    """

    def __init__(self) -> None:
        self._begin = self._waited = 0.0
        self._batches: deque[tuple[float, float]] = deque(maxlen=100)  # seconds waited, seconds in all

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The loader is asked; what lies between this and the end of the batch before (evaluation) does not count."""
        self._begin = time.perf_counter()

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """It has answered."""
        self._waited = time.perf_counter() - self._begin

    def batch_end(self, state: State, logger: Logger) -> None:
        """Log the share."""
        self._batches.append((self._waited, time.perf_counter() - self._begin))
        waited, whole = (sum(seconds) for seconds in zip(*self._batches, strict=True))
        logger.log_metrics({'time/data_wait': waited / whole})
