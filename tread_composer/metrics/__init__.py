"""How good the samples are.

A new metric is a class here and a line in ``METRICS`` (``metrics.metric.Metric``); a new feature network is a file here
and a line in ``FEATURES`` (``metrics.features.Extractor``).
"""

from collections.abc import Mapping

__all__ = ['FEATURES', 'METRICS']

METRICS: Mapping[str, str] = {
    'fid': 'tread_composer.metrics.published:FID',
    'sfid': 'tread_composer.metrics.published:SFID',
    'kid': 'tread_composer.metrics.published:KID',
    'is': 'tread_composer.metrics.published:InceptionScore',
    'prc': 'tread_composer.metrics.published:PrecisionRecall',
    'recognised': 'tread_composer.metrics.digits:Recognised',
}
"""By the name that configurations and commands use, which take ``package.module:Class`` of another package too.

Imported when they are used: the commands list the names before they load torch.
"""

FEATURES: Mapping[str, str] = {
    'inception': 'tread_composer.metrics.inception:InceptionFeatures',
    'digits': 'tread_composer.metrics.digits:DigitsFeatures',
}
"""Feature networks, by name as the metrics are."""
