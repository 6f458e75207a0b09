"""Fréchet Inception Distance, of pooled features and of spatial ones (sFID)."""

import torch

from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.frechet import frechet_distance, statistics
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity

__all__ = ['FID', 'SFID']

_FID = Quantity('fid', 'lower', 'squared distance of features', other='fd')
_SFID = Quantity('sfid', 'lower', 'squared distance of spatial features', other='sfd')
# Until somebody has the weights and held ADM's file against itself: `evaluate FILE --reference FILE --metrics sfid`.
_PORT = {'port': "not yet held against ADM's numbers"}


class FID(Metric):
    """Distance of the two Gaussians that are fitted to the features (Heusel et al. 2017, arXiv 1706.08500, eq. 6)."""

    name = 'fid'
    quantities = (_FID,)
    compares_with = 'statistics'  # which say themselves that a covariance needs two images

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        assert reference.statistics is not None
        return [Figure(_FID, frechet_distance(statistics(samples.features_ND), reference.statistics))]


class SFID(FID):
    """FID of features that keep their place in the image (Nash et al. 2021, arXiv 2103.03841, section 5.1), as in ADM.

    Of Inception's ``mixed_6/conv``, behind its ReLU, the first 7 of 192 channels at 17 x 17 places: 2,023 features.
    """

    name = 'sfid'
    quantities = (_SFID,)
    needs_spatial = True
    reads_features = 'inception'

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        assert reference.spatial is not None and samples.spatial_NS is not None
        return [Figure(_SFID, frechet_distance(statistics(samples.spatial_NS), reference.spatial), None, _PORT)]
