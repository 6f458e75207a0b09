"""From a resolved configuration to objects, up to the Composer ``Trainer``. The only file that knows all parts."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from composer import Algorithm, Callback, Evaluator, Trainer
from composer.utils import dist, get_device, reproducibility
from torch.utils.data import DataLoader

from tread_composer import objectives
from tread_composer.autoencoders import KL, Pixels, open_autoencoder
from tread_composer.callbacks.epoch_is_whole import EpochIsWhole
from tread_composer.callbacks.keyed_draws import KeyedDraws
from tread_composer.callbacks.progress import ProgressLines
from tread_composer.callbacks.resume_contract import ResumeContract
from tread_composer.config import Config
from tread_composer.config.attention import attention_dtypes
from tread_composer.config.components import component_class
from tread_composer.data.facts import LatentFacts
from tread_composer.data.loaders import eval_loader, train_loader
from tread_composer.data.manifest import Manifest
from tread_composer.errors import UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import LatentTransformer
from tread_composer.objectives import timesteps
from tread_composer.protocols import Autoencoder, Objective
from tread_composer.run_data import check_expectations, identity, planned_manifest, prepare_data
from tread_composer.run_folder import check_run_folder, decisive_settings, run_folder, write_run_files

__all__ = [
    'build_autoencoder',
    'build_denoiser',
    'build_loaders',
    'build_model',
    'build_objective',
    'build_trainer',
    'check_fit',
    'compile_blocks',
]


def build_objective(config: Config) -> Objective:
    """The objective of the configuration."""
    settings = config.objective.model_dump(exclude={'name'})
    if config.objective.name == 'edm':
        return objectives.EDM(**settings)
    weighting = config.objective.weighting
    settings['weighting'] = None if weighting is None else objectives.MinSNR(weighting.gamma)
    if config.objective.name == 'ddpm':
        return objectives.DDPM(**settings)
    distribution, shift = settings.pop('time_distribution'), settings.pop('time_shift')
    times = _TIMES[distribution.pop('name')](**distribution)
    return objectives.FlowMatching(times if shift == 1 else timesteps.Shifted(times, shift), **settings)


_TIMES = {
    'uniform': timesteps.Uniform,
    'logit_normal': timesteps.LogitNormal,
    'mode': timesteps.Mode,
    'cosmap': timesteps.CosMap,
}


def build_autoencoder(config: Config, manifest: Manifest | LatentFacts | None = None) -> Autoencoder:
    """The autoencoder of the configuration. Its weights are loaded, and held against the data's, when first used."""
    if config.autoencoder.name == 'pixels':
        return Pixels()
    settings = config.autoencoder
    autoencoder = open_autoencoder(settings.path, subfolder=settings.subfolder, revision=settings.revision)
    if manifest is not None and not settings.other_weights:
        autoencoder.expected_hash = manifest.autoencoder_hash
    return autoencoder


def build_denoiser(config: Config, *, channels: int, latent_size: int, num_classes: int) -> LatentTransformer:
    """The network, fitted to the data.

    Raises:
        UserError: The sizes do not fit together.
    """
    try:
        return config.model.backbone(
            latent_size=latent_size, in_channels=channels, num_classes=num_classes, **config.model.arguments()
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f'model: {error}') from None


