"""The Gaussian that is fitted to features, and the distance of two of them; torch-fidelity does the arithmetic.

Which features make it an FID (Inception), and how many samples, is the caller's protocol. The distance falls with
the number of samples even between sets of one distribution: never compare two of different counts.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from tread_composer.core.errors import UserError

__all__ = ['Statistics', 'frechet_distance', 'statistics']


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray


def statistics(features_ND: Tensor) -> Statistics:
    """Mean and covariance over N images, computed in float64.

    Raises:
        UserError: There are fewer than two images.
    """
    # Imported here: torch-fidelity brings torchvision with it.
    from torch_fidelity.metric_fid import fid_features_to_statistics

    count = len(features_ND)
    if count < 2:
        raise UserError(f'{count} image has no covariance: an FID needs at least 2, a published one 50,000')
    moments = fid_features_to_statistics(features_ND.double())  # features of float16 too
    return Statistics(moments['mu'], moments['sigma'])


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Squared distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    sides = [{'mu': side.mean_D, 'sigma': side.covariance_DD} for side in (a, b)]
    return fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID]
