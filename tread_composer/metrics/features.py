"""Feature networks by name, and the features of a set of images: what every metric here is computed from.

Legend: N images of a set, B images of a batch, R side of an image in pixels, D features, K logits.
"""

import functools
import hashlib
import inspect
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.core.named import part_named
from tread_composer.io.files import whole_file
from tread_composer.metrics import FEATURES
from tread_composer.metrics.digits import digits_judge, real_digits

__all__ = [
    'DigitsFeatures',
    'Extractor',
    'FeatureSet',
    'extract',
    'extractor_class',
    'joined',
    'load_features',
    'look',
    'open_extractor',
    'save_features',
]


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


def save_features(path: Path, features: FeatureSet, label: str) -> None:
    """Write features to an npz, whole or not at all; makes the folder.

    Args:
        path: The file.
        features: What to keep.
        label: What they are of; `load_features` refuses a file with another label.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        'features': features.features_ND.numpy(),
        'digests': np.frombuffer(b''.join(features.digests), np.uint8).reshape(len(features), -1),
        'label': np.array(label),
    }
    if features.logits_NK is not None:
        arrays['logits'] = features.logits_NK.numpy()
    with whole_file(path) as unfinished, unfinished.open('wb') as file:
        np.savez(file, **arrays)


def load_features(path: Path, label: str) -> FeatureSet:
    """What ``save_features`` wrote.

    Raises:
        UserError: The file is damaged, or is labelled otherwise.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, digests, saved = (arrays[name] for name in ('features', 'digests', 'label'))
            logits = torch.from_numpy(arrays['logits']) if 'logits' in arrays else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: this file of the cache is damaged ({error}); delete it') from error
    if str(saved) != label:
        raise UserError(f'{path}: this file of the cache is of another reference; delete it')
    return FeatureSet(torch.from_numpy(features), logits, [row.tobytes() for row in digests])


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


def extractor_class(name: str) -> Any:
    """The class of a feature network, not opened yet: it knows its ``num_logits``.

    Raises:
        UserError: The name is unknown.
    """
    try:
        return part_named(name, FEATURES)
    except ValueError as error:
        raise UserError(f'features: {error}') from None


def open_extractor(name: str, *, device: str | torch.device = 'cpu', **settings: Any) -> Extractor:
    """A feature network.

    Args:
        name: Of ``metrics.FEATURES``, or ``package.module:Class``.
        device: Where it computes, if it takes a ``device``.
        settings: ``inception``, ``inception_sha256``, ``allow_download``: a network takes those that its ``open``, or
            else its constructor, names.

    Raises:
        UserError: The name is unknown, a setting does not belong to this network, or its weights are missing or not
            those of this hash.
    """
    target = extractor_class(name)
    opener = getattr(target, 'open', target)
    accepted = inspect.signature(opener).parameters
    foreign = [
        key for key in ('inception', 'inception_sha256') if settings.get(key) is not None and key not in accepted
    ]
    if foreign:
        raise UserError(f'features {name!r} need no weights of Inception: leave {" and ".join(foreign)} out')
    settings['device'] = device
    return opener(**{key: value for key, value in settings.items() if key in accepted})
