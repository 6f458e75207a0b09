"""Feature networks by name, and the features of a set of images: what every metric here is computed from.

Legend: N images of a set, B images of a batch, R side of an image in pixels, D features, K logits, S spatial features.
"""

import hashlib
import inspect
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.core.named import part_named
from tread_composer.io.files import whole_file
from tread_composer.io.progress import Progress
from tread_composer.metrics import FEATURES

__all__ = [
    'HASH_ORDER', 'Extractor', 'FeatureSet', 'extractor_class', 'joined', 'load_features', 'looked', 'open_extractor',
    'save_features',
]  # fmt: skip


HASH_ORDER = 'in the order of their hashes'
"""How `joined` leaves images, in words for the protocol: where they came from decides no random subset."""


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

    def __call__(self, images_B3RR: Tensor, /) -> tuple[Any, ...]:
        """Features ``[B, D]`` and logits ``[B, K]`` of uint8 images.

        Spatial features ``[B, S]`` come third where the network has an attribute ``spatial`` that is True.
        """
        ...


@dataclass(frozen=True)
class FeatureSet:
    """Features of images, on the CPU. `joined` puts them in an order that depends on the images alone.

    So KID's random subsets and the parts of the Inception Score do not depend on the order in which the images came,
    nor on how many processes there were.
    """

    features_ND: Tensor
    logits_NK: Tensor | None  # None if the network has none
    digests: Sequence[bytes]  # of the bytes of each image
    labels_N: Tensor | None = None  # what each image was to show, int64; None if nobody knows
    spatial_NS: Tensor | None = None  # features that keep their place in the image, where they are asked for

    def __len__(self) -> int:
        return len(self.digests)


def looked(
    batches_BCRR: Iterable[Tensor],
    extractor: Extractor,
    labels: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> list[FeatureSet]:
    """The features of each batch of uint8 images, C being 1 for grey or 3.

    The batch size moves them by rounding alone (about 1e-6 of their size in float32); the global random streams stay as
    they are. ``labels`` say what each image of all batches was to show, in their order. Images that the network does
    not take are refused with a ``UserError``.
    """
    begin, parts = 0, []
    for images_BCRR in batches_BCRR:
        images_B3RR = images_BCRR.expand(-1, 3, -1, -1)  # grey as three equal channels
        features_BD, *further = extractor(images_B3RR)
        logits_BK, spatial_BS = (None if tensor is None else tensor.cpu() for tensor in (*further, None)[:2])
        # Of the bytes: the same for an image whichever rank looks at it
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images_B3RR.cpu().numpy()]
        end = begin + len(digests)
        labels_B = None if labels is None else torch.tensor(labels[begin:end], dtype=torch.int64)
        parts.append(FeatureSet(features_BD.cpu(), logits_BK, digests, labels_B, spatial_BS))
        begin = end
        if progress is not None:
            progress.add(len(digests))
    return parts


def joined(parts: Sequence[FeatureSet]) -> FeatureSet:
    """The union of several sets, in the order that depends on the images alone.

    Raises:
        UserError: There are no images, or a feature is not finite.
    """
    digests = [digest for part in parts for digest in part.digests]
    if not digests:
        raise UserError('there are no images to measure')
    order = sorted(range(len(digests)), key=digests.__getitem__)

    def in_order(tensors: Sequence[Tensor | None]) -> Tensor | None:
        # All parts or none: a mixture could not be told apart later
        present = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(present)[order] if len(present) == len(parts) else None

    features_ND = torch.cat([part.features_ND for part in parts])[order]
    if not features_ND.isfinite().all():
        raise UserError('features came out that are not finite; check the weights of the feature network')
    names = ('logits_NK', 'labels_N', 'spatial_NS')
    logits_NK, labels_N, spatial_NS = (in_order([getattr(part, name) for part in parts]) for name in names)
    return FeatureSet(features_ND, logits_NK, [digests[i] for i in order], labels_N, spatial_NS)


def save_features(path: Path, features: FeatureSet) -> None:
    """Write features to an npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = np.frombuffer(b''.join(features.digests), np.uint8).reshape(len(features), -1)
    with whole_file(path) as unfinished, unfinished.open('wb') as file:
        arrays: dict[str, Any] = {'features': features.features_ND.numpy(), 'digests': digests}
        arrays |= {} if features.spatial_NS is None else {'spatial': features.spatial_NS.numpy()}
        np.savez(file, **arrays)


def load_features(path: Path) -> FeatureSet:
    """What ``save_features`` wrote; a ``UserError`` where the file is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            features, digests = arrays['features'], arrays['digests']
            spatial = torch.from_numpy(arrays['spatial']) if 'spatial' in arrays.files else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f'{path}: this file of the cache is damaged ({error}); delete it') from error
    return FeatureSet(torch.from_numpy(features), None, [row.tobytes() for row in digests], None, spatial)


def extractor_class(name: str) -> Any:
    """The class of a feature network, not opened yet: it knows its ``num_logits``.

    Raises:
        UserError: The name is neither in ``FEATURES`` nor ``package.module:Class``.
    """
    try:
        return part_named(name, FEATURES)
    except ValueError as error:
        raise UserError(f'features: {error}') from None


def open_extractor(name: str, *, device: str | torch.device = 'cpu', **settings: Any) -> Extractor:
    """A feature network: one of ``FEATURES``, or ``package.module:Class``.

    Of ``device`` and the settings (``inception``, ``inception_sha256``, ``allow_download``, ``spatial``) it takes those
    that its ``open``, or else its constructor, names.

    Raises:
        UserError: The name is unknown, a setting does not belong to this network, or its weights are missing or not
            those of this hash.
    """
    target = extractor_class(name)
    opener = getattr(target, 'open', target)  # a network whose weights are a file has a constructor of its own for it
    accepted = inspect.signature(opener).parameters
    foreign = [
        key for key in ('inception', 'inception_sha256') if settings.get(key) is not None and key not in accepted
    ]
    if foreign:
        raise UserError(f'features {name!r} need no weights of Inception: leave {" and ".join(foreign)} out')
    settings['device'] = device
    return opener(**{key: value for key, value in settings.items() if key in accepted})
