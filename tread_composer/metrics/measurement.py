"""What is to be measured: for ``evaluate``, ``sweep`` and the callback ``evaluation``."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge

from tread_composer.core.options import Flag, check_request
from tread_composer.metrics import FEATURES, METRICS

if TYPE_CHECKING:
    from tread_composer.metrics.metric import Metric

__all__ = ['Measurement', 'default_cache']


def default_cache() -> Path:
    """``$XDG_CACHE_HOME/tread_composer``, by default within ``~/.cache``."""
    return Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'tread_composer'


@dataclass(frozen=True)
class Measurement:
    """What is measured, with which network, against what.

    Args:
        reference: A folder of images, an npz of ADM's suite, MDS images, or digits.
        metrics: What to measure; prc is precision and recall. ``package.module:Class`` is taken too.
        features: The feature network, likewise.
        inception: File of Inception's weights, if not where ``prefetch`` says.
        inception_sha256: Its hash, if it is not the published file.
        allow_download: Fetch Inception's weights if they are not here.
        kid_subset_size: Images in each random subset of KID.
        batch_size: Images in one call of a network.
        cache: Folder of the reference's features (~/.cache/tread_composer).

    Raises:
        UserError: A number is out of range.
    """

    reference: Annotated[str, Flag(metavar='IMAGES')]
    metrics: Annotated[tuple[str, ...], Flag('--metrics', choices=tuple(METRICS))] = ('fid',)
    features: Annotated[str, Flag(choices=tuple(FEATURES))] = 'inception'
    inception: str | None = None
    inception_sha256: str | None = None
    allow_download: bool = False
    kid_subset_size: Annotated[int, Ge(2)] = 1000
    batch_size: Annotated[int, Ge(1)] = 64
    cache: Path = field(default_factory=default_cache)

    def __post_init__(self) -> None:
        check_request(self)

    def build(self) -> 'list[Metric]':
        """The metrics; a ``UserError`` where one is unknown."""
        from tread_composer.metrics.metric import build_metrics

        return build_metrics(self.metrics, {'kid_subset_size': self.kid_subset_size})

    def check(self, num_samples: int) -> None:
        """Refuse what is impossible whatever the reference is.

        Raises:
            UserError: A name is unknown, or a metric needs other features or more samples.
        """
        from tread_composer.metrics.features import extractor_class
        from tread_composer.metrics.metric import check_metrics

        check_metrics(self.build(), extractor_class(self.features), num_samples, num_samples)
