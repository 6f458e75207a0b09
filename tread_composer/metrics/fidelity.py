"""FID, KID, Inception Score, precision and recall of features; torch-fidelity does the arithmetic, in float64.

There is no sFID: torch-fidelity has none, and without the published weights and sample files a port of ours could not
be held against ADM's numbers.
Legend: N samples, M reference images, D features, K logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tread_composer.core.errors import UserError
from tread_composer.metrics.features import FeatureSet

__all__ = ['METRICS', 'Figure', 'Statistics', 'check_metrics', 'measure', 'statistics']

METRICS = ('fid', 'kid', 'is', 'prc')
"""``prc`` gives two numbers, precision and recall."""

_NEIGHBOURS = 3
_SPLITS = 10  # of the Inception Score, as published
_SUBSETS = 100  # of KID, torch-fidelity's default
_ROWS = 2000  # features whose distances to all others are in memory at once: 0.8 GB to 50,000


@dataclass(frozen=True)
class Statistics:
    """The Gaussian that FID fits.

    Args:
        mean_D: float64.
        covariance_DD: float64.
    """

    mean_D: np.ndarray
    covariance_DD: np.ndarray


@dataclass(frozen=True)
class Figure:
    """A number.

    Args:
        metric: ``'fid'``, ``'kid'``, ``'is'``, ``'precision'`` or ``'recall'``.
        value: Of it.
        spread: Standard deviation over the parts of which it is the mean, where it is one.
        settings: What it depends on besides the images, for the protocol.
    """

    metric: str
    value: float
    spread: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def statistics(features: FeatureSet) -> Statistics:
    """Mean and covariance of the features.

    Raises:
        UserError: There are fewer than two.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise UserError(f'{len(features)} image has no covariance: an FID needs at least 2, a published one 50,000')
    found = fid_features_to_statistics(features.features_ND.double())
    return Statistics(found['mu'], found['sigma'])


def check_metrics(
    metrics: Sequence[str],
    *,
    num_logits: int,
    num_samples: int,
    num_reference: int,
    kid_subset_size: int,
) -> None:
    """Refuse what cannot be measured, before any image is looked at.

    Args:
        metrics: Of ``METRICS``.
        num_logits: Of the feature network.
        num_samples: Images to be measured.
        num_reference: Images of the reference; 0 if it holds statistics alone.
        kid_subset_size: Images in each random subset of KID.

    Raises:
        UserError: A metric is unknown, or the network, the counts or the reference do not allow it.
    """
    unknown = [metric for metric in metrics if metric not in METRICS]
    if unknown or not metrics:
        raise UserError(f'metrics: {unknown or "none"} given; choose of {", ".join(METRICS)}')
    if 'is' in metrics and not num_logits:
        raise UserError('metrics: is needs the classes of Inception, and these features have none; leave it out')
    if 'is' in metrics and num_samples < _SPLITS:
        raise UserError(f'metrics: is takes the mean over {_SPLITS} parts, and there are {num_samples} images')
    needs = {'kid': kid_subset_size, 'prc': _NEIGHBOURS + 1}
    for metric, least in needs.items():
        if metric not in metrics:
            continue
        if not num_reference:
            raise UserError(f'metrics: {metric} compares with images, and the reference has statistics alone')
        fewest = min(num_samples, num_reference)
        if fewest < least:
            remedy = '; give a smaller kid_subset_size, which is recorded with the number' if metric == 'kid' else ''
            raise UserError(
                f'metrics: {metric} needs {least} images on each side, and there are {num_samples} samples and '
                f'{num_reference} reference images{remedy}'
            )


def measure(
    metrics: Sequence[str],
    samples: FeatureSet,
    reference_statistics: Statistics | None,
    reference_features: FeatureSet | None,
    *,
    kid_subset_size: int = 1000,
    device: str | torch.device = 'cpu',
) -> list[Figure]:
    """The numbers asked for. The global random streams stay as they are.

    Args:
        metrics: Of ``METRICS``; ``check_metrics`` has seen them.
        samples: Features of the samples.
        reference_statistics: Needed for ``fid``.
        reference_features: Needed for ``kid`` and ``prc``.
        kid_subset_size: Images in each random subset of KID.
        device: Where the distances of precision and recall are computed.

    Raises:
        UserError: The two sides have features of other lengths.
    """
    width = samples.features_ND.shape[1]
    for other in (
        None if reference_statistics is None else len(reference_statistics.mean_D),
        None if reference_features is None else reference_features.features_ND.shape[1],
    ):
        if other not in (None, width):
            raise UserError(f'the reference has {other} features and the samples have {width}: of another network')
    figures = []
    for metric in dict.fromkeys(metrics):
        if metric == 'fid':
            assert reference_statistics is not None
            figures.append(_fid(statistics(samples), reference_statistics))
        elif metric == 'is':
            figures.append(_inception_score(samples))
        else:
            assert reference_features is not None
            if metric == 'kid':
                figures.append(_kid(samples, reference_features, kid_subset_size))
            else:
                figures += _precision_recall(samples, reference_features, device)
    return figures


def _fid(samples: Statistics, reference: Statistics) -> Figure:
    """Heusel et al. 2017, eq. 6."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    sides = [{'mu': side.mean_D, 'sigma': side.covariance_DD} for side in (samples, reference)]
    return Figure('fid', fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])


def _kid(samples: FeatureSet, reference: FeatureSet, subset_size: int) -> Figure:
    """Binkowski et al. 2018: squared MMD with a cubic kernel, unbiased, mean over random subsets."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    settings = {'kid_subset_size': subset_size, 'kid_subsets': _SUBSETS}
    sides = [side.features_ND.double() for side in (samples, reference)]
    found = kid_features_to_metric(*sides, verbose=False, **settings)
    return Figure('kid', found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD], settings)


def _inception_score(samples: FeatureSet) -> Figure:
    """Salimans et al. 2016."""
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    assert samples.logits_NK is not None
    found = isc_features_to_metric(samples.logits_NK, splits=_SPLITS)
    return Figure('is', found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD], {'splits': _SPLITS})


def _precision_recall(samples: FeatureSet, reference: FeatureSet, device: str | torch.device) -> list[Figure]:
    """Kynkaanniemi et al. 2019: shares within the other set's manifold, balls to the third nearest neighbour."""
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    settings = {'neighbours': _NEIGHBOURS}
    found = prc_features_to_metric(
        # float64: the distance of near points is the difference of large squares.
        *(side.features_ND.double().to(device) for side in (samples, reference)),
        prc_neighborhood=_NEIGHBOURS,
        prc_batch_size=_ROWS,
        save_cpu_ram=True,
        verbose=False,
    )
    keys = {'precision': KEY_METRIC_PRECISION, 'recall': KEY_METRIC_RECALL}
    return [Figure(name, found[key], None, settings) for name, key in keys.items()]
