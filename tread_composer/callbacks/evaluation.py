"""FID and its relatives while a run trains, on averaged weights and on all ranks, without a trace in the training."""

import itertools
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from composer.core import Event, State
from composer.loggers import Logger
from composer.utils import dist

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.callbacks.sampling import SamplingCallback, Weights, bare_model, log_file
from tread_composer.core.bounds import MeasuredCount, NonNegative, Seed, Steps
from tread_composer.core.errors import UserError
from tread_composer.core.options import check_bounds
from tread_composer.io.progress import silent, to_stderr
from tread_composer.io.ranks import Ranks, agreed
from tread_composer.metrics.drawing import Draws
from tread_composer.metrics.features import looked
from tread_composer.metrics.inception import find_weights
from tread_composer.metrics.measurement import Measurement, default_cache
from tread_composer.metrics.measurer import Measurer
from tread_composer.metrics.protocol import append_results, load_results, series_name

__all__ = ['Evaluation']

log = logging.getLogger(__name__)

Labels = Literal['balanced', 'random']


class Evaluation(SamplingCallback):
    """Draws images at an interval and measures them against a reference.

    Each rank draws and looks at its share; the features are gathered, not the images, and the first rank measures. The
    numbers go to the loggers (``metrics.protocol.series_name``) and, each with its protocol, into
    ``<folder>/results.json``. Below 50,000 images the name of a metric says how many there were (``fid_10000``).
    Weights, seed and settings decide the number; the numbers of ranks and of images in a call move it by rounding
    alone. Images that are not finite make a number impossible: that is logged, and training goes on.

    Args beside those of ``SamplingCallback`` and ``Measurement``:
        features: A name in ``metrics.FEATURES``, or ``package.module:Class``; with ``'digits'`` FID is called
            ``fd_digits``.
        num_samples: Images.
        labels: ``'balanced'``, as many of each class; or ``'random'``, drawn by the seed.
        seed: Image i has the seed ``seed + i``, as with the command ``sample``.
        batch_size: Images drawn and looked at in one go on a rank.

    Raises:
        UserError: Also where the reference or the weights of Inception are missing or not what they must be.
    """

    default_folder: ClassVar[str] = '.'
    """In the folder of a run that is described by a YAML file."""

    owner: ClassVar[str] = 'evaluation'

    def __init__(
        self,
        reference: str,
        interval: str | None = None,
        *,
        metrics: Sequence[str] = ('fid',),
        features: str = 'inception',
        inception: str | None = None,
        inception_sha256: str | None = None,
        num_samples: MeasuredCount = 10_000,
        labels: Labels = 'balanced',
        sampler: str = 'heun',
        num_steps: Steps = 50,
        guidance_scale: NonNegative = 1.0,
        weights: Weights = 'ema',
        seed: Seed = 0,
        batch_size: int = 64,
        kid_subset_size: int = 1000,
        folder: str = 'runs/{run_name}',
        cache: str | None = None,
    ) -> None:
        check_bounds('labels', Labels, labels)
        check_bounds('num_samples', MeasuredCount, num_samples)
        check_bounds('seed', Seed, seed)
        super().__init__(interval, folder, sampler, num_steps, guidance_scale, weights)
        self.measurement = Measurement(
            reference=reference,
            metrics=tuple(metrics),
            features=features,
            inception=inception,
            inception_sha256=inception_sha256,
            kid_subset_size=kid_subset_size,
            batch_size=batch_size,
            cache=Path(cache) if cache else default_cache(),
        )
        self.measurement.check(num_samples)
        self.num_samples, self.labels, self.seed = num_samples, labels, seed
        self._batch = -1
        self._spent: dict[int, float] = {}  # batch -> seconds of the measurement after it
        self._measurer: Measurer | None = None
        self._resolution = 0  # side of an image in pixels, once one was drawn

    def missing_files(self, config: Any) -> Iterator[tuple[str, str]]:
        """What it would miss behind the data and the model of this ``Config``: pairs of a setting and a text."""
        reference = self.measurement.reference
        path = os.path.abspath(reference)
        made_later = config.data.name == 'digits' and path.startswith(os.path.abspath(config.data.local) + os.sep)
        if not os.path.exists(path) and not made_later and reference != 'digits':
            text = 'does not exist; give a folder of images, an npz of the ADM suite, or MDS images'
            yield 'reference', f'{reference!r} {text}'
        if self.measurement.features == 'inception':
            try:
                find_weights(self.measurement.inception)
            except UserError as error:
                yield 'inception', str(error)

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first measurement, and look at the reference."""
        del logger
        self._resolution = self.check(state)
        classes = bare_model(state).num_classes
        if self.labels == 'balanced' and classes and self.num_samples % classes:
            raise UserError(
                f'callbacks.{self.owner}.num_samples: {self.num_samples} is no multiple of the {classes} classes, '
                f'which labels: balanced needs; take {max(1, round(self.num_samples / classes)) * classes}, '
                'or labels: random'
            )
        device = torch.device('cuda' if state.device.name == 'gpu' else 'cpu')
        ranks = Ranks(dist.get_global_rank(), dist.get_world_size(), dist.get_local_rank(), dist.get_local_world_size())

        def opened() -> Measurer:
            if self._path(state).exists():
                load_results(self._path(state))
            log = to_stderr if ranks.is_first else silent
            measurer = Measurer(self.measurement, device, ranks, log)
            measurer.check(self.num_samples, self._resolution, has_labels=classes > 0)
            return measurer

        self._measurer = agreed(opened, f'callbacks.{self.owner}: ')
        agreed(self._measurer.prepare, f'callbacks.{self.owner}: ')

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Measure when the interval says so, and at the end unless that batch was measured already."""
        self._batch = int(state.timestamp.batch)
        super().run_event(event, state, logger)

    def act(self, state: State, logger: Logger) -> None:
        """Draw and measure; called on all ranks."""
        began = time.monotonic()
        self._measure(state, logger)
        self._spent[self._batch] = self._spent.get(self._batch, 0.0) + time.monotonic() - began

    def state_dict(self) -> dict[str, Any]:
        """The time that measuring took, as far as Composer's clock of the run has it."""
        return {'seconds': self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up that clock."""
        self._spent = {-1: state.get('seconds', 0.0)}  # checkpoints of 0.1.0 have none of digits_quality

    def summary(self, state: State) -> list[tuple[str, str]]:
        """The latest numbers, if there are some."""
        entries = self._latest(state)
        if not entries:
            return []
        figures = ', '.join(f'{entry["metric"]} {entry["value"]:.4g}' for entry in entries)
        return [('measured', f'{figures} at batch {entries[0]["batch"]}; protocol in {self._path(state)}')]

    def series(self, entry: Mapping[str, Any]) -> str:
        """The name of a number in the loggers."""
        return series_name(entry['metric'], entry['protocol'])

    def _latest(self, state: State) -> list[dict[str, Any]]:
        """The latest entry of each metric of this run against this reference."""
        path, name = self._path(state), Path(self.measurement.reference).name
        latest: dict[str, dict[str, Any]] = {}
        for entry in sorted(load_results(path) if path.exists() else [], key=lambda entry: entry['batch'] or 0):
            if entry['run'] == state.run_name and entry['protocol']['reference']['name'] == name:
                latest[entry['metric']] = entry
        return list(latest.values())

    def _seconds(self) -> float:
        # Composer counts a measurement into the batch that follows it.
        return sum(seconds for batch, seconds in self._spent.items() if batch < self._batch)

    def _path(self, state: State) -> Path:
        return self.folder_of(state) / 'results.json'

    def _batches(self) -> tuple[list[list[int]], int]:
        """Numbers of this rank's images, batch by batch, and how many of them count.

        All ranks draw equally many, as a sharded model wants it: what is beyond the last image is drawn and dropped.
        """
        rank, world, size = dist.get_global_rank(), dist.get_world_size(), self.measurement.batch_size
        share = -(-self.num_samples // world)
        indices = [min(rank + world * place, self.num_samples - 1) for place in range(share)]
        batches = [indices[start : start + size] for start in range(0, share, size)]
        return batches, len(range(rank, self.num_samples, world))

    def _measure(self, state: State, logger: Logger) -> None:
        measurer, rule = self._measurer, Draws.in_turn if self.labels == 'balanced' else Draws.at_random
        assert measurer is not None
        draws = rule(self.num_samples, bare_model(state).num_classes, self.seed)
        batches, share = self._batches()
        broken, parts, num_left = 0, [], share
        # To the end whatever comes: a sharded model needs all ranks to draw.
        for indices, labels, images_BCRR in self.images(state, draws, batches):
            images_BCRR, num_left = images_BCRR[:num_left], max(0, num_left - len(indices))
            finite = images_BCRR.isfinite().flatten(1).all(1)  # one for each image
            broken += int((~finite).sum())
            finite_labels = [label for label, is_finite in zip(labels, finite, strict=False) if is_finite]
            parts += looked([to_uint8(images_BCRR[finite])] if finite.any() else [], measurer.extractor, finite_labels)
        broken = sum(dist.all_gather_object(broken))
        if broken:
            log.warning('%d of %d images are not finite: nothing is measured', broken, self.num_samples)
            logger.log_metrics({'evaluation/images_not_finite': broken})
            return
        taken = dist.all_gather_object(self.taken()[:share])  # the last batch may be filled up
        # Refused on one rank, refused on all
        figures = agreed(lambda: measurer.figures(parts), f'callbacks.{self.owner}: ')
        if not measurer.ranks.is_first:
            return
        path, taken = self._path(state), list(itertools.chain(*taken))
        entries = measurer.entries(
            figures,
            self.facts(state, draws),
            self.num_samples,
            self._resolution,
            source=str(path.parent),
            run=state.run_name,
            batch=self._batch,
            seconds=state.timestamp.total_wct.total_seconds() - self._seconds(),
            **({'evaluations': sum(taken) / len(taken)} if taken else {}),
        )
        append_results(path, entries)
        logger.log_metrics({self.series(entry): entry['value'] for entry in entries})
        log_file(logger, path)
