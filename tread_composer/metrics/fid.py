"""Fréchet Inception Distance; torch-fidelity does the arithmetic, in float64.

There is no sFID: torch-fidelity has none, and without the published weights and sample files a port of ours could not
be held against ADM's numbers.
"""

import torch

from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.frechet import statistics
from tread_composer.metrics.metric import Comparison, Figure
from tread_composer.metrics.quantity import Quantity

__all__ = ['FID']

_FID = Quantity('fid', 'lower', 'squared distance of features', other='fd')


class FID:
    """Distance of the two Gaussians that are fitted to the features (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""

    name = 'fid'
    quantities = (_FID,)
    needs_logits = False
    compares_with = 'statistics'

    def check(self, num_samples: int, num_reference: int) -> None:
        """See ``Metric``; that a covariance needs two images is said by ``statistics``."""

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

        assert reference.statistics is not None
        sides = [{'mu': s.mean_D, 'sigma': s.covariance_DD} for s in (statistics(samples), reference.statistics)]
        return [Figure(_FID, fid_statistics_to_metric(*sides, verbose=False)[KEY_METRIC_FID])]
