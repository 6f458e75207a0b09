"""Inception Score; torch-fidelity does the arithmetic, in float64."""

import torch

from tread_composer.core.errors import UserError
from tread_composer.metrics.features import HASH_ORDER, FeatureSet
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity

__all__ = ['InceptionScore']

_SCORE = Quantity('inception_score', 'higher', 'classes', other='score')
_SPLITS, _SEED = 10, 2020  # as published; torch-fidelity's default


class InceptionScore(Metric):
    """How certain and how different the images' classes are (Salimans et al. 2016, arXiv 1606.03498, section 4)."""

    name = 'is'
    quantities = (_SCORE,)
    needs_logits = True
    compares_with = 'nothing'

    def check(self, num_samples: int, num_reference: int) -> None:
        """See ``Metric``."""
        if num_samples < _SPLITS:
            raise UserError(f'metrics: is takes the mean over {_SPLITS} parts, and there are {num_samples} images')

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

        assert samples.logits_NK is not None
        # Mean and standard deviation over the parts
        numbers = isc_features_to_metric(samples.logits_NK, splits=_SPLITS, rng_seed=_SEED)
        # Which images are together in a part moves the score.
        settings = {'splits': _SPLITS, 'splits_seed': _SEED, 'images': HASH_ORDER}
        return [Figure(_SCORE, numbers[KEY_METRIC_ISC_MEAN], numbers[KEY_METRIC_ISC_STD], settings)]
