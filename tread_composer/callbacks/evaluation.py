"""FID and its relatives while a run trains, on averaged weights and on all ranks, without a trace in the training."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.callbacks.sample_grid import keep_grid, shown_in_grid
from tread_composer.callbacks.sampling import Sampling, Weights, bare_model
from tread_composer.core.errors import UserError
from tread_composer.core.randomness import KeyedRandom
from tread_composer.metrics.features import FEATURES, Extractor, FeatureSet, joined, look, open_extractor
from tread_composer.metrics.fidelity import Figure, Statistics, check_metrics, measure
from tread_composer.metrics.protocol import Protocol, append_results, load_results, metric_name, result, series_name
from tread_composer.metrics.references import Reference, default_cache, open_reference

__all__ = ['Evaluation']

log = logging.getLogger(__name__)

Features = Literal['inception', 'digits']
Labels = Literal['balanced', 'random']
Result = TypeVar('Result')


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
        metrics: Of ``fid``, ``kid``, ``is``, ``prc`` (precision and recall).
        features: ``'inception'``; or ``'digits'``, whose metrics are called ``fd_digits``, ``kd_digits``, ...
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
        features: Features = 'inception',
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
        for name, value, allowed in (('features', features, FEATURES), ('labels', labels, get_args(Labels))):
            if value not in allowed:
                raise UserError(f'{name}: {value!r} is not known; choose one of {", ".join(allowed)}')
        if min(num_samples, batch_size, kid_subset_size) < 2 or seed < 0:
            raise UserError(
                f'num_samples={num_samples}, batch_size={batch_size}, kid_subset_size={kid_subset_size}, seed={seed}: '
                'the first three must be at least 2, and seed must not be negative'
            )
        # The reference is opened later; here it counts as large enough.
        logits = 0 if features == 'digits' else 1
        check_metrics(
            metrics,
            num_logits=logits,
            num_samples=num_samples,
            num_reference=num_samples,
            kid_subset_size=kid_subset_size,
        )
        self.reference, self.metrics, self.features = reference, tuple(metrics), features
        self.inception, self.inception_sha256 = inception, inception_sha256
        self.num_samples, self.labels, self.seed = num_samples, labels, seed
        self.batch_size, self.kid_subset_size, self.folder = batch_size, kid_subset_size, folder
        self.cache = Path(cache) if cache else default_cache()
        self.sampling = Sampling(sampler, num_steps, guidance_scale, weights)
        self._is_due = create_interval_scheduler(interval or '0ba', include_end_of_training=False)
        self._last_batch = self._batch = -1
        self._spent: dict[int, float] = {}  # batch -> seconds of the measurement after it
        self._tools: tuple[Extractor, Reference, FeatureSet | None, Statistics | None, Protocol] | None = None

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
        entries = [one for one in load_results(path) if one['run'] == state.run_name]
        last = max((one['batch'] for one in entries), default=None)
        found = [f'{one["metric"]} {one["value"]:.4g}' for one in entries if one['batch'] == last]
        return [('measured', f'{", ".join(found)} at batch {last}; protocol in {path}')] if found else []

    def _seconds(self) -> float:
        # Composer counts a measurement into the batch that follows it.
        return sum(seconds for batch, seconds in self._spent.items() if batch < self._batch)

    def _path(self, state: State) -> Path:
        return Path(self.folder.format(run_name=state.run_name)) / 'results.json'

    # --- what ---

    def _prepare(self, state: State) -> None:
        size = self.sampling.images(state, [0], [0], num_steps=1).shape[-1]
        device = torch.device('cuda') if state.device.name == 'gpu' else torch.device('cpu')

        def open_tools() -> tuple[Extractor, Reference]:
            path = self._path(state)
            if path.exists():
                load_results(path)
            extractor = open_extractor(
                self.features, inception=self.inception, inception_sha256=self.inception_sha256, device=device
            )
            reference = open_reference(self.reference)
            reference.check(extractor, size)
            check_metrics(
                self.metrics,
                num_logits=extractor.num_logits,
                num_samples=self.num_samples,
                num_reference=reference.count,
                kid_subset_size=self.kid_subset_size,
            )
            return extractor, reference

        extractor, reference = _agreed(open_tools)
        found = None
        if {'kid', 'prc'} & set(self.metrics) or ('fid' in self.metrics and reference.given is None):
            found = self._reference_features(reference, extractor)
        fitted = reference.statistics(found) if 'fid' in self.metrics and dist.get_global_rank() == 0 else None
        self._tools = extractor, reference, found, fitted, self._protocol(state, extractor, reference, size)

    def _reference_features(self, reference: Reference, extractor: Extractor) -> FeatureSet:
        world = dist.get_world_size()
        # All or none: a folder that not all ranks see would leave one of them waiting for the others.
        cached = all(dist.all_gather_object(reference.is_cached(extractor, self.cache)))
        if cached or world == 1:
            return _agreed(lambda: reference.features(extractor, self.cache, batch_size=self.batch_size))
        rank = dist.get_global_rank()
        share = _agreed(lambda: reference.share(extractor, self.batch_size, rank, world))
        found = _gathered(share)
        if rank == 0:
            reference.keep(found, extractor, self.cache)
        return found

    def _protocol(self, state: State, extractor: Extractor, reference: Reference, size: int) -> Protocol:
        return Protocol(
            **self.sampling.facts(state, labels=self.labels, seed=self.seed),
            num_samples=self.num_samples,
            reference=reference.described(),
            reference_hash=reference.hash,
            features=extractor.identity(),
            resolution=size,
        )

    # --- measuring ---

    def _measure(self, state: State, logger: Logger) -> None:
        assert self._tools is not None
        extractor, _, reference_features, reference_statistics, protocol = self._tools
        labels = class_labels(self.labels, self.num_samples, bare_model(state).num_classes, self.seed)
        pictured, rows = shown_in_grid(labels)
        broken, parts, kept, wanted = 0, [], {}, set(pictured)
        # To the end whatever comes: a sharded model needs all ranks to draw.
        for indices, images_BCRR in self._drawn(state, labels):
            kept |= {index: image for index, image in zip(indices, images_BCRR, strict=True) if index in wanted}
            finite = images_BCRR.isfinite().flatten(1).all(1)
            broken += int((~finite).sum())
            if finite.any():
                parts.append(look(to_uint8(images_BCRR[finite]).expand(-1, 3, -1, -1), extractor))
        found: dict[int, Tensor] = {}
        for share in dist.all_gather_object(kept):
            found |= share
        if dist.get_global_rank() == 0:
            self._picture(state, logger, torch.stack([found[index] for index in pictured]), rows)
        broken = sum(dist.all_gather_object(broken))
        if broken:
            log.warning('%d of %d images are not finite: nothing is measured', broken, self.num_samples)
            logger.log_metrics({'evaluation/images_not_finite': broken})
            return
        samples = _gathered(_agreed(lambda: joined(parts)))
        if dist.get_global_rank() != 0:
            return
        figures = measure(
            self.metrics,
            samples,
            reference_statistics,
            reference_features,
            kid_subset_size=self.kid_subset_size,
            device='cuda' if state.device.name == 'gpu' else 'cpu',
        )
        self._report(state, logger, figures, protocol)

    def _drawn(self, state: State, labels: Sequence[int]) -> Iterator[tuple[list[int], Tensor]]:
        """This rank's share of the images, batch by batch, with their numbers.

        All ranks draw equally many, as a sharded model wants it: those beyond the last one are drawn and dropped.
        """
        rank, world = dist.get_global_rank(), dist.get_world_size()
        share = -(-self.num_samples // world)
        indices = [min(rank + world * place, self.num_samples - 1) for place in range(share)]
        own = len(range(rank, self.num_samples, world))
        for first in range(0, share, self.batch_size):
            chunk = indices[first : first + self.batch_size]
            own_labels, seeds = [labels[index] for index in chunk], [self.seed + index for index in chunk]
            images_BCRR = self.sampling.images(state, own_labels, seeds)
            last = max(0, own - first)
            yield chunk[:last], images_BCRR[:last]

    def _picture(self, state: State, logger: Logger, images_NCRR: Tensor, rows: Sequence[int | None]) -> None:
        names = getattr(bare_model(state), 'class_names', ())
        told = ['' if label is None else names[label] if label < len(names) else str(label) for label in rows]
        keep_grid(
            images_NCRR, told, self.sampling, state, logger, self._path(state).parent / 'evaluation', 'evaluation'
        )

    def _report(self, state: State, logger: Logger, figures: Sequence[Figure], protocol: Protocol) -> None:
        seconds = state.timestamp.total_wct.total_seconds() - self._seconds()
        path, entries = self._path(state), []
        for figure in figures:
            name = metric_name(figure.metric, self.features, self.num_samples)
            own = dataclasses.replace(protocol, settings=figure.settings)
            where: dict[str, Any] = {'source': str(path.parent), 'run': state.run_name, 'batch': self._batch}
            entries.append(result(name, figure.value, own, spread=figure.spread, seconds=seconds, **where))
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


def _gathered(share: FeatureSet) -> FeatureSet:
    if dist.get_world_size() == 1:
        return joined([share])
    return joined(dist.all_gather_object(share))


def _agreed(step: Callable[[], Result]) -> Result:
    """Do a step that needs no other rank; if any rank is refused, all are, with the first one's message."""
    result, problem = None, None
    try:
        result = step()
    except UserError as error:
        problem = f'callbacks.evaluation: {error}'
    for rank, text in enumerate(dist.all_gather_object(problem)):
        if text is not None:
            raise UserError(text if rank == 0 else f'on rank {rank}: {text}')
    return result  # type: ignore[return-value]
