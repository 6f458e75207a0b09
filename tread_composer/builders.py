"""From a resolved configuration to objects, up to the Composer ``Trainer``. The only file that knows all parts."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from composer import Callback, Evaluator, Trainer
from composer.utils import dist, reproducibility
from torch.utils.data import DataLoader

from tread_composer import objectives
from tread_composer.autoencoders import KL, Pixels
from tread_composer.callbacks.environment import write_environment
from tread_composer.callbacks.epoch_is_whole import EpochIsWhole
from tread_composer.callbacks.files import write_atomically
from tread_composer.callbacks.keyed_draws import KeyedDraws
from tread_composer.callbacks.progress import ProgressLines
from tread_composer.callbacks.resume_contract import ResumeContract
from tread_composer.config import Config
from tread_composer.data.checks import check_agreement, check_shards, fetch_descriptions
from tread_composer.data.digits import digits_manifest, prepare_digits
from tread_composer.data.latents import eval_loader, train_loader
from tread_composer.data.manifest import Manifest
from tread_composer.errors import ResumeError, UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import timesteps
from tread_composer.protocols import Autoencoder, Objective

__all__ = [
    'build_autoencoder',
    'build_denoiser',
    'build_loaders',
    'build_model',
    'build_objective',
    'build_trainer',
    'check_fit',
    'check_run_folder',
    'planned_manifest',
    'prepare_data',
]

_DECISIVE = (
    'seed', 'global_train_batch_size', 'autoencoder', 'model', 'objective', 'latent_scale', 'latent_shift',
    'label_dropout', 'optimizer', 'scheduler', 'algorithms', 'precision',
)  # fmt: skip
"""Settings that a continued run may not change; data by what they are, not by where they lie. Not among them: what
must change with the machine (ranks, microbatch, sharding, compile) and what only looks on."""


def decisive_settings(config: Config) -> dict[str, Any]:
    """The part of the configuration that decides what is trained: what a checkpoint is bound to."""
    return _decisive_part(config.to_dict())


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that another configuration has begun: its checkpoints would be continued or overwritten.

    Raises:
        ResumeError: ``save_folder`` holds a run with other decisive settings; lists each difference.
    """
    if config.save_folder is None:
        return
    folder = run_folder(config)
    path = folder / 'config.yaml'
    # Without a checkpoint there is nothing to continue and nothing to lose: that run died before it could save.
    if not path.exists() or (not any(folder.glob('*.pt')) and not any(folder.glob('ep*/'))):
        return
    saved = _decisive_part(yaml.safe_load(path.read_text()))
    now = decisive_settings(config)
    if saved != now:
        raise ResumeError.from_differences(
            str(path),
            saved,
            now,
            'To continue that run, give its settings; to start another, give it a name of its own: run_name=...',
        )


def _decisive_part(tree: Mapping[str, Any]) -> dict[str, Any]:
    data = {key: tree['data'].get(key) for key in ('name', 'train_split', 'shuffle_seed', 'num_canonical_nodes')}
    return {**{key: tree.get(key) for key in _DECISIVE}, 'data': data}


def _identity(manifest: Manifest) -> dict[str, Any]:
    """What makes data other data: positions and ids of samples mean nothing in those."""
    names = ('source', 'kind', 'autoencoder', 'autoencoder_hash', 'num_samples', 'num_classes', 'permutation_seed')
    return {**{name: getattr(manifest, name) for name in names}, 'latent_shape': list(manifest.latent_shape)}


def run_folder(config: Config) -> Path:
    """``save_folder`` with Composer's placeholder filled in."""
    return Path(config.save_folder.replace('{run_name}', config.run_name))


def planned_manifest(config: Config) -> Manifest | None:
    """What the training data say about themselves, or will when they are made; None if that cannot be known yet.

    Raises:
        UserError: There is a manifest, and it is broken.
    """
    if config.data.name == 'digits':
        return digits_manifest('train')
    folder = Path(config.data.local) / config.data.train_split
    return Manifest.load(folder) if (folder / 'manifest.json').exists() else None


def prepare_data(config: Config) -> dict[str, Manifest]:
    """Make the digits if they are not there; check every split before a step is taken. Manifests by split.

    Raises:
        UserError: A split is missing or damaged, or contradicts the configuration.
    """
    data = config.data
    if data.name == 'digits':
        prepare_digits(data.local)
        splits, remote = {'train': 'train', 'eval': 'eval'}, None
    else:
        splits = {'train': data.train_split} | ({'eval': data.eval_split} if data.eval_split else {})
        remote = data.remote
    manifests = {}
    for split, name in splits.items():
        folder = os.path.join(data.local, name)
        if remote is not None:
            fetch_descriptions(f'{remote.rstrip("/")}/{name}', folder)
        manifests[split] = Manifest.load(folder)
        check_shards(folder, manifests[split], remote=remote is not None)
        check_expectations(config, manifests[split])
    return manifests


