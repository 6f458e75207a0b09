"""Stops a run whose data ran out early.

streaming 0.13 ends an epoch without an exception when a shard is missing or does not match its hash. The run would go
on with part of the data, and nothing in its curves would say so.
"""

from composer.core import Callback, State
from composer.loggers import Logger

from tread_composer.core.errors import UserError

__all__ = ['EpochIsWhole']


class EpochIsWhole(Callback):
    """Compares the batches of each finished epoch with the number that the data loader promised, if it has one."""

    def epoch_end(self, state: State, logger: Logger) -> None:
        """Compare, before the epoch's checkpoint; ``UserError`` where batches are missing."""
        if state.dataloader_len is None or state.previous_timestamp is None:
            return
        # The timestamp already counts the next epoch here; the previous one still holds the epoch that ended.
        seen, promised = int(state.previous_timestamp.batch_in_epoch), int(state.dataloader_len)
        if seen < promised:
            raise UserError(
                f'epoch {int(state.previous_timestamp.epoch)} ended after {seen} of {promised} batches: part of the '
                'data could not be read. A missing or damaged shard does this (the reader prints a traceback '
                'further up, but raises nothing). Verify the data set, restore the shard, and resume from the last '
                'checkpoint.'
            )
