"""The Fréchet distance between two sets of features; torch-fidelity does the arithmetic.

Which features make it an FID (Inception), and how many samples, is the caller's protocol. The distance falls with
the number of samples even between sets of one distribution: never compare two of different counts.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.metrics.features import FeatureSet

__all__ = ['Statistics', 'frechet_distance', 'statistics']


@dataclass(frozen=True)
class Statistics:
    """The Gaussian that FID fits.

    Args:
        mean_D: float64.
        covariance_DD: float64.
    """

    mean_D: np.ndarray
    covariance_DD: np.ndarray


def statistics(features: FeatureSet) -> Statistics:
    """Mean and covariance of the features.

    Raises:
        UserError: There are fewer than two.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    if len(features) < 2:
        raise UserError(f'{len(features)} image has no covariance: an FID needs at least 2, a published one 50,000')
    moments = fid_features_to_statistics(features.features_ND.double())
    return Statistics(moments['mu'], moments['sigma'])


def frechet_distance(features_a: Tensor | np.ndarray, features_b: Tensor | np.ndarray) -> float:
    """Distance between the Gaussians fitted to two sets of features (Heusel et al. 2017, eq. 6).

    Args:
        features_a: ``[N, D]``, any floating type; computed in float64.
        features_b: ``[M, D]``.

    Raises:
        ValueError: the sets have other shapes, fewer than two rows, or a value that is not finite.
    """
    # Imported here: torch-fidelity brings torchvision with it.
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

    a_ND, b_MD = (torch.as_tensor(features).detach().cpu().double() for features in (features_a, features_b))
    for name, features in (('features_a', a_ND), ('features_b', b_MD)):
        if features.ndim != 2 or len(features) < 2 or features.shape[1] < 2:
            raise ValueError(f'{name} must be [samples, dimensions], at least 2 x 2, got {tuple(features.shape)}')
        if not features.isfinite().all():
            raise ValueError(f'{name} holds values that are not finite: the samples cannot be measured')
    if a_ND.shape[1] != b_MD.shape[1]:
        raise ValueError(f'the two sets have {a_ND.shape[1]} and {b_MD.shape[1]} dimensions; they must be equal')
    statistics = [fid_features_to_statistics(features) for features in (a_ND, b_MD)]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
