"""Kernel Inception Distance; torch-fidelity does the arithmetic, in float64."""

import torch

from tread_composer.metrics.features import HASH_ORDER, FeatureSet
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity, refuse_few

__all__ = ['KID']

_KID = Quantity('kid', 'lower', 'squared MMD', other='kd')
_SUBSETS, _SEED = 100, 2020  # torch-fidelity's defaults


class KID(Metric):
    """Squared MMD with a cubic kernel, unbiased, mean over random subsets (Binkowski et al. 2018, arXiv 1801.01401).

    Other subsets move it by some per cent. They are drawn by a fixed seed from images in the order of their hashes.

    Args:
        kid_subset_size: Images in each random subset.
    """

    name = 'kid'
    quantities = (_KID,)
    compares_with = 'images'

    def __init__(self, kid_subset_size: int = 1000) -> None:
        self.kid_subset_size = kid_subset_size

    def check(self, num_samples: int, num_reference: int) -> None:
        """See ``Metric``."""
        remedy = '; give a smaller kid_subset_size, which is recorded with the number'
        refuse_few(self.name, self.kid_subset_size, num_samples, num_reference, remedy)

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

        assert reference.features is not None
        settings = {'kid_subset_size': self.kid_subset_size, 'kid_subsets': _SUBSETS}
        # The cubic kernel of 2,048 features needs float64
        sides = [side.features_ND.double() for side in (samples, reference.features)]
        numbers = kid_features_to_metric(*sides, verbose=False, rng_seed=_SEED, **settings)
        drawn = {'subsets_seed': _SEED, 'images': HASH_ORDER}
        return [Figure(_KID, numbers[KEY_METRIC_KID_MEAN], numbers[KEY_METRIC_KID_STD], {**settings, **drawn})]
