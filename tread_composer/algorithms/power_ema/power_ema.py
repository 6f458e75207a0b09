"""``PowerEMA``: averages whose length grows with the run, kept as snapshots, so that it can be chosen after training.

How long the weights should be averaged is known only once images have been drawn, and a run keeps one length. Two
power-function averages, written down now and then, are enough to put any length together afterwards
(``tread_composer.algorithms.power_ema.posthoc``).
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from composer.core import Event, State, Time, TimeUnit
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from tread_composer.algorithms.averages import Shard, refuse_hidden_weights, shards_of
from tread_composer.algorithms.bound import BoundAlgorithm
from tread_composer.algorithms.power_ema.snapshots import (
    list_snapshots,
    power_exponent,
    refuse_other_run,
    write_snapshot,
)
from tread_composer.algorithms.rules import refuse_conflicts
from tread_composer.algorithms.schedule import parse_time
from tread_composer.core.errors import ResumeError

__all__ = ['PowerEMA']

log = logging.getLogger(__name__)


class PowerEMA(BoundAlgorithm):
    """Keep power-function averages of the trainable weights, and write them down at an interval.

    After batch t, ``average = beta * average + (1 - beta) * weights`` with ``beta = (1 - 1 / t) ** (gamma + 1)``: the
    weights of batch s count as ``s ** gamma``, and the average reaches back over a share of the run so far that does
    not change. The weights in training are never touched, and evaluation does not see the averages.

    Updates on ``Event.BATCH_END``; writes ``<folder>/ba00000500.safetensors`` on ``Event.BATCH_CHECKPOINT`` or
    ``Event.EPOCH_CHECKPOINT`` when the interval says so and at the end of training, before the checkpoint of that
    batch. A checkpoint holds the averages as full float32 tensors under the plain parameter names.

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
        self._is_due = create_interval_scheduler(interval)
        self._averages: dict[float, dict[str, Tensor]] = {}  # by width; of this rank's shards, float32
        self._shards: dict[str, Shard] = {}
        self._loaded: dict[float, dict[str, Tensor]] = {}  # full tensors, from a checkpoint
        self._run: str | None = None
        self._previous: str | None = None  # digest of the last snapshot
        self._written = 0  # its batch

    @property
    def num_averages(self) -> int:
        """Copies of the trainable weights in float32."""
        return len(self.widths)

    def files_written(self, plan: Mapping[str, Any]) -> dict[str, float] | None:
        """How many snapshots a run writes (``count``) and the size of each (``gib_each``, GiB); None if not known.

        Args:
            plan: ``batches``, ``batches_per_epoch`` (None where the data are not known), ``samples_per_step`` and
                ``parameters`` of the run.
        """
        if plan['batches'] is None:
            return None
        interval = Time.from_timestring(self.interval)
        batches = {
            TimeUnit.BATCH: interval.value,
            TimeUnit.EPOCH: interval.value * (plan['batches_per_epoch'] or 0),
            TimeUnit.SAMPLE: interval.value / plan['samples_per_step'],
            TimeUnit.DURATION: interval.value * plan['batches'],
        }.get(interval.unit)
        if not batches:
            return None
        gib_each = plan['parameters'] * 4 * len(self.widths) / 2**30  # float32
        return {'count': math.ceil(plan['batches'] / batches), 'gib_each': gib_each}

    def plan_rows(self, plan: Mapping[str, Any]) -> dict[str, str]:
        """What ``plan`` prints of the snapshots: their number and the space that they take."""
        files = self.files_written(plan)
        if files is None:
            return {}
        each, count = files['gib_each'], files['count']
        total = f'{count * each:,.1f} GiB on disk in all (algorithms.power_ema.interval)'
        return {'snapshots': f'{count:,} files of {each:,.2f} GiB, {total}'}

    def __repr__(self) -> str:
        """The call that makes an equal ``PowerEMA``."""
        arguments = f'widths={self.widths!r}, interval={self.interval!r}, folder={self.folder!r}'
        return f'PowerEMA({arguments}, settings_digest={self.settings_digest!r})'

    def match(self, event: Event, state: State) -> bool:
        """Whether ``apply`` has something to do at this event."""
        writing = (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT)
        return event in (Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, *writing)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Check, start, update or write, according to ``event``."""
        if event == Event.INIT:
            refuse_conflicts(self, state)
            refuse_hidden_weights(self, state)
        elif event == Event.AFTER_LOAD:
            self.refuse_foreign_checkpoint(state)
        elif event == Event.FIT_START:
            self._start(state)
        elif event == Event.BATCH_END:
            self._update(state)
        elif self._is_due(state, event) and int(state.timestamp.batch) != self._written:
            self._write(state)  # the last batch of an epoch has both events

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to: the widths. Interval and folder decide only what is written down."""
        return {'widths': list(self.widths)}

    def state_dict(self) -> dict[str, Any]:
        """Settings, averages as full tensors on the CPU of rank 0, and which snapshot was the last.

        To be called on all ranks: shards are gathered.
        """
        averages = {str(width): self._gathered(width) for width in self._averages}
        averages = averages or {str(width): average for width, average in self._loaded.items()}  # saved on untrained
        written = {'run': self._run, 'previous': self._previous, 'written': self._written}
        return {**super().state_dict(), 'averages': averages, **written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved averages; they are laid out like the parameters when training starts.

        Raises:
            ResumeError: They are of other widths.
        """
        super().load_state_dict(state)
        self._loaded = {float(width): average for width, average in state['averages'].items()}
        self._averages, self._run = {}, state['run']
        self._previous, self._written = state['previous'], state['written']

    def _folder(self, state: State) -> Path:
        return Path(self.folder.replace('{run_name}', state.run_name))

    def _start(self, state: State) -> None:
        """Lay out what was loaded, and refuse a folder of another run before time is spent on this one."""
        if self._run is None:
            self._run = ' '.join(filter(None, (state.run_name, self.settings_digest)))
        if dist.get_global_rank() == 0:
            for path, snapshot in list_snapshots(self._folder(state)):
                refuse_other_run(snapshot, self._run, path)
        if self._averages:
            return
        self._shards = shards_of(state.model)
        trainable = {name: shard for name, shard in self._shards.items() if shard.trainable}
        if not self._loaded:
            # The first update has beta = 0: what stands here before is forgotten.
            self._averages = {
                width: {name: shard.local.float().clone() for name, shard in trainable.items()} for width in self.widths
            }
            return
        loaded = self._loaded[self.widths[0]].keys()
        missing, unknown = trainable.keys() - loaded, loaded - self._shards.keys()
        if missing or unknown:
            raise ResumeError(
                f'PowerEMA: the checkpoint averages other parameters than the model has. Not in the checkpoint: '
                f'{sorted(missing)[:5]}; not in the model: {sorted(unknown)[:5]}'
            )
        self._averages = {
            width: {name: self._shards[name].cut(whole) for name, whole in average.items()}
            for width, average in self._loaded.items()
        }
        self._loaded = {}

    @torch.no_grad()
    def _update(self, state: State) -> None:
        batch = int(state.timestamp.batch)
        self._shards = shards_of(state.model)
        for width, average in self._averages.items():
            share = 1.0 - (1.0 - 1.0 / batch) ** (self._exponents[width] + 1.0)
            # What was frozen in the course of the run is still averaged.
            weights = [self._shards[name].local.float() for name in average]
            torch._foreach_lerp_(list(average.values()), weights, share)  # type: ignore[attr-defined]

    def _gathered(self, width: float) -> dict[str, Tensor]:
        """Full tensors on rank 0, nothing on the others, all of which must ask."""
        gathered = {}
        for name, local in self._averages[width].items():
            whole = self._shards[name].whole(local)
            if dist.get_global_rank() == 0:
                gathered[name] = whole
        return gathered

    def _write(self, state: State) -> None:
        assert self._run is not None
        averages, batch = {width: self._gathered(width) for width in self.widths}, int(state.timestamp.batch)
        written: list[Any] = [None]
        if dist.get_global_rank() == 0:
            snapshot, aside = write_snapshot(
                self._folder(state), averages, batch=batch, run=self._run, previous=self._previous
            )
            written = [snapshot.digest]
            if aside is not None:
                log.warning(
                    'power_ema: the run was resumed from an earlier checkpoint and has come to other averages at '
                    'batch %d than before; the old snapshot is kept as %s and not used',
                    batch,
                    aside,
                )
        dist.broadcast_object_list(written)  # a sharded checkpoint may hold the state of any rank
        self._previous, self._written = written[0], batch
