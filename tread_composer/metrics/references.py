"""What samples are compared with: statistics and features of real images, computed once and kept in a cache.

A reference is a set of images (``images.open_images``), or an ADM reference file. Of such a file FID takes ``mu`` and
``sigma``, which are those of the whole training set, in the features of TensorFlow's Inception; KID, precision and
recall take its images ``arr_0``, of which there are 10,000. ``mu_s`` and ``sigma_s`` belong to sFID, which is not here.
"""

import hashlib
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tread_composer.core.errors import UserError
from tread_composer.metrics.features import Extractor, FeatureSet, extract, load_features, save_features
from tread_composer.metrics.frechet import Statistics, statistics
from tread_composer.metrics.images import ImageSet, NpzImages, file_hash, open_images

__all__ = ['Reference', 'open_reference']

_CACHE_FORMAT = 1


@dataclass(frozen=True)
class Reference:
    """What samples are compared with.

    Args:
        path: Where it is.
        kind: ``'adm'`` for a file with ``mu`` and ``sigma``, else the kind of its images.
        images: Its images; None if it has statistics alone.
        published: ``mu`` and ``sigma`` of the file; None if they are to be computed.
        hash: SHA-256 of its content.
    """

    path: Path
    kind: str
    images: ImageSet | None
    published: Statistics | None
    hash: str

    @property
    def count(self) -> int:
        """Images that there are; 0 for statistics alone."""
        return 0 if self.images is None else self.images.count

    def must_be_looked_at(self, compares_with: str) -> bool:
        """Whether a metric that needs this (``Metric.compares_with``) needs features of the images."""
        return compares_with == 'images' or (compares_with == 'statistics' and self.published is None)

    def described(self) -> dict[str, str]:
        """For the protocol."""
        return {'name': self.path.name, 'kind': self.kind}

    def check(self, extractor: Extractor, resolution: int) -> None:
        """Refuse a network or images that do not belong to this reference.

        Args:
            extractor: Of both sides.
            resolution: Of the samples.

        Raises:
            UserError: The resolutions differ, or the statistics are of another network.
        """
        if self.published is not None and extractor.name != 'inception':
            raise UserError(f'{self.path}: its mu and sigma are of Inception, and the features are {extractor.name!r}')
        if self.images is not None and self.images.resolution != resolution:
            raise UserError(
                f'{self.path}: images of {self.images.resolution} pixels, and the samples have {resolution}; a '
                f'comparison needs the same, and nothing is resized here. Give a reference of {resolution} pixels'
            )
        if extractor.resolution not in (None, resolution):
            raise UserError(
                f'features {extractor.name!r} take images of {extractor.resolution} pixels, not {resolution}'
            )

    def features(self, extractor: Extractor, cache: Path, *, batch_size: int = 64) -> FeatureSet:
        """Features of its images, from the cache if they are there, else computed and put there.

        Raises:
            UserError: It has statistics alone, an image is damaged, or the file of the cache is.
        """
        path = self._cached(extractor, cache)
        if path.exists():
            return load_features(path, self._label(extractor))
        features = self.share(extractor, batch_size)
        self.keep(features, extractor, cache)
        return features

    def share(self, extractor: Extractor, batch_size: int, rank: int = 0, world: int = 1) -> FeatureSet:
        """Features of one rank's share of its images.

        Raises:
            UserError: It has statistics alone, or an image is damaged.
        """
        if self.images is None:
            raise UserError(f'{self.path}: holds statistics alone, and no images')
        return extract(self.images.batches(batch_size, rank, world), extractor)

    def keep(self, features: FeatureSet, extractor: Extractor, cache: Path) -> None:
        """Put its features into the cache."""
        save_features(self._cached(extractor, cache), features, self._label(extractor))

    def statistics(self, features: FeatureSet | None) -> Statistics:
        """Mean and covariance: the published ones, else those of its ``features``."""
        if self.published is not None:
            return self.published
        assert features is not None
        return statistics(features)

    def is_cached(self, extractor: Extractor, cache: Path) -> bool:
        """Whether ``features`` will not have to look at the images."""
        return self._cached(extractor, cache).exists()

    def _label(self, extractor: Extractor) -> str:
        key = {'format': _CACHE_FORMAT, 'reference': self.hash, 'features': extractor.identity()}
        return json.dumps(key, sort_keys=True)

    def _cached(self, extractor: Extractor, cache: Path) -> Path:
        digest = hashlib.sha256(self._label(extractor).encode()).hexdigest()
        return cache / f'features-{extractor.name}-{digest[:32]}.npz'


def open_reference(path: str | Path) -> Reference:
    """The reference at a path.

    Raises:
        UserError: There is none, or its statistics are damaged.
    """
    path = Path(path)
    if path.suffix == '.npz' and path.is_file():
        names = _names(path)
        published = _published(path) if {'mu', 'sigma'} <= set(names) else None
        images = NpzImages(path) if published is None or 'arr_0' in names else None
        digest = file_hash(path) if images is None else images.hash
        return Reference(path, 'npz' if published is None else 'adm', images, published, digest)
    images = open_images(path)
    return Reference(path, images.kind, images, None, images.hash)


def _names(path: Path) -> Sequence[str]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return list(arrays.files)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: is no npz that can be read: {error}') from error


def _published(path: Path) -> Statistics:
    with np.load(path, allow_pickle=False) as arrays:
        try:
            mean, covariance = (np.asarray(arrays[name], np.float64) for name in ('mu', 'sigma'))
        except (ValueError, zipfile.BadZipFile) as error:
            raise UserError(f'{path}: mu and sigma cannot be read: {error}') from error
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f'{path}: mu is {mean.shape} and sigma {covariance.shape}; they must be [D] and [D, D]')
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f'{path}: mu or sigma is not finite')
    return Statistics(mean, covariance)
