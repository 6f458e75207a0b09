"""What samples are compared with: statistics and features of real images, computed once and kept in a cache.

A reference is a set of images (``images.open_images``), or an ADM reference file. Of such a file FID takes ``mu`` and
``sigma``, which are those of the whole training set, in the features of TensorFlow's Inception; KID, precision and
recall take its images ``arr_0``, of which there are 10,000. sFID takes ``mu_s`` and ``sigma_s``.
"""

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tread_composer.core.errors import UserError
from tread_composer.io.files import file_hash
from tread_composer.io.progress import Progress, silent
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import Extractor, FeatureSet, joined, load_features, looked, save_features
from tread_composer.metrics.images import ImageSet, open_images

__all__ = ['Reference', 'open_reference']

_CACHE_FORMAT = 1

Moments = Mapping[str, np.ndarray]  # `mu` [D] and `sigma` [D, D], float64


@dataclass(frozen=True)
class Reference:
    """What samples are compared with."""

    path: Path
    kind: str  # 'adm' for a file with `mu` and `sigma`, else the kind of its images
    images: ImageSet | None  # None if it has statistics alone
    published: Moments | None  # `mu` and `sigma` of the file; None if they are to be computed
    hash: str  # SHA-256 of its content
    published_spatial: Moments | None = None  # `mu_s` and `sigma_s`, of spatial features; None as above

    @property
    def count(self) -> int:
        """Images that there are; 0 for statistics alone."""
        return 0 if self.images is None else self.images.count

    def check(self, extractor: Extractor, resolution: int, *, spatial: bool = False) -> None:
        """Refuse a network, or samples of ``resolution`` pixels, that do not belong to this reference.

        Raises:
            UserError: The resolutions differ, the statistics are of another network, or there are none of the
                ``spatial`` features.
        """
        if spatial and self.published is not None and self.published_spatial is None:
            raise UserError(
                f'{self.path}: has mu and sigma but not mu_s and sigma_s, which sfid compares with; give a file that '
                'has them, as ADM publishes them, or images alone'
            )
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

    def features(
        self,
        extractor: Extractor,
        cache: Path | None,
        *,
        batch_size: int = 64,
        ranks: Ranks = Ranks(),
        log: Callable[[str], None] = silent,
    ) -> FeatureSet | None:
        """Features of its images, on the first rank: from the cache, else computed by all ranks and put there.

        All ranks call this; without a folder ``cache`` nothing is kept, nor of images that are none of the disk.

        Raises:
            UserError: It has statistics alone, an image is damaged, or the file of the cache is.
        """
        facts = {'format': _CACHE_FORMAT, 'reference': self.hash, 'features': extractor.identity()}
        facts |= {'spatial': True} if getattr(extractor, 'spatial', False) else {}
        contract = json.dumps(facts, sort_keys=True)
        name = f'features-{extractor.name}-{hashlib.sha256(contract.encode()).hexdigest()[:32]}.npz'
        path = cache / name if cache is not None and self.path.exists() else None  # scikit-learn's are no file
        # The first rank decides for all: the others may see another cache.
        if ranks.from_first(path is not None and path.exists()):
            return ranks.agreed(lambda: load_features(path) if path and ranks.is_first else None)
        if self.images is None:
            raise UserError(f'{self.path}: holds statistics alone, and no images')
        if path is not None:
            log(f'{self.path}: looking at {self.count:,} reference images, once')
        # Of the share of this rank
        progress = Progress(str(self.path), -(-self.count // ranks.world), 'images', log=log)
        batches = self.images.batches(batch_size, ranks.rank, ranks.world)
        shares = ranks.gathered(ranks.agreed(lambda: looked(batches, extractor, progress=progress)))
        if not ranks.is_first:
            return None
        features = joined([part for share in shares for part in share])
        if path is not None:
            save_features(path, features)
        return features


def open_reference(path: str | Path) -> Reference:
    """The reference at a path; the name ``'digits'`` stands for scikit-learn's, whatever lies there.

    Raises:
        UserError: There is none, or its statistics are damaged.
    """
    if path == 'digits':
        from tread_composer.metrics.digits import DigitsImages  # brings scikit-learn

        return _of_images(DigitsImages())
    path = Path(path)
    if path.suffix == '.npz' and path.is_file():
        published, spatial, has_images = _adm(path)
        images = open_images(path) if has_images or published is None else None
        digest = file_hash(path) if images is None else images.hash
        return Reference(path, 'npz' if published is None else 'adm', images, published, digest, spatial)
    return _of_images(open_images(path))


def _of_images(images: ImageSet) -> Reference:
    return Reference(images.path, images.kind, images, None, images.hash)


def _adm(path: Path) -> tuple[Moments | None, Moments | None, bool]:
    """``mu`` and ``sigma`` of an npz that has both, ``mu_s`` and ``sigma_s`` likewise, and whether it holds images."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names = set(arrays.files)
            pairs = [pair if set(pair) <= names else None for pair in (('mu', 'sigma'), ('mu_s', 'sigma_s'))]
            plain, spatial = (pair and _moments(path, arrays, *pair) for pair in pairs)
            return plain, spatial if plain else None, 'arr_0' in names
    except UserError:
        raise
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: cannot be read as an npz of images or of mu and sigma: {error}') from error


def _moments(path: Path, arrays: Any, mu: str, sigma: str) -> Moments:
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in (mu, sigma))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(f'{path}: {mu} is {mean.shape} and {sigma} {covariance.shape}; they must be [D] and [D, D]')
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f'{path}: {mu} or {sigma} is not finite')
    return {'mu': mean, 'sigma': covariance}
