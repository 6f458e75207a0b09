"""The one place where numbers are made: for ``evaluate``, ``sweep`` and the callbacks.

They bring the features of images and say how those came about; what is opened, checked and written down is here.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import Any

import torch

from tread_composer.core.errors import UserError
from tread_composer.io.progress import silent
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import FeatureSet, joined, open_extractor
from tread_composer.metrics.measurement import Measurement
from tread_composer.metrics.metric import Comparison, Figure, check_metrics, measure
from tread_composer.metrics.protocol import Protocol
from tread_composer.metrics.published import statistics
from tread_composer.metrics.references import open_reference

__all__ = ['Measurer']


class Measurer:
    """Opens the feature network and the reference, looks at the latter, and makes the numbers.

    On several ranks each looks at its share of the images, the features are gathered, and the first rank measures. All
    ranks call `prepare` and `figures`; the other methods need no other rank.

    Raises:
        UserError: A metric or the features are unknown, or the reference or the weights of Inception are not what they
            must be.
    """

    def __init__(
        self,
        measurement: Measurement,
        device: torch.device,
        ranks: Ranks = Ranks(),
        log: Callable[[str], None] = silent,
    ) -> None:
        self.measurement, self.device, self.ranks, self.log = measurement, device, ranks, log
        self.metrics = measurement.build()
        self.extractor = open_extractor(
            measurement.features,
            inception=measurement.inception,
            inception_sha256=measurement.inception_sha256,
            allow_download=measurement.allow_download,
            device=device,
            spatial=self._needs_spatial,
        )
        self.reference = open_reference(measurement.reference)
        self._against: Comparison | None = None

    @property
    def _needs_spatial(self) -> bool:
        return any(getattr(metric, 'needs_spatial', False) for metric in self.metrics)

    @property
    def needs_labels(self) -> bool:
        """Whether a metric needs to know what each image was to show."""
        return any(getattr(metric, 'needs_labels', False) for metric in self.metrics)

    def check(self, num_samples: int, resolution: int, *, has_labels: bool = True) -> None:
        """Refuse samples of ``resolution`` pixels that cannot be measured, before any of them is looked at.

        Raises:
            UserError: They do not go with the metrics, the features or the reference.
        """
        check_metrics(self.metrics, self.extractor, num_samples, self.reference.count, has_labels)
        self.reference.check(self.extractor, resolution, spatial=self._needs_spatial)

    def prepare(self) -> None:
        """Look at the reference, as far as the metrics need it and the cache has it not; once.

        Raises:
            UserError: One of its images is damaged, or the file of the cache is.
        """
        if self._against is not None:
            return
        reference, ranks, sides = self.reference, self.ranks, {metric.compares_with for metric in self.metrics}
        features = None
        if 'images' in sides or ('statistics' in sides and reference.published is None):
            measurement = self.measurement
            features = reference.features(
                self.extractor, measurement.cache, batch_size=measurement.batch_size, ranks=ranks, log=self.log
            )

        def fitted() -> Comparison:
            if 'statistics' not in sides or not ranks.is_first:
                return Comparison(features=features)
            # Of the whole training set, where the file has them
            moments = reference.published or statistics(features.features_ND)  # type: ignore[union-attr]
            spatial = reference.published_spatial
            if spatial is None and features is not None and features.spatial_NS is not None:
                spatial = statistics(features.spatial_NS)
            return Comparison(moments, features, spatial)

        self._against = ranks.agreed(fitted)

    def figures(self, parts: Sequence[FeatureSet]) -> list[Figure]:
        """The numbers of what `features.looked` gave on each rank, on the first rank; none on the others.

        Raises:
            UserError: There are no images, or their features are not finite.
        """
        self.prepare()
        shares = self.ranks.gathered(list(parts))

        def measured() -> list[Figure]:
            assert self._against is not None
            samples = joined([part for share in shares for part in share])  # in an order that no rank decides
            return measure(self.metrics, samples, self._against, self.device)

        return self.ranks.agreed(lambda: measured() if self.ranks.is_first else [])

    def facts(self) -> dict[str, Any]:
        """The part of a ``Protocol`` that is this object's to say."""
        lossy = {'lossy': 'JPEG'} if self.reference.images is not None and self.reference.images.is_lossy else {}
        return {
            'reference': {'name': self.reference.path.name, 'kind': self.reference.kind, **lossy},
            'reference_hash': self.reference.hash,
            'features': self.extractor.identity(),
        }

    def entries(
        self,
        figures: Sequence[Figure],
        drawn: Mapping[str, Any],
        num_samples: int,
        resolution: int,
        *,
        source: str,
        seconds: float | None = None,
        **weights: Any,
    ) -> list[dict[str, Any]]:
        """The entries of a ``results.json``; None stands in them for what is not known.

        ``drawn`` is the part of a ``Protocol`` that ``drawing_facts`` gives, ``source`` the samples, run or checkpoint
        that was measured, ``seconds`` the training time of its weights; ``weights`` are, as far as known, ``run``, the
        training ``batch`` and ``weights_digest``.

        Raises:
            UserError: A number is not finite.
        """
        # Without the settings of each metric
        protocol = Protocol(**drawn, **self.facts(), num_samples=num_samples, resolution=resolution)
        entries = []
        for figure in figures:
            metric = figure.quantity.reported(self.extractor.name, num_samples)
            if not math.isfinite(figure.value):
                raise UserError(f'{metric}: came out as {figure.value}, of {source}: the images cannot be measured')
            entry = {
                'metric': metric,
                'value': float(figure.value),
                'spread': figure.spread,
                'unit': figure.quantity.unit,
                'better': figure.quantity.better,
                'protocol': dataclasses.replace(protocol, settings=figure.settings).to_dict(),
                # What training took in FLOPs follows from the run's configuration: ``compare`` counts it.
                'training': {'teraflops': None, 'seconds': seconds},
                'source': source,
                'created': datetime.now(timezone.utc).isoformat(timespec='seconds'),
            }
            entries.append({**entry, **dict.fromkeys(('run', 'batch', 'weights_digest')), **weights})
        return entries
