"""The published metrics. torch-fidelity does the arithmetic, in float64, and is imported late: it brings torchvision.

Which features make a distance an FID (Inception), and how many samples, is the caller's protocol. A distance falls with
the number of samples even between sets of one distribution: never compare two of different counts.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.metrics.features import HASH_ORDER, FeatureSet
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity

__all__ = ['FID', 'KID', 'SFID', 'InceptionScore', 'PrecisionRecall', 'frechet_distance', 'statistics']

_FID = Quantity('fid', 'lower', 'squared distance of features', other='fd')
_SFID = Quantity('sfid', 'lower', 'squared distance of spatial features', other='sfd')
_KID = Quantity('kid', 'lower', 'squared MMD', other='kd')
_SCORE = Quantity('inception_score', 'higher', 'classes', other='score')
_PRECISION = Quantity('precision', 'higher', 'share of the samples')
_RECALL = Quantity('recall', 'higher', 'share of the reference')

# Until somebody has the weights and held ADM's file against itself: `evaluate FILE --reference FILE --metrics sfid`.
_PORT = {'port': "not yet held against ADM's numbers"}
# torch-fidelity's defaults; the score is published with its ten parts.
_SUBSETS, _SPLITS, _SEED = 100, 10, 2020
_NEIGHBOURS = 3
_ROWS = 2000  # features whose distances to all others are in memory at once: 0.8 GB to 50,000


def statistics(features_ND: Tensor) -> Mapping[str, np.ndarray]:
    """The Gaussian that is fitted to N images: ``mu`` ``[D]`` and ``sigma`` ``[D, D]``, in float64.

    Raises:
        UserError: There are fewer than two images.
    """
    from torch_fidelity.metric_fid import fid_features_to_statistics

    count = len(features_ND)
    if count < 2:
        raise UserError(f'{count} image has no covariance: an FID needs at least 2, a published one 50,000')
    return fid_features_to_statistics(features_ND.double())  # features of float16 too


def frechet_distance(samples: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """Squared distance of two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    Raises:
        UserError: They are of different numbers of features: those of a file may be of any network.
    """
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    widths = [len(side['mu']) for side in (reference, samples)]
    if widths[0] != widths[1]:
        raise UserError('the reference has {} features and the samples have {}: of another network'.format(*widths))
    return fid_statistics_to_metric(samples, reference, verbose=False)[KEY_METRIC_FID]


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


class KID(Metric):
    """Squared MMD with a cubic kernel, unbiased, mean over random subsets (Binkowski et al. 2018, arXiv 1801.01401).

    Other subsets move it by some per cent. They are drawn by a fixed seed from images in the order of their hashes.

    Args:
        kid_subset_size: Images in each random subset.
    """

    name = 'kid'
    quantities = (_KID,)
    compares_with = 'images'
    remedy = '; give a smaller kid_subset_size, which is recorded with the number'

    def __init__(self, kid_subset_size: int = 1000) -> None:
        self.kid_subset_size = self.least = kid_subset_size

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


class InceptionScore(Metric):
    """How certain and how different the images' classes are (Salimans et al. 2016, arXiv 1606.03498, section 4)."""

    name = 'is'
    quantities = (_SCORE,)
    needs_logits = True
    compares_with = 'nothing'
    least = _SPLITS
    remedy = f'; it is the mean over {_SPLITS} parts'

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

        assert samples.logits_NK is not None
        # Mean and standard deviation over the parts
        numbers = isc_features_to_metric(samples.logits_NK, splits=_SPLITS, rng_seed=_SEED)
        # Which images are together in a part moves the score.
        settings = {'splits': _SPLITS, 'splits_seed': _SEED, 'images': HASH_ORDER}
        return [Figure(_SCORE, numbers[KEY_METRIC_ISC_MEAN], numbers[KEY_METRIC_ISC_STD], settings)]


class PrecisionRecall(Metric):
    """Shares within the other set's manifold, of balls to the third nearest neighbour (Kynkäänniemi et al. 2019)."""

    name = 'prc'
    quantities = (_PRECISION, _RECALL)
    compares_with = 'images'
    least = _NEIGHBOURS + 1

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

        assert reference.features is not None
        numbers = prc_features_to_metric(
            # float64: the distance of near points is the difference of large squares.
            *(side.features_ND.double().to(device) for side in (samples, reference.features)),
            prc_neighborhood=_NEIGHBOURS,
            prc_batch_size=_ROWS,
            save_cpu_ram=True,
            verbose=False,
        )
        settings = {'neighbours': _NEIGHBOURS}
        keys = {_PRECISION: KEY_METRIC_PRECISION, _RECALL: KEY_METRIC_RECALL}
        return [Figure(quantity, numbers[key], None, settings) for quantity, key in keys.items()]