def build_model(config: Config, manifest: Manifest | LatentFacts, *, unfilled: bool = False) -> LatentDiffusion:
    """The ``ComposerModel`` for data of this description, with the parts that the run's algorithms add to it.

    Args:
        config: The configuration.
        manifest: Of the training data.
        unfilled: Leave the network's weights on the meta device, for ``load_state_dict(..., assign=True)``: to draw
            those of a large network takes longer than to read them.
    """
    config = config.normalized(manifest.mean, manifest.std)
    with torch.device('meta') if unfilled else contextlib.nullcontext():
        denoiser = build_denoiser(
            config,
            channels=manifest.channels,
            latent_size=manifest.latent_height,
            num_classes=manifest.num_classes,
        )
    try:
        model = LatentDiffusion(
            denoiser,
            build_objective(config),
            latent_shape=manifest.latent_shape,
            num_classes=manifest.num_classes,
            class_names=manifest.class_names,
            label_dropout=config.label_dropout,
            latent_scale=config.latent_scale,
            latent_shift=config.latent_shift,
            autoencoder=build_autoencoder(config, manifest),
        )
        # What an algorithm adds to the model is there before the optimizer and the compilation of its blocks.
        for name, component in config.algorithms.items():
            if hasattr(component_class('algorithm', name), 'prepare'):
                _prepare(name, component.build(), model, config.seed)
        return model
    except ValueError as error:
        raise UserError(str(error)) from None


