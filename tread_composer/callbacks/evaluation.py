"""FID and its relatives while a run trains, on averaged weights and on all ranks, without a trace in the training."""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.callbacks.sample_grid import keep_grid
from tread_composer.callbacks.sampling import Sampling, Weights, bare_model
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.io.picture_grid import shown_in_grid
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.measurement import Measurement, default_cache
from tread_composer.metrics.measurer import Measurer
from tread_composer.metrics.metric import Figure
from tread_composer.metrics.protocol import append_results, load_results, series_name

__all__ = ['Evaluation']

log = logging.getLogger(__name__)

Labels = Literal['balanced', 'random']


class Evaluation(Callback):
    """Draws images at an interval and measures them against a reference.

    Each rank draws and looks at its share; the features are gathered, not the images, and the first rank measures. The
    numbers go to the loggers (``metrics.protocol.series_name``) and, each with its protocol, into
    ``<folder>/results.json``; a grid of some of the images goes to the loggers and into ``<folder>/evaluation``.
    Below 50,000 images the name of a metric says how many there were (``fid_10000``). Weights, seed and settings decide
    the number; the numbers of ranks and of images in a call move it by rounding alone.

    Runs on ``Event.BATCH_CHECKPOINT`` or ``Event.EPOCH_CHECKPOINT`` (after the weights were averaged), and on
    ``Event.FIT_END``. Images that are not finite make a number impossible: that is logged, and training goes on.

    Args:
        reference: What to compare with: a folder of images, an npz of ADM's suite, or MDS images.
        interval: A Composer time string. (Default: only at the end.)
        metrics: Of ``metrics.METRICS``, or ``package.module:Class``; ``prc`` is precision and recall.
        features: Of ``metrics.FEATURES``, or ``package.module:Class``; with ``'digits'`` FID is called ``fd_digits``.
        inception: File of Inception's weights. (Default: ``metrics.inception.find_weights`` says where.)
        inception_sha256: Its hash, if it is not the published file.
        num_samples: Images.
        labels: ``'balanced'``, as many of each class; or ``'random'``, drawn by the seed.
        sampler: Name of a sampler.
        num_steps: Its steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        weights: ``'ema'`` for the averaged weights, ``'raw'`` for those in training.
        seed: Image i has the seed ``seed + i``, as with the command ``sample``.
        batch_size: Images drawn and looked at in one go on a rank.
        kid_subset_size: Images in each random subset of KID.
        folder: Where numbers and grids go. ``{run_name}`` is filled in. (Default: ``runs/{run_name}``.)
        cache: Where the reference's features are kept. (Default: ``~/.cache/tread_composer``.)

    Raises:
        UserError: A setting is impossible; or at ``Event.FIT_START`` the reference or the weights of Inception are
            missing or not what they must be, or do not go with the model.
    """

    default_folder: ClassVar[str] = '.'
    """In the folder of a run that is described by a YAML file."""

    def __init__(
        self,
        reference: str,
        interval: str | None = None,
        *,
        metrics: Sequence[str] = ('fid',),
        features: str = 'inception',
        inception: str | None = None,
        inception_sha256: str | None = None,
        num_samples: int = 10_000,
        labels: Labels = 'balanced',
        sampler: str = 'heun',
        num_steps: int = 50,
        guidance_scale: float = 1.0,
        weights: Weights = 'ema',
        seed: int = 0,
        batch_size: int = 64,
        kid_subset_size: int = 1000,
        folder: str = 'runs/{run_name}',
        cache: str | None = None,
    ) -> None:
        if labels not in get_args(Labels):
            raise UserError(f'labels: {labels!r} is not known; choose one of {", ".join(get_args(Labels))}')
        if min(num_samples, batch_size, kid_subset_size) < 2 or seed < 0:
            raise UserError(
                f'num_samples={num_samples}, batch_size={batch_size}, kid_subset_size={kid_subset_size}, seed={seed}: '
                'the first three must be at least 2, and seed must not be negative'
            )
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
        self.num_samples, self.labels, self.seed, self.folder = num_samples, labels, seed, folder
        self.sampling = Sampling(sampler, num_steps, guidance_scale, weights)
        self._is_due = create_interval_scheduler(interval or '0ba', include_end_of_training=False)
        self._last_batch = self._batch = -1
        self._spent: dict[int, float] = {}  # batch -> seconds of the measurement after it
        self._measurer: Measurer | None = None
        self._resolution = 0  # side of an image in pixels, once one was drawn

    # --- when ---

    def fit_start(self, state: State, logger: Logger) -> None:
        """Refuse at once what would fail at the first measurement, and look at the reference."""
        del logger
        self.sampling.check(state, 'evaluation')
        classes = bare_model(state).num_classes
        if self.labels == 'balanced' and classes and self.num_samples % classes:
            raise UserError(
                f'callbacks.evaluation.num_samples: {self.num_samples} is no multiple of the {classes} classes, which '
                f'labels: balanced needs; take {max(1, round(self.num_samples / classes)) * classes}, or labels: random'
            )
        self._prepare(state)

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Measure when the interval says so, and at the end unless that batch was measured already."""
        super().run_event(event, state, logger)
        self._batch = int(state.timestamp.batch)
        at_end = event == Event.FIT_END and self._last_batch != self._batch
        if at_end or (event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event)):
            began, self._last_batch = time.monotonic(), self._batch
            self._measure(state, logger)
            self._spent[self._batch] = self._spent.get(self._batch, 0.0) + time.monotonic() - began

    def state_dict(self) -> dict[str, Any]:
        """The time that measuring took, as far as Composer's clock of the run has it."""
        return {'seconds': self._seconds()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up that clock."""
        self._spent = {-1: state['seconds']}

    def summary(self, state: State) -> list[tuple[str, str]]:
        """The latest numbers, if there are some."""
        path = self._path(state)
        if not path.exists():
            return []
        entries = [entry for entry in load_results(path) if entry['run'] == state.run_name]
        latest = max((entry['batch'] for entry in entries), default=None)
        figures = [f'{entry["metric"]} {entry["value"]:.4g}' for entry in entries if entry['batch'] == latest]
        return [('measured', f'{", ".join(figures)} at batch {latest}; protocol in {path}')] if figures else []

    def _seconds(self) -> float:
        # Composer counts a measurement into the batch that follows it.
        return sum(seconds for batch, seconds in self._spent.items() if batch < self._batch)

    def _path(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name)) / 'results.json'

    # --- what ---

    def _prepare(self, state: State) -> None:
        self._resolution = self.sampling.images(state, [0], [0], num_steps=1).shape[-1]
        device = torch.device('cuda' if state.device.name == 'gpu' else 'cpu')
        ranks = Ranks(dist.get_global_rank(), dist.get_world_size(), dist.get_local_rank(), dist.get_local_world_size())

        def opened() -> Measurer:
            if self._path(state).exists():
                load_results(self._path(state))
            measurer = Measurer(self.measurement, device, ranks)
            measurer.check(self.num_samples, self._resolution)
            return measurer

        with _as_the_callbacks():
            self._measurer = ranks.agreed(opened)
            self._measurer.prepare()

    # --- measuring ---

    def _measure(self, state: State, logger: Logger) -> None:
        measurer = self._measurer
        assert measurer is not None
        labels = class_labels(self.labels, self.num_samples, bare_model(state).num_classes, self.seed)
        pictured, rows = shown_in_grid(labels)
        broken, parts, kept, in_grid = 0, [], {}, set(pictured)
        # To the end whatever comes: a sharded model needs all ranks to draw.
        for indices, images_BCRR in self._drawn(state, labels):
            kept |= {index: image for index, image in zip(indices, images_BCRR, strict=True) if index in in_grid}
            finite = images_BCRR.isfinite().flatten(1).all(1)
            broken += int((~finite).sum())
            if finite.any():
                parts += measurer.look([to_uint8(images_BCRR[finite])])
        grid_images: dict[int, Tensor] = {}
        for share in dist.all_gather_object(kept):
            grid_images |= share
        if dist.get_global_rank() == 0:
            self._picture(state, logger, torch.stack([grid_images[index] for index in pictured]), rows)
        broken = sum(dist.all_gather_object(broken))
        if broken:
            log.warning('%d of %d images are not finite: nothing is measured', broken, self.num_samples)
            logger.log_metrics({'evaluation/images_not_finite': broken})
            return
        with _as_the_callbacks():
            figures = measurer.figures(parts)
        if measurer.ranks.is_first:
            self._report(state, logger, measurer, figures)

    def _drawn(self, state: State, labels: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's share of the images, batch by batch, with their numbers.

        All ranks draw equally many, as a sharded model wants it: those beyond the last one are drawn and dropped.
        """
        rank, world = dist.get_global_rank(), dist.get_world_size()
        share = -(-self.num_samples // world)
        indices = [min(rank + world * place, self.num_samples - 1) for place in range(share)]
        num_own = len(range(rank, self.num_samples, world))
        size = self.measurement.batch_size
        for start in range(0, share, size):
            chunk = indices[start : start + size]
            own_labels, seeds = [labels[index] for index in chunk], [self.seed + index for index in chunk]
            images_BCRR = self.sampling.images(state, own_labels, seeds)
            num_kept = max(0, num_own - start)
            yield chunk[:num_kept], images_BCRR[:num_kept]

    def _picture(self, state: State, logger: Logger, images_NCRR: Tensor, rows: Sequence[int | None]) -> None:
        names = getattr(bare_model(state), 'class_names', ())
        row_names = ['' if label is None else names[label] if label < len(names) else str(label) for label in rows]
        keep_grid(
            images_NCRR, row_names, self.sampling, state, logger, self._path(state).parent / 'evaluation', 'evaluation'
        )

    def _report(self, state: State, logger: Logger, measurer: Measurer, figures: Sequence[Figure]) -> None:
        path = self._path(state)
        entries = measurer.entries(
            figures,
            self.sampling.facts(state, labels=self.labels, seed=self.seed),
            num_samples=self.num_samples,
            resolution=self._resolution,
            source=str(path.parent),
            run=state.run_name,
            batch=self._batch,
            seconds=state.timestamp.total_wct.total_seconds() - self._seconds(),
        )
        append_results(path, entries)
        logger.log_metrics({series_name(entry['metric'], entry['protocol']): entry['value'] for entry in entries})
        for destination in logger.destinations:
            if hasattr(destination, 'log_file'):
                destination.log_file(path)  # type: ignore[attr-defined]


def class_labels(rule: str, count: int, num_classes: int, seed: int) -> list[int]:
    """The classes of the images to draw: each in turn, or at random."""
    if not num_classes:
        return [0] * count  # the null label of a model without classes
    if rule == 'balanced':
        return [index % num_classes for index in range(count)]
    shares = KeyedRandom(seed, 0, range(count)).uniform('label').double()
    return (shares * num_classes).long().tolist()


@contextlib.contextmanager
def _as_the_callbacks() -> Iterator[None]:
    """Say of a refusal whose setting it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f'callbacks.evaluation: {error}') from error
