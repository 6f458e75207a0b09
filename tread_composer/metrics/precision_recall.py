"""Precision and recall of features; torch-fidelity does the arithmetic, in float64."""

import torch

from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.metric import Comparison, Figure, Metric, Quantity, refuse_few

__all__ = ['PrecisionRecall']

_PRECISION = Quantity('precision', 'higher', 'share of the samples')
_RECALL = Quantity('recall', 'higher', 'share of the reference')
_NEIGHBOURS = 3
_ROWS = 2000  # features whose distances to all others are in memory at once: 0.8 GB to 50,000


class PrecisionRecall(Metric):
    """Shares within the other set's manifold, of balls to the third nearest neighbour (Kynkäänniemi et al. 2019)."""

    name = 'prc'
    quantities = (_PRECISION, _RECALL)
    compares_with = 'images'

    def check(self, num_samples: int, num_reference: int) -> None:
        """See ``Metric``."""
        refuse_few(self.name, _NEIGHBOURS + 1, num_samples, num_reference)

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