def check_expectations(config: Config, manifest: Manifest) -> None:
    """Refuse data that are not what the configuration is written for.

    Raises:
        UserError: Lists the contradictions.
    """
    data = config.data
    encoder = config.autoencoder
    autoencoder = 'pixels' if encoder.name == 'pixels' else encoder.id or encoder.path
    expected: dict[str, Any] = {'autoencoder': autoencoder}
    if data.name == 'latents':
        size = None if data.latent_size is None else (data.latent_size, data.latent_size)
        expected |= {'kind': data.kind, 'channels': data.channels, 'latent_size': size, 'num_classes': data.num_classes}
    check_agreement(manifest, **expected)
    if manifest.mirrored:
        raise UserError(
            f'{data.local}: the data hold a mirrored twin of each image (mirrored: true), which this version does not '
            'read yet; write them without'
        )
    if manifest.latent_height != manifest.latent_width:
        shape = f'{manifest.latent_height} x {manifest.latent_width}'
        raise UserError(f'{data.local}: latents of {shape}; this model takes square ones')


def build_objective(config: Config) -> Objective:
    """The objective of the configuration."""
    settings = config.objective.model_dump(exclude={'name'})
    if config.objective.name == 'edm':
        return objectives.EDM(**settings)
    distribution = settings['time_distribution']
    kinds = {'uniform': timesteps.Uniform, 'logit_normal': timesteps.LogitNormal}
    return objectives.FlowMatching(kinds[distribution.pop('name')](**distribution))


def build_autoencoder(config: Config) -> Autoencoder:
    """The autoencoder of the configuration. Its weights are loaded when it is first used."""
    if config.autoencoder.name == 'pixels':
        return Pixels()
    return KL(**config.autoencoder.model_dump(exclude={'name', 'id'}))


def build_denoiser(config: Config, *, channels: int, latent_size: int, num_classes: int) -> DiT:
    """The network, fitted to the data.

    Raises:
        UserError: The sizes do not fit together.
    """
    try:
        return DiT(
            latent_size=latent_size, in_channels=channels, num_classes=num_classes, **config.model.arguments()
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f'model: {error}') from None


