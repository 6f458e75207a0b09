"""The data of a run: made or found, held against the configuration before anything is built, read in batches."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader

from tread_composer.config import Config
from tread_composer.core.errors import UserError
from tread_composer.data.checks import check_agreement, check_shards, fetch_descriptions
from tread_composer.data.digits import digits_manifest, prepare_digits
from tread_composer.data.loaders import eval_loader, train_loader
from tread_composer.data.manifest import Manifest

__all__ = [
    'build_loaders', 'check_batch_size', 'check_expectations', 'identity', 'planned_manifest', 'prepare_data',
    'split_folders', 'with_planned_numbers',
]  # fmt: skip

_READER_SETTINGS = (
    'cache_limit', 'predownload', 'validate_hash', 'download_retry', 'download_timeout', 'num_canonical_nodes',
)  # fmt: skip
"""Settings of ``data`` that go to the reader as they are; null leaves the reader's default."""


def split_folders(config: Config) -> dict[str, str]:
    """Names of the sub-folders with the data: of ``'train'``, and of ``'eval'`` if the run has one."""
    data = config.data
    if data.name == 'digits':
        return {'train': 'train', 'eval': 'eval'}
    return {'train': data.train_split} | ({'eval': data.eval_split} if data.eval_split else {})


def planned_manifest(config: Config) -> Manifest | None:
    """What the training data say about themselves, or will when they are made; None if that cannot be known yet."""
    if config.data.name == 'digits':
        return digits_manifest('train')
    folder = Path(config.data.local) / config.data.train_split
    return Manifest.load(folder) if (folder / 'manifest.json').exists() else None


def with_planned_numbers(config: Config) -> Config:
    """The configuration with scale and shift of the latents as numbers, if the data can be known yet; else as it is."""
    manifest = planned_manifest(config) if config.scaled_by_data else None
    return config if manifest is None else config.normalized(manifest)


def prepare_data(config: Config) -> dict[str, Manifest]:
    """Make the digits if they are not there; check every split before a step is taken. Manifests by split.

    ``UserError`` if one is missing or damaged, or contradicts the configuration.
    """
    remote = getattr(config.data, 'remote', None)
    if config.data.name == 'digits':
        prepare_digits(config.data.local)
    manifests = {}  # of the evaluation split too, which is first read hours later
    for split, name in split_folders(config).items():
        folder = os.path.join(config.data.local, name)
        if remote is not None:
            fetch_descriptions(f'{remote.rstrip("/")}/{name}', folder)
        manifests[split] = Manifest.load(folder)
        check_shards(folder, manifests[split], remote=remote is not None)
        check_expectations(config, manifests[split])
    _check_splits(config, manifests)
    return manifests


def _check_splits(config: Config, manifests: dict[str, Manifest]) -> None:
    """The evaluation split must mean by a label and a latent what the training split means."""
    if 'eval' not in manifests:
        return
    names = ('kind', 'autoencoder', 'autoencoder_hash', 'latent_shape', 'crop', 'resolution', 'class_names')
    for name in names:
        train, held_out = (getattr(manifests[split], name) for split in ('train', 'eval'))
        if train == held_out:
            continue
        if name == 'class_names':
            pairs = itertools.zip_longest(train, held_out)
            number = next(label for label, pair in enumerate(pairs) if pair[0] != pair[1])
            train, held_out = (
                f'{list(classes[number : number + 1])} as class {number}' for classes in (train, held_out)
            )
        folders = split_folders(config)
        raise UserError(
            f'data.local: {config.data.local}: {name}: {folders["train"]} has {train}, {folders["eval"]} has '
            f'{held_out}; convert both in one go, or train without the second: data.eval_split=null'
        )


def check_expectations(config: Config, manifest: Manifest) -> None:
    """Refuse data that are not what the configuration is written for; the ``UserError`` lists the contradictions."""
    data = config.data
    expected: dict[str, Any] = {'autoencoder': config.autoencoder.instance.id}
    if data.name == 'latents':
        size = None if data.latent_size is None else (data.latent_size, data.latent_size)
        expected |= {'kind': data.kind, 'channels': data.channels, 'latent_size': size, 'num_classes': data.num_classes}
    check_agreement(manifest, **expected)  # None: nothing is expected
    if data.name == 'latents' and data.mirror and not manifest.mirrored:
        raise UserError(
            f'data.mirror: true, but {data.local} holds no mirrored latents (mirrored: false), and a latent cannot be '
            f'mirrored afterwards; convert the images again with their mirrors, or drop the setting'
        )
    if manifest.latent_height != manifest.latent_width:
        shape = f'{manifest.latent_height} x {manifest.latent_width}'
        raise UserError(f'{data.local}: latents of {shape}; this model takes square ones')


def check_batch_size(config: Config, manifest: Manifest) -> None:
    """Refuse a batch that the training data cannot fill even once."""
    size, count = config.global_train_batch_size, manifest.num_samples
    if size > count:
        raise UserError(
            f'global_train_batch_size: {size} is more than the {count} samples of the training data, so an epoch would '
            f'be empty; take at most {count}'
        )


def identity(manifest: Manifest) -> dict[str, Any]:
    """What makes data other data: positions and ids of samples mean nothing in those."""
    names = (
        'source', 'kind', 'autoencoder', 'autoencoder_hash', 'mirrored', 'num_samples', 'num_classes',
        'permutation_seed',
    )  # fmt: skip
    return {**{name: getattr(manifest, name) for name in names}, 'latent_shape': list(manifest.latent_shape)}


def build_loaders(config: Config, splits: Mapping[str, Manifest]) -> tuple[DataLoader, DataLoader | None]:
    """Training and evaluation batches; Composer's distributed state must be initialised."""
    data, ranks, names = config.data, dist.get_world_size(), split_folders(config)
    common: dict[str, Any] = {'num_workers': data.num_workers}
    training: dict[str, Any] = {'shuffle_seed': config.seed if data.shuffle_seed is None else data.shuffle_seed}
    remote = None
    if data.name == 'latents':
        remote = data.remote
        if data.num_workers is None:
            common['num_workers'] = 8 if remote else 2  # local shards need workers only where the disk is slow
        if splits['train'].mirrored and data.mirror is not False:
            training['mirror_seed'] = config.seed
        settings = {name: getattr(data, name) for name in _READER_SETTINGS}
        common |= {name: value for name, value in settings.items() if value is not None}

    def place(split: str) -> dict[str, Any]:
        uri = None if remote is None else f'{remote.rstrip("/")}/{names[split]}'
        local, num_classes = os.path.join(data.local, names[split]), splits[split].num_classes
        return {'local': local, 'remote': uri, 'num_classes': num_classes, **common}

    # Sizes in the YAML are those of all ranks together.
    train = train_loader(batch_size=config.global_train_batch_size // ranks, **place('train') | training)
    if 'eval' not in splits:
        return train, None
    return train, eval_loader(batch_size=config.global_eval_batch_size // ranks, **place('eval'))
