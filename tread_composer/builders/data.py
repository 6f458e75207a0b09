"""From a resolved configuration to batches."""

import os
from collections.abc import Mapping
from typing import Any

from composer.utils import dist
from torch.utils.data import DataLoader

from tread_composer.builders.run_data import split_folders
from tread_composer.config import Config
from tread_composer.data.loaders import eval_loader, train_loader
from tread_composer.data.manifest import Manifest

__all__ = ['build_loaders']

_READER_SETTINGS = (
    'cache_limit', 'predownload', 'validate_hash', 'download_retry', 'download_timeout', 'num_canonical_nodes',
)  # fmt: skip
"""Settings of ``data`` that go to the reader as they are; null leaves the reader's default."""


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
        return {
            'local': os.path.join(data.local, names[split]),
            'remote': uri,
            'num_classes': splits[split].num_classes,
            **common,
        }

    # Sizes in the YAML are those of all ranks together.
    train = train_loader(batch_size=config.global_train_batch_size // ranks, **place('train') | training)
    if 'eval' not in splits:
        return train, None
    return train, eval_loader(batch_size=config.global_eval_batch_size // ranks, **place('eval'))
