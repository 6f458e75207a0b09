"""Real latents for a look at a network: a few samples of a run's own data, or of another local folder.

Shapes: S samples, C channels (2C stored, for moments), H x W latent pixels.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tread_composer.builders.run_data import split_folders
from tread_composer.config import Config
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_agreement, check_shards
from tread_composer.data.columns import LABEL, LATENTS
from tread_composer.data.digits import digits_manifest, load_digits_arrays
from tread_composer.data.manifest import MANIFEST_NAME, LatentFacts, Manifest

__all__ = ['RealLatents', 'read_latents']


@dataclass(frozen=True)
class RealLatents:
    """Some samples of a split, and where they were read, in words."""

    raw: Tensor  # as stored, float32 [S, C or 2C, H, W]
    labels: Tensor  # int64 [S]
    sample_ids: tuple[int, ...]  # positions in the split
    manifest: Manifest
    source: str


def read_latents(
    config: Config, facts: LatentFacts, num_samples: int, folder: str | os.PathLike[str] | None = None
) -> RealLatents:
    """Samples at equal distances in the split that a run evaluates on; that it trains on where it has no other.

    With ``folder``, of another data set (a split, or the folder around it) in place of the run's own.

    Raises:
        UserError: There are no such data, or fewer samples; they are damaged, or of another kind or shape.
    """
    if folder is None and config.data.name == 'digits':
        manifest, (images, labels) = digits_manifest('eval'), load_digits_arrays('eval')
        ids = list(_spread(num_samples, manifest, 'the eval split of the digits'))
        raw, labels_S = torch.from_numpy(images[ids]), torch.from_numpy(labels[ids])
        return RealLatents(raw, labels_S, tuple(ids), manifest, manifest.source)
    path = _split_folder(config, folder)
    try:
        manifest = Manifest.load(path)
        check_shards(path, manifest)
        check_agreement(
            manifest,
            channels=facts.channels,
            latent_size=(facts.latent_height, facts.latent_width),
            autoencoder=facts.autoencoder or 'pixels',
            autoencoder_hash=facts.autoencoder_hash,
            num_classes=facts.num_classes or None,  # without classes the network does not look at labels
        )
    except UserError as error:
        if folder is not None:
            raise
        remedy = 'Give a local copy of latents like those that the run was trained on: --data FOLDER'
        raise UserError(f'{error}\n{remedy}') from None
    ids = _spread(num_samples, manifest, str(path))
    from streaming import LocalDataset

    dataset = LocalDataset(str(path))
    try:
        rows = [dataset[index] for index in ids]
    except FileNotFoundError as error:
        raise UserError(
            f'{error.filename}: this shard is there in compressed form only; unpack the shards, or give --data with a '
            'data set without compression'
        ) from None
    raw = np.stack([np.asarray(row[LATENTS], np.float32) for row in rows])
    labels_S = torch.tensor([int(row[LABEL]) for row in rows], dtype=torch.int64)
    return RealLatents(torch.from_numpy(raw), labels_S, ids, manifest, f'{path} ({manifest.source})')


def _split_folder(config: Config, folder: str | os.PathLike[str] | None) -> Path:
    folders = split_folders(config)
    splits = [folders[split] for split in ('eval', 'train') if split in folders]
    if folder is None:
        return Path(config.data.local) / splits[0]
    path, inner = Path(folder), list(dict.fromkeys([*splits, 'val', 'eval', 'train']))
    for place in (path, *(path / name for name in inner)):
        if (place / MANIFEST_NAME).is_file():
            return place
    fault = f'holds no {MANIFEST_NAME}, nor does a split in it ({", ".join(inner)})'
    fault = fault if path.is_dir() else 'there is no such folder'
    raise UserError(f'--data {path}: {fault}; give the folder of a latents data set or of a split')


def _spread(num_samples: int, manifest: Manifest, source: str) -> tuple[int, ...]:
    """Positions at equal distances: also where the data lie in order of their classes they are of many."""
    available = manifest.num_samples
    if not 1 <= num_samples <= available:
        raise UserError(f'--count: {num_samples} is not between 1 and {available}, the samples of {source}')
    return tuple(index * available // num_samples for index in range(num_samples))
