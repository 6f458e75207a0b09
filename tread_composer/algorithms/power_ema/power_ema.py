"""``PowerEMA``: averages whose length grows with the run, kept as snapshots, so that it can be chosen afterwards."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist

from tread_composer.algorithms.averages import Averages, AveragingAlgorithm
from tread_composer.algorithms.power_ema.posthoc import Average, reconstruct
from tread_composer.algorithms.power_ema.snapshots import (
    list_snapshots,
    power_exponent,
    refuse_other_run,
    write_snapshot,
)
from tread_composer.algorithms.schedule import parse_time
from tread_composer.core.errors import UserError

__all__ = ['PowerEMA']


class PowerEMA(AveragingAlgorithm):
    """Keep power-function averages of the trainable weights, and write them down at an interval (see ``posthoc``).

    After batch t, ``average = beta * average + (1 - beta) * weights`` with ``beta = (1 - 1 / t) ** (gamma + 1)``: the
    weights of batch s count as ``s ** gamma``, and the average reaches back over a share of the run so far that does
    not change. The weights in training are never touched, and evaluation does not see the averages.

    Writes ``<folder>/ba00000500.safetensors`` when the interval says so and at the end of training, before the
    checkpoint of that batch, which holds the averages as full float32 tensors under the plain parameter names.

    Args:
        widths: Relative standard deviations (``sigma_rel``), one for each average: 0.1 averages, roughly, over the
            last fifth of the run. Two that lie apart are needed to make others from; EDM2 keeps 0.05 and 0.10.
        interval: Composer time string; the more snapshots, the more exactly and the more narrowly one may choose.
        folder: Where the snapshots go. ``{run_name}`` is filled in. (Default: ``runs/{run_name}/snapshots``.)
        settings_digest: Of the settings that decide the run: snapshots of another run of that name are then known.

    Raises:
        ValueError: No average has such a width, or the interval is no time.
        UserError: On ``Event.INIT``, the run has two; on ``Event.FIT_START``, the folder holds snapshots of another
            run; at a snapshot, it cannot be written.
        ResumeError: The checkpoint was trained without this algorithm or with other widths.

    Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv 2312.02696,
    section 3.1.
    """

    default_folder: ClassVar[str] = 'snapshots'
    """In the folder of a run that is described by a YAML file."""

    def __init__(
        self,
        widths: Sequence[float] = (0.05, 0.1),
        interval: str = '500ba',
        *,
        folder: str = 'runs/{run_name}/snapshots',
        settings_digest: str | None = None,
    ) -> None:
        self.widths, self.interval, self.folder = tuple(float(width) for width in widths), interval, folder
        self.settings_digest = settings_digest
        if not widths or len(set(self.widths)) < len(self.widths):
            raise ValueError(f'widths: {list(widths)} must be one or more, each another, for example [0.05, 0.1]')
        try:
            self._exponents = {width: power_exponent(width) for width in self.widths}
        except ValueError as error:
            raise ValueError(f'widths: {error}') from None
        time = parse_time(interval, 'interval')
        if time is None or time.value <= 0:
            raise ValueError(f"interval: {interval!r} is not a time above 0 such as '500ba'")
        self.num_averages = len(self.widths)
        self._is_due = create_interval_scheduler(interval)
        self._averages = Averages('PowerEMA', self.widths)
        self._run: str | None = None
        self._previous: str | None = None  # digest of the last snapshot
        self._written = 0  # its batch

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints of the snapshots: their number and the space that they take; nothing if not known."""
        interval, total = Time.from_timestring(self.interval), plan['batches']
        batches = {
            TimeUnit.BATCH: interval.value,
            TimeUnit.EPOCH: interval.value * (plan['batches_per_epoch'] or 0),
            TimeUnit.SAMPLE: interval.value / plan['samples_per_step'],
            TimeUnit.DURATION: interval.value * (total or 0),
        }[interval.unit]
        if total is None or not batches:
            return {}
        count, each = math.ceil(total / batches), plan['parameters'] * 4 * len(self.widths) / 2**30  # GiB of float32
        on_disk = f'{count * each:,.1f} GiB on disk in all (algorithms.power_ema.interval)'
        return {'snapshots': f'{count:,} files of {each:,.2f} GiB, {on_disk}'}

    @staticmethod
    def average_afterwards(saved: Mapping[str, Any], folder: Path, width: float, *, allow_inexact: bool) -> Average:
        """The average of another width that ends with the last snapshot before a checkpoint (``posthoc.reconstruct``).

        ``saved`` is what the checkpoint holds of this algorithm; ``UserError`` if there was no snapshot yet.
        """
        if saved['previous'] is None:
            raise UserError(f'{folder}: the run had written no snapshot yet; take a later checkpoint')
        return reconstruct(folder, width, newest=saved['previous'], allow_inexact=allow_inexact)

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to: the widths. Interval and folder decide only what is written down."""
        return {'widths': list(self.widths)}

    def state_dict(self) -> dict[str, Any]:
        """Settings, averages as full tensors on the CPU of rank 0, and the last snapshot. Called on all ranks."""
        averages = {str(width): average for width, average in self._averages.whole().items()}
        written = {'run': self._run, 'previous': self._previous, 'written': self._written}
        return {**super().state_dict(), 'averages': averages, **written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved averages; ``ResumeError`` if they are of other widths."""
        super().load_state_dict(state)
        self._averages.load({float(width): average for width, average in state['averages'].items()})
        self._run, self._previous, self._written = state['run'], state['previous'], state['written']

    def _on_fit_start(self, state: State, logger: Logger) -> None:
        if self._run is None:
            self._run = ' '.join(filter(None, (state.run_name, self.settings_digest)))
        # A folder of another run is refused before time is spent on this one.
        if dist.get_global_rank() == 0:
            for path, snapshot in list_snapshots(self._folder(state)):
                refuse_other_run(snapshot, self._run, path)
        super()._on_fit_start(state, logger)

    def _on_batch_end(self, state: State, logger: Logger) -> None:
        batch = int(state.timestamp.batch)
        # 1 - beta; in the first batch beta is 0, so that what stood there before is forgotten.
        shares = {width: 1.0 - (1.0 - 1.0 / batch) ** (gamma + 1.0) for width, gamma in self._exponents.items()}
        self._averages.update(state.model, shares)

    def _on_batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write_if_due(state, Event.BATCH_CHECKPOINT)

    def _on_epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write_if_due(state, Event.EPOCH_CHECKPOINT)

    def _write_if_due(self, state: State, event: Event) -> None:
        batch = int(state.timestamp.batch)
        if not self._is_due(state, event) or batch == self._written:  # the last batch of an epoch has both events
            return
        assert self._run is not None
        averages = self._averages.whole()
        digests: list[Any] = [None]
        if dist.get_global_rank() == 0:
            folder, previous = self._folder(state), self._previous
            digests = [write_snapshot(folder, averages, batch=batch, run=self._run, previous=previous).digest]
        dist.broadcast_object_list(digests)  # a sharded checkpoint may hold the state of any rank
        self._previous, self._written = digests[0], batch

    def _folder(self, state: State) -> Path:
        return Path(self.folder.replace('{run_name}', state.run_name))