def build_model(config: Config, manifest: Manifest) -> LatentDiffusion:
    """The ``ComposerModel`` for data of this description."""
    denoiser = build_denoiser(
        config,
        channels=manifest.channels,
        latent_size=manifest.latent_height,
        num_classes=manifest.num_classes,
    )
    try:
        return LatentDiffusion(
            denoiser,
            build_objective(config),
            latent_shape=manifest.latent_shape,
            num_classes=manifest.num_classes,
            class_names=manifest.class_names,
            label_dropout=config.label_dropout,
            latent_scale=config.latent_scale,
            latent_shift=config.latent_shift,
            autoencoder=build_autoencoder(config),
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def check_fit(config: Config) -> None:
    """Refuse what cannot work with the data, as far as is known before any are made. Writes nothing.

    Raises:
        UserError: The data contradict the configuration, the model does not fit them, or an epoch would be empty.
    """
    manifest = planned_manifest(config)
    if manifest is None:
        return
    check_expectations(config, manifest)
    with torch.device('meta'):
        build_model(config, manifest)
    if config.global_train_batch_size > manifest.num_samples:
        raise UserError(
            f'global_train_batch_size: {config.global_train_batch_size} is more than the {manifest.num_samples} '
            f'samples of the training data, so an epoch would be empty; take at most {manifest.num_samples}'
        )


_READER_SETTINGS = (
    'cache_limit', 'predownload', 'validate_hash', 'download_retry', 'download_timeout', 'num_canonical_nodes',
)  # fmt: skip
"""Settings of ``data`` that go to the reader as they are; null leaves the reader's default."""


def build_loaders(config: Config, splits: Mapping[str, Manifest]) -> tuple[DataLoader, DataLoader | None]:
    """Training and evaluation batches; Composer's distributed state must be initialised."""
    data, ranks = config.data, dist.get_world_size()
    seed = config.seed if data.shuffle_seed is None else data.shuffle_seed
    common: dict[str, Any] = {'num_workers': data.num_workers}
    names = {'train': 'train', 'eval': 'eval'}
    if data.name == 'latents':
        names = {'train': data.train_split, 'eval': data.eval_split}
        given = {name: getattr(data, name) for name in _READER_SETTINGS}
        common |= {name: value for name, value in given.items() if value is not None}

    def place(split: str) -> dict[str, Any]:
        remote = None if data.name == 'digits' or data.remote is None else f'{data.remote.rstrip("/")}/{names[split]}'
        return {'local': os.path.join(data.local, names[split]), 'remote': remote, **common}

    train = train_loader(batch_size=config.global_train_batch_size // ranks, shuffle_seed=seed, **place('train'))
    if 'eval' not in splits:
        return train, None
    return train, eval_loader(batch_size=config.global_eval_batch_size // ranks, **place('eval'))


def build_trainer(config: Config, splits: Mapping[str, Manifest] | None = None) -> Trainer:
    """Everything, joined. Writes ``config.yaml`` and ``environment.json`` into ``save_folder``.

    Args:
        config: A loaded configuration.
        splits: What ``prepare_data`` returned; it is called if None.

    Raises:
        UserError: Data, checkpoint or run folder contradict the configuration.
    """
    check_run_folder(config)
    splits = prepare_data(config) if splits is None else splits
    # The Trainer seeds too, but only after it was given the model: two runs of one seed must begin with equal weights.
    reproducibility.seed_all(config.seed)
    model = build_model(config, splits['train'])
    train, evaluation = build_loaders(config, splits)
    arguments = config.trainer_arguments()
    # Composer's bar has rate and remaining time; in a log file it would be thousands of lines of escapes.
    bar = arguments.pop('progress_bar')
    contract = {**decisive_settings(config), 'training_data': _identity(splits['train'])}
    if 'composer_ema' in config.algorithms:  # its checkpoints corrupt training on another number of ranks
        contract['ranks'] = dist.get_world_size()
    callbacks: list[Callback] = [KeyedDraws(), EpochIsWhole(), ResumeContract(contract)]
    callbacks += [_build_callback(config, name) for name in config.callbacks]
    loggers = [component.build() for component in config.loggers.values()]
    if bar and not sys.stderr.isatty():
        loggers.append(ProgressLines())
    if config.compile:
        _compile(model.denoiser, arguments)
    trainer = Trainer(
        model=model,
        train_dataloader=train,
        eval_dataloader=None if evaluation is None else Evaluator(label='eval', dataloader=evaluation),
        optimizers=config.optimizer.build(model.parameters()),
        schedulers=config.scheduler.build(),
        algorithms=[component.build() for component in config.algorithms.values()],
        callbacks=callbacks,
        loggers=loggers,
        progress_bar=bar and sys.stderr.isatty(),
        **arguments,
    )
    # Only now: a run that Composer refuses leaves no configuration behind.
    _write_run_files(config)
    for logger in loggers:
        if hasattr(logger, 'log_config'):
            logger.log_config(_flat(config.to_dict()), config.to_yaml())
            if config.save_folder is not None:
                logger.log_file(run_folder(config) / 'environment.json')
    return trainer


# Where our callbacks write if the YAML does not say: within the run's folder.
_FOLDERS = {'sample_grid': 'samples', 'digits_quality': '.'}


def _build_callback(config: Config, name: str) -> Callback:
    component = config.callbacks[name]
    if name in _FOLDERS and 'folder' not in component.kwargs and config.save_folder is not None:
        return component.build(folder=str(run_folder(config) / _FOLDERS[name]))
    return component.build()


def _compile(denoiser: Any, arguments: dict[str, Any]) -> None:
    """One process compiles the whole forward pass. Several cannot: DDP and FSDP break the graph, so each block is."""
    if dist.get_world_size() == 1:
        arguments['compile_config'] = {}
        return
    for block in denoiser.blocks:
        block.compile()


def _write_run_files(config: Config) -> None:
    if config.save_folder is None or dist.get_global_rank() != 0:
        return
    folder = run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'save_folder: {config.save_folder!r} cannot be made: {error}') from None
    write_atomically(folder / 'config.yaml', config.to_yaml().encode())
    write_environment(folder / 'environment.json')


def _flat(tree: Mapping[str, Any], path: str = '') -> dict[str, Any]:
    """Dotted keys, for loggers that take a flat table."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        name = f'{path}{key}'
        rows |= _flat(value, f'{name}.') if isinstance(value, Mapping) else {name: value}
    return rows
