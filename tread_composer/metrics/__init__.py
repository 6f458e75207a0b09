"""How good the samples are. A new metric is a file here and a line in ``METRICS`` (``metrics.metric.Metric``)."""

from collections.abc import Mapping

__all__ = ['METRICS']

METRICS: Mapping[str, str] = {
    'fid': 'tread_composer.metrics.fid:FID',
    'kid': 'tread_composer.metrics.kid:KID',
    'is': 'tread_composer.metrics.inception_score:InceptionScore',
    'prc': 'tread_composer.metrics.precision_recall:PrecisionRecall',
}
"""By the name that configurations and commands use, which take ``package.module:Class`` of another package too.

Imported when they are used: the commands list the names before they load torch.
"""
