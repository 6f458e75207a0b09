"""Feature networks by name, and the features of a set of images: what every metric here is computed from.

Legend: N images of a set, B images of a batch, R side of an image in pixels, D features, K logits.
"""

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.metrics.digits import digits_judge, real_digits
from tread_composer.metrics.inception import InceptionFeatures

__all__ = ['FEATURES', 'DigitsFeatures', 'Extractor', 'FeatureSet', 'extract', 'joined', 'look', 'open_extractor']


class Extractor(Protocol):
    """A feature network: bytes in, features out."""

    @property
    def name(self) -> str:
        """``'inception'`` gives its metrics their published names; any other is part of them."""
        ...

    @property
    def resolution(self) -> int | None:
        """The only side of an image that it takes; None if it takes any."""
        ...

    @property
    def num_logits(self) -> int:
        """Classes that it can tell; 0 if it has none to give (then there is no Inception Score)."""
        ...

    def identity(self) -> dict[str, str]:
        """``name``, ``weights_hash`` and ``version``, for the protocol."""
        ...

    def __call__(self, images_B3RR: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """Features ``[B, D]`` and logits ``[B, K]`` of uint8 images."""
        ...


@dataclass(frozen=True)
class FeatureSet:
    """Features of images. `joined` puts them in an order that depends on the images alone.

    So KID's random subsets and the parts of the Inception Score do not depend on the order in which the images came,
    nor on how many processes there were.

    Args:
        features_ND: On the CPU.
        logits_NK: On the CPU; None if the network has none.
        digests: Of the images' bytes, one each.
    """

    features_ND: Tensor
    logits_NK: Tensor | None
    digests: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.digests)


def look(images_B3RR: Tensor, extractor: Extractor) -> FeatureSet:
    """The features of one batch of images, uint8, as they come out."""
    features_BD, logits_BK = extractor(images_B3RR)
    digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images_B3RR.cpu().numpy()]
    return FeatureSet(features_BD.cpu(), None if logits_BK is None else logits_BK.cpu(), digests)


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """The union of several sets, in the order that depends on the images alone.

    Raises:
        UserError: There are no images, or a feature is not finite.
    """
    digests = [digest for part in parts for digest in part.digests]
    if not digests:
        raise UserError('there are no images to measure')
    order = sorted(range(len(digests)), key=digests.__getitem__)
    logits = [part.logits_NK for part in parts if part.logits_NK is not None]
    features_ND = torch.cat([part.features_ND for part in parts])[order]
    if not features_ND.isfinite().all():
        raise UserError('features came out that are not finite; check the weights of the feature network')
    return FeatureSet(features_ND, torch.cat(logits)[order] if logits else None, [digests[i] for i in order])


def extract(batches_B3RR: Iterable[Tensor], extractor: Extractor) -> FeatureSet:
    """The features of images, uint8 ``[B, 3, R, R]`` a batch.

    The batch size moves them by rounding alone (about 1e-6 of their size in float32). The global random streams stay
    as they are.

    Raises:
        UserError: There are no images, or their features are not finite.
    """
    return joined([look(images_B3RR, extractor) for images_B3RR in batches_B3RR])


class DigitsFeatures:
    """The hidden layer of the digits' judge (``metrics.digits``): what it measures is no FID, and is not called one."""

    name = 'digits'
    resolution = 8
    num_logits = 0

    def identity(self) -> dict[str, str]:
        """See ``Extractor``. The hash is of what it makes of real digits: it is trained anew on each machine."""
        return {'name': self.name, 'weights_hash': _judge_hash(), 'version': 'tread_composer digits judge'}

    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, None]:
        """Features float64 ``[B, 128]`` of grey images, 8 x 8.

        Raises:
            UserError: The images are in colour.
        """
        if not (images_B3RR == images_B3RR[:, :1]).all():
            raise UserError("features 'digits' are of grey images, and these are in colour")
        pixels_B1RR = images_B3RR[:, :1].cpu().float() / 127.5 - 1
        with threadpool_limits(1):
            return torch.from_numpy(digits_judge().features(pixels_B1RR)), None


@functools.lru_cache(maxsize=1)
def _judge_hash() -> str:
    images, _ = real_digits()['eval']
    with threadpool_limits(1):  # other numbers of threads sum in other orders
        values = digits_judge().features(images)
    return f'sha256:{hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()}'


FEATURES: Mapping[str, type[InceptionFeatures] | type[DigitsFeatures]] = {
    'inception': InceptionFeatures,
    'digits': DigitsFeatures,
}
"""Feature networks by the name that configurations and commands use."""


def open_extractor(
    name: str,
    *,
    inception: str | Path | None = None,
    inception_sha256: str | None = None,
    allow_download: bool = False,
    device: str | torch.device = 'cpu',
) -> Extractor:
    """A feature network.

    Args:
        name: One of ``FEATURES``.
        inception: File of Inception's weights; looked for as ``inception.find_weights`` says if None.
        inception_sha256: Its hash, if it is not the published one.
        allow_download: Fetch the weights if they are not here.
        device: Where Inception computes.

    Raises:
        UserError: Unknown name, or the weights are missing or not those of this hash.
    """
    if name == 'digits':
        if inception is not None or inception_sha256 is not None:
            raise UserError("features 'digits' need no weights of Inception: leave its path out")
        return DigitsFeatures()
    if name == 'inception':
        return InceptionFeatures.open(
            inception, sha256=inception_sha256, allow_download=allow_download, device=device
        )  # fmt: skip
    raise UserError(f'features: {name!r} is not known; choose one of {", ".join(FEATURES)}')
