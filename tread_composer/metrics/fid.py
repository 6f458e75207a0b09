"""Fréchet Inception Distance.

There is no sFID: torch-fidelity has none, and without the published weights and sample files a port of ours could not
be held against ADM's numbers.
"""

import torch

from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.frechet import frechet_distance, statistics
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
        assert reference.statistics is not None
        return [Figure(_FID, frechet_distance(statistics(samples.features_ND), reference.statistics))]
