"""What a metric says of itself, and what the rest of the project asks it: nobody else keeps a list of metrics."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch

from tread_composer.core.errors import UserError
from tread_composer.core.named import is_reference, part_named
from tread_composer.metrics import METRICS
from tread_composer.metrics.features import FeatureSet

__all__ = [
    'Better', 'Comparison', 'Figure', 'Metric', 'Quantity', 'build_metrics', 'check_metrics', 'measure',
]  # fmt: skip

Better = Literal['lower', 'higher']

_FULL_COUNT = 50_000  # samples of a published FID; below, the metric's name says how many there were


@dataclass(frozen=True)
class Quantity:
    """What a number is a number of."""

    name: str  # as it is published, with Inception's features
    better: Better
    unit: str
    # Its name with other features, whose own name follows: only Inception's make an FID, a KID or an Inception Score.
    other: str = ''

    def reported(self, features: str, num_samples: int) -> str:
        """The name of a number: ``'fid'``, ``'fid_10000'`` below 50,000 samples, ``'fd_digits_500'``."""
        name = self.name if features == 'inception' else f'{self.other or self.name}_{features}'
        return name if num_samples >= _FULL_COUNT else f'{name}_{num_samples}'


@dataclass(frozen=True)
class Figure:
    """A measured number of a quantity."""

    quantity: Quantity
    value: float
    spread: float | None = None  # standard deviation over the parts of which it is the mean, where it is one
    settings: Mapping[str, Any] = field(default_factory=dict)  # what it depends on besides the images


@dataclass(frozen=True)
class Comparison:
    """Mean ``mu`` and covariance ``sigma`` of the reference, features of its images: what of it the metrics need."""

    statistics: Mapping[str, np.ndarray] | None = None
    features: FeatureSet | None = None
    spatial: Mapping[str, np.ndarray] | None = None  # of the spatial features


class Metric(Protocol):
    """One way to measure samples. Its constructor takes those settings of a measurement that it depends on.

    It may say ``needs_labels = True`` if it needs to know what each image was to show, ``needs_spatial = True`` if it
    reads the spatial features, and with ``reads_features`` name the only features that it can read; ``least`` and
    ``remedy`` are asked of those that have them. Ours inherit what stands here.
    """

    name: str
    """For messages."""

    quantities: Sequence[Quantity]
    """The numbers that it gives."""

    needs_logits: bool = False
    """Whether it needs the classes of the feature network."""

    compares_with: Literal['nothing', 'statistics', 'images']
    """What it needs of the reference."""

    least: int = 1
    """Images without which it gives no number, on each side where it compares images with images."""

    remedy: str = ''
    """Ends the message where there are fewer."""

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """A number for each quantity. The global random streams stay as they are."""
        ...


def build_metrics(names: Sequence[str], settings: Mapping[str, Any]) -> list[Metric]:
    """The metrics of these names; each takes the settings, such as ``kid_subset_size``, that its constructor names.

    Raises:
        UserError: A name is neither in ``METRICS`` nor ``package.module:Class``, or there is no name.
    """
    misnamed = [name for name in names if name not in METRICS and not is_reference(name)]
    if misnamed or not names:
        raise UserError(f'metrics: {misnamed or "none"} given; choose of {", ".join(METRICS)}')
    metrics = []
    for name in dict.fromkeys(names):
        try:
            target = part_named(name, METRICS)
            accepted = inspect.signature(target).parameters  # a metric names what it depends on
            metrics.append(target(**{key: value for key, value in settings.items() if key in accepted}))
        except (ValueError, TypeError) as error:
            raise UserError(f'metrics: {name}: cannot be used: {error}') from error
    return metrics


def check_metrics(
    metrics: Sequence[Metric],
    extractor: Any,
    num_samples: int,
    num_reference: int,
    has_labels: bool = True,
) -> None:
    """Refuse what cannot be measured, before any image is looked at.

    Of the feature network (``Extractor``) its class is enough; ``num_reference`` is 0 where the reference holds
    statistics alone; ``has_labels`` says whether it is known what each image was to show.

    Raises:
        UserError: The network, the counts or the reference do not allow it.
    """
    for metric in metrics:
        network, features = getattr(metric, 'reads_features', extractor.name), extractor.name
        if network != features:
            raise UserError(f'metrics: {metric.name} is of the features {network!r}, not {features!r}; leave it out')
        if metric.needs_logits and not extractor.num_logits:
            raise UserError(
                f'metrics: {metric.name} needs the classes of Inception, and these features have none; leave it out'
            )
        if getattr(metric, 'needs_labels', False) and not has_labels:
            raise UserError(
                f'metrics: {metric.name} needs the label of each image, and these images have none; measure a model '
                'with classes, or what `sample` has drawn of one, or leave it out'
            )
        if metric.compares_with == 'images' and not num_reference:
            raise UserError(f'metrics: {metric.name} compares with images, and the reference has statistics alone')
        each, counts = '', {'samples': num_samples}
        if metric.compares_with == 'images':
            each, counts = ' on each side', {**counts, 'reference images': num_reference}
        least, remedy = getattr(metric, 'least', 0), getattr(metric, 'remedy', '')
        if min(counts.values()) < least:
            sizes = ' and '.join(f'{count} {name}' for name, count in counts.items())
            raise UserError(f'metrics: {metric.name} needs {least} images{each}, and there are {sizes}{remedy}')


def measure(
    metrics: Sequence[Metric],
    samples: FeatureSet,
    reference: Comparison = Comparison(),
    device: str | torch.device = 'cpu',
) -> list[Figure]:
    """The numbers of all metrics, which ``check_metrics`` has seen; ``device`` is where large sums are computed.

    The global random streams stay as they are.

    Raises:
        UserError: The statistics of the reference are of another network.
    """
    return [figure for metric in metrics for figure in metric.measure(samples, reference, torch.device(device))]