def _prepare(name: str, algorithm: Any, model: LatentDiffusion, seed: int) -> None:
    try:
        algorithm.prepare(model, seed)
    except ValueError as error:
        raise UserError(f'algorithms.{name}: {error}') from None


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
    training: dict[str, Any] = {'shuffle_seed': seed}
    names = {'train': 'train', 'eval': 'eval'}
    if data.name == 'latents':
        if data.num_workers is None:
            common['num_workers'] = 8 if data.remote else 2  # local shards need workers only where the disk is slow
        if data.in_memory:
            training |= {'in_memory': True, 'num_workers': 0}
        if splits['train'].mirrored and data.mirror is not False:
            training['mirror_seed'] = config.seed
        names = {'train': data.train_split, 'eval': data.eval_split}
        given = {name: getattr(data, name) for name in _READER_SETTINGS}
        common |= {name: value for name, value in given.items() if value is not None}

    def place(split: str) -> dict[str, Any]:
        remote = None if data.name == 'digits' or data.remote is None else f'{data.remote.rstrip("/")}/{names[split]}'
        return {'local': os.path.join(data.local, names[split]), 'remote': remote, **common}

    train = train_loader(batch_size=config.global_train_batch_size // ranks, **place('train') | training)
    if 'eval' not in splits:
        return train, None
    return train, eval_loader(batch_size=config.global_eval_batch_size // ranks, **place('eval'))


def build_trainer(config: Config, splits: Mapping[str, Manifest] | None = None) -> Trainer:
    """Everything, joined. Writes ``config.yaml``, ``data.json`` and ``environment.json`` into ``save_folder``.

    Args:
        config: A loaded configuration.
        splits: What ``prepare_data`` returned; it is called if None.

    Raises:
        UserError: Data, checkpoint or run folder contradict the configuration.
    """
    check_run_folder(config)
    splits = prepare_data(config) if splits is None else splits
    if config.latent_normalization is not None:
        config = config.normalized(splits['train'].mean, splits['train'].std)
        check_run_folder(config)
    # The Trainer seeds too, but only after it was given the model: two runs of one seed must begin with equal weights.
    reproducibility.seed_all(config.seed)
    model = build_model(config, splits['train'])
    _choose_attention(config, model.denoiser)
    train, evaluation = build_loaders(config, splits)
    arguments = config.trainer_arguments()
    # Composer's bar has rate and remaining time; in a log file it would be thousands of lines of escapes.
    bar = arguments.pop('progress_bar')
    contract = {**decisive_settings(config), 'training_data': identity(splits['train'])}
    if 'composer_ema' in config.algorithms:  # its checkpoints corrupt training on another number of ranks
        contract['ranks'] = dist.get_world_size()
    callbacks: list[Callback] = [KeyedDraws(), EpochIsWhole(), ResumeContract(contract)]
    callbacks += [_build_callback(config, name) for name in config.callbacks]
    if isinstance(model.autoencoder, KL) and any(hasattr(callback, 'sampling') for callback in callbacks):
        _ = model.autoencoder.network  # they decode: weights that are not there or not the data's are refused now
    loggers = [component.build() for component in config.loggers.values()]
    if bar and not sys.stderr.isatty():
        loggers.append(ProgressLines())
    if config.compile and dist.get_world_size() == 1:
        arguments['compile_config'] = {}
    elif config.compile:
        compile_blocks(model.denoiser)
    with _misfit_in_words(config):
        trainer = Trainer(
            model=model,
            train_dataloader=train,
            eval_dataloader=None if evaluation is None else Evaluator(label='eval', dataloader=evaluation),
            optimizers=config.optimizer.build(model.parameters()),
            schedulers=config.scheduler.build(),
            algorithms=[_build_algorithm(config, name, contract) for name in config.algorithms],
            callbacks=callbacks,
            loggers=loggers,
            progress_bar=bar and sys.stderr.isatty(),
            **arguments,
        )
    # Only now: a run that Composer refuses leaves no configuration behind.
    write_run_files(config, splits['train'])
    for logger in loggers:
        if hasattr(logger, 'log_config'):
            logger.log_config(_flat(config.to_dict()), config.to_yaml())
            if config.save_folder is not None:
                logger.log_file(run_folder(config) / 'environment.json')
    return trainer


def _choose_attention(config: Config, denoiser: Any) -> None:
    """``model.attention`` on the device of this rank, with a line that says what runs where it is not torch's own."""
    name = getattr(config.model, 'attention', 'sdpa')
    if name == 'sdpa':
        return
    on_gpu = get_device(config.device).name == 'gpu'
    device = torch.device('cuda', dist.get_local_rank()) if on_gpu else torch.device('cpu')
    try:
        line = denoiser.use_attention(name, device, dtypes=attention_dtypes(config, device))
    except UserError as error:
        raise UserError(f'model.attention: {error}') from None
    if dist.get_global_rank() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def _misfit_in_words(config: Config) -> Iterator[None]:
    """Weights of another network are the user's to exchange: a message, not a traceback."""
    try:
        yield
    except RuntimeError as error:
        if config.load_path is None or 'loading state_dict' not in str(error):
            raise
        raise UserError(
            f'load_path: the weights in {config.load_path!r} do not fit the model of this run. Give it the model '
            f'section and the algorithms that change the network (maskdit) of the run that saved them.\n{error}'
        ) from None


# Where ours write if the YAML does not say: within the run's folder.
_FOLDERS = {'sample_grid': 'samples', 'digits_quality': '.', 'evaluation': '.', 'power_ema': 'snapshots'}


def _build_algorithm(config: Config, name: str, contract: Mapping[str, Any]) -> Algorithm:
    component, given = config.algorithms[name], {}
    if name == 'power_ema':
        text = json.dumps(contract, sort_keys=True, default=str)
        given['settings_digest'] = f'sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}'
    if name in _FOLDERS and 'folder' not in component.kwargs and config.save_folder is not None:
        given['folder'] = str(run_folder(config) / _FOLDERS[name])
    return component.build(**given)


def _build_callback(config: Config, name: str) -> Callback:
    component = config.callbacks[name]
    if name in _FOLDERS and 'folder' not in component.kwargs and config.save_folder is not None:
        return component.build(folder=str(run_folder(config) / _FOLDERS[name]))
    return component.build()


def compile_blocks(denoiser: Any, **how: Any) -> None:
    """Compile each block of a network in place: parameters and their names stay as they are.

    For several processes, whose DDP and FSDP break a graph of the whole forward pass.

    Args:
        denoiser: A backbone of ours; what its ``fsdp_wrap_fn`` says FSDP is to gather at once is a block.
        how: Settings of ``torch.compile``.
    """
    for module in denoiser.modules():
        if denoiser.fsdp_wrap_fn(module):
            module.compile(**how)


def _flat(tree: Mapping[str, Any], path: str = '') -> dict[str, Any]:
    """Dotted keys, for loggers that take a flat table."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        name = f'{path}{key}'
        rows |= _flat(value, f'{name}.') if isinstance(value, Mapping) else {name: value}
    return rows
