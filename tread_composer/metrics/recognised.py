"""How many of the generated digits a classifier of real digits takes for what was asked for."""

import torch

from tread_composer.core.errors import UserError
from tread_composer.metrics.digits import digits_judge
from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.metric import Comparison, Figure
from tread_composer.metrics.quantity import Quantity

__all__ = ['Recognised']

_RECOGNISED = Quantity('recognised', 'higher', 'share of the samples')


class Recognised:
    """Share of the images that the classifier behind the features ``digits`` assigns to their own label."""

    name = 'recognised'
    quantities = (_RECOGNISED,)
    needs_logits = False
    needs_labels = True
    reads_features = 'digits'
    compares_with = 'nothing'

    def check(self, num_samples: int, num_reference: int) -> None:
        """See ``Metric``; any number of images will do."""

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``; a ``UserError`` where nobody knows which digits the images are to be."""
        if samples.labels_N is None:
            raise UserError('metrics: recognised needs the label of each image, and not all of them have one')
        # Features are the layer before the classes
        return [Figure(_RECOGNISED, digits_judge().recognised(samples.features_ND, samples.labels_N))]
