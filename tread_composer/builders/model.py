"""From a resolved configuration to the model that Composer trains."""

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch

from tread_composer.autoencoders import Pretrained
from tread_composer.builders.run_data import check_batch_size, check_expectations, planned_manifest
from tread_composer.config import Config
from tread_composer.config.registry import resolve
from tread_composer.config.tree import backbone_arguments
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import LatentFacts, Manifest
from tread_composer.latent_diffusion import LatentDiffusion

__all__ = ['build_denoiser', 'build_model', 'check_fit']


def build_denoiser(config: Config, *, channels: int, latent_size: int, num_classes: int) -> Any:
    """The network, fitted to the data: a ``core.protocols.Backbone``; ``UserError`` if the sizes do not fit."""
    try:
        sizes = {'latent_size': latent_size, 'in_channels': channels, 'num_classes': num_classes}
        denoiser = resolve('backbone', config.model.name)(**sizes, **backbone_arguments(config.model))
    except ValueError as error:
        raise UserError(f'model: {error}') from None
    # Of another package: its class cannot show what its constructor sets.
    if not isinstance(getattr(denoiser, 'num_tokens', None), int):
        raise UserError(
            f'model.name: {config.model.name} has no attribute num_tokens, the number of tokens that its blocks '
            f'see for one image (tread_composer.core.protocols.Backbone)'
        )
    return denoiser


def build_model(
    config: Config,
    manifest: Manifest | LatentFacts,
    *,
    unfilled: bool = False,
    algorithms: Mapping[str, Any] | None = None,
) -> LatentDiffusion:
    """The ``ComposerModel`` for data of this description, with what the run's algorithms add; ``UserError`` if unfit.

    Args:
        unfilled: Leave the network's weights on the meta device, for ``load_state_dict(..., assign=True)``: to draw
            those of a large network takes longer than to read them.
        algorithms: Those that will train it, by their names in the configuration. If None, copies of them add their
            parts: a model that is only looked at leaves no trace in what trains another.
    """
    config = config.normalized(manifest)
    with torch.device('meta') if unfilled else contextlib.nullcontext():
        denoiser = build_denoiser(config, **manifest.sizes)
    place = ''  # of the fault, if there is one
    try:
        # Of its own for each model: one that is shared has been held against the data of another. And never on the meta
        # device, for a constructor may compute.
        with torch.device('cpu'):
            autoencoder = config.autoencoder.build()
        if isinstance(autoencoder, Pretrained) and not autoencoder.other_weights:
            autoencoder.expected_hash = manifest.autoencoder_hash  # its weights are loaded when first used
        model = LatentDiffusion(
            denoiser,
            config.objective.instance,
            latent_shape=manifest.latent_shape,
            num_classes=manifest.num_classes,
            class_names=manifest.class_names,
            label_dropout=config.label_dropout,
            latent_scale=config.latent_scale,  # type: ignore[arg-type] - numbers by now
            latent_shift=config.latent_shift,
            autoencoder=autoencoder,
        )
        # What an algorithm adds to the model is there before the optimizer and the compilation of its blocks.
        for name, component in config.algorithms.items():
            place = f'algorithms.{name}: '
            if hasattr(component.instance, 'prepare'):
                algorithm = copy.deepcopy(component.instance) if algorithms is None else algorithms[name]
                algorithm.prepare(model, config.seed)
        return model
    except ValueError as error:
        raise UserError(f'{place}{error}') from None


def check_fit(config: Config) -> None:
    """Refuse what cannot work with the data, as far as is known before any are made. Writes nothing."""
    manifest = planned_manifest(config)
    if manifest is None:
        return
    check_expectations(config, manifest)  # before the model: what the data are decides its sizes
    with torch.device('meta'):
        model = build_model(config, manifest)
    depth, num_tokens = config.depth(), getattr(model.denoiser, 'num_tokens', None)
    for name, part in config.algorithms.items():
        tokens_per_block = getattr(part.instance, 'tokens_per_block', None)
        if tokens_per_block is not None and depth is not None and num_tokens is not None:
            try:
                tokens_per_block(depth, num_tokens)
            except ValueError as error:
                raise UserError(f'algorithms.{name}: {error}') from None
    check_batch_size(config, manifest)
