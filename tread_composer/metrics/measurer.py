"""The one place where numbers are made: for ``evaluate``, ``sweep`` and the callback ``evaluation``.

They bring the images, as a stream of bytes, and say how they came about; what is opened, checked, looked at and written
down is here.
Legend: B images of a batch, C channels, R side of an image in pixels.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import FeatureSet, joined, look, open_extractor
from tread_composer.metrics.measurement import Measurement
from tread_composer.metrics.metric import Comparison, Figure, check_metrics, measure
from tread_composer.metrics.protocol import Protocol, result
from tread_composer.metrics.references import open_reference

__all__ = ['Measurement', 'Measurer', 'silent']


def silent(line: str) -> None:
    """Say nothing, on ranks that must not."""
    del line


class Measurer:
    """Opens the feature network and the reference, looks at images, and makes the numbers.

    On several ranks each looks at its share of the images, the features are gathered, and the first rank measures.

    Args:
        measurement: What and how.
        device: Where to compute.
        ranks: All of them call `prepare` and `figures`; the other methods need no other rank.
        log: Gets the lines for people.

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
        )
        self.reference = open_reference(measurement.reference)
        self._against: Comparison | None = None

    def check(self, num_samples: int, resolution: int) -> None:
        """Refuse samples that cannot be measured, before any of them is looked at.

        Args:
            num_samples: Images to be measured.
            resolution: Their side in pixels.

        Raises:
            UserError: They do not go with the metrics, the features or the reference.
        """
        check_metrics(
            self.metrics,
            num_logits=self.extractor.num_logits,
            num_samples=num_samples,
            num_reference=self.reference.count,
        )
        self.reference.check(self.extractor, resolution)

    def prepare(self) -> None:
        """Look at the reference, as far as the metrics need it and the cache has it not; once.

        Raises:
            UserError: One of its images is damaged, or the file of the cache is.
        """
        if self._against is None:
            images = any(self.reference.must_be_looked_at(metric.compares_with) for metric in self.metrics)
            features = self._reference_features() if images else None
            fitted = any(metric.compares_with == 'statistics' for metric in self.metrics) and self.ranks.is_first
            self._against = self.ranks.agreed(
                lambda: Comparison(self.reference.statistics(features) if fitted else None, features)
            )

    def _reference_features(self) -> FeatureSet | None:
        """Of all images of the reference, on the first rank."""
        reference, extractor, ranks = self.reference, self.extractor, self.ranks
        cache, batch_size = self.measurement.cache, self.measurement.batch_size
        # The first rank decides for all: the others may see another cache.
        cached = ranks.from_first(reference.is_cached(extractor, cache))
        if not cached:
            self.log(f'{reference.path}: looking at {reference.count:,} reference images, once')
        if cached or reference.count < ranks.world:
            read = lambda: reference.features(extractor, cache, batch_size=batch_size)  # noqa: E731
            return ranks.agreed(lambda: read() if ranks.is_first else None)
        features = joined(
            ranks.gathered(ranks.agreed(lambda: reference.share(extractor, batch_size, ranks.rank, ranks.world)))
        )
        if not ranks.is_first:
            return None
        reference.keep(features, extractor, cache)
        return features

    def look(self, batches_BCRR: Iterable[Tensor]) -> list[FeatureSet]:
        """The features of this rank's images.

        Args:
            batches_BCRR: Of uint8, grey or in colour.

        Raises:
            UserError: The network does not take such images.
        """
        return [look(images_BCRR.expand(-1, 3, -1, -1), self.extractor) for images_BCRR in batches_BCRR]

    def figures(self, parts: Sequence[FeatureSet]) -> list[Figure]:
        """The numbers, on the first rank; none on the others.

        Args:
            parts: What `look` gave on this rank.

        Raises:
            UserError: There are no images, or their features are not finite.
        """
        self.prepare()
        shares = self.ranks.gathered(list(parts))

        def measured() -> list[Figure]:
            assert self._against is not None
            samples = joined([part for share in shares for part in share])
            return measure(self.metrics, samples, self._against, self.device)

        return self.ranks.agreed(lambda: measured() if self.ranks.is_first else [])

    def facts(self) -> dict[str, Any]:
        """The part of a ``Protocol`` that is this object's to say."""
        return {
            'reference': self.reference.described(),
            'reference_hash': self.reference.hash,
            'features': self.extractor.identity(),
        }

    def entries(
        self, figures: Sequence[Figure], drawn: Mapping[str, Any], *, num_samples: int, resolution: int, **about: Any
    ) -> list[dict[str, Any]]:
        """The entries of a ``results.json``.

        Args:
            figures: The numbers.
            drawn: How the images came about: the part of a ``Protocol`` that ``drawing_facts`` gives.
            num_samples: Images measured.
            resolution: Their side in pixels.
            about: What else is known of them, by the names of ``protocol.result``.

        Raises:
            UserError: A number is not finite.
        """
        protocol = Protocol(**drawn, **self.facts(), num_samples=num_samples, resolution=resolution)
        return [
            result(
                figure.quantity.reported(self.extractor.name, num_samples),
                figure.value,
                dataclasses.replace(protocol, settings=figure.settings),
                spread=figure.spread,
                unit=figure.quantity.unit,
                better=figure.quantity.better,
                **about,
            )
            for figure in figures
        ]
