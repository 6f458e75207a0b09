"""``python -m tread_composer import``: published weights as one of our exported files.

A file of weights says little of itself; what it cannot say is asked of the user, by name and with the reason.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tread_composer.config import Config, restore_config
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import LatentFacts, read_class_names
from tread_composer.io.checkpoint_reader import read_pickled
from tread_composer.routing import Route
from tread_composer.weights.exported import Exported
from tread_composer.weights.foreign.files import check_trained_as, layout_of, read_weights
from tread_composer.weights.foreign.request import ImportRequest
from tread_composer.weights.foreign.translation import Sizes, converted, sizes_of
from tread_composer.weights.trained import write_with_cost

__all__ = ['import_weights']

_OBJECTIVES: dict[str, dict[str, Any]] = {
    # As the projects' own training code has them.
    'sit': {'name': 'flow_matching', 'time_distribution': {'name': 'uniform'}},
    'maskdit': {'name': 'edm'},
    # The direction loss and the times of training, and the shift of those of sampling: all their configurations.
    'lightningdit': {
        'name': 'flow_matching',
        'time_distribution': {'name': 'logit_normal'},
        'direction_weight': 1.0,
        'sampling_shift': 1 / 0.3,  # 0.3 where t = 1 is the data
    },
}


def import_weights(request: ImportRequest) -> dict[str, Any]:
    """Convert a file of DiT, SiT, CompVis/tread, MaskDiT or LightningDiT to one that ``load_trained`` reads.

    Names, the label table, the sign and the direction of time are converted, so that the network predicts what
    this project's objectives expect. Files of SiT and LightningDiT are taken for the linear path and velocity, as
    published; those that say otherwise are refused.

    Returns:
        As ``write_with_cost``, and the ``layout``.

    Raises:
        UserError: Something is missing or contradicts the file.
    """
    source = request.path
    tensors, container, settings = read_weights(source, request.weights)
    layout = layout_of(request.layout, tensors, container, source)
    check_trained_as(layout, settings, source)
    _ask_for_missing(request, layout)
    sizes = sizes_of(tensors, layout, request.num_heads, source)  # and the positions are checked
    _check_route(request, sizes.depth)
    facts = LatentFacts(
        channels=sizes.in_channels,
        latent_height=sizes.latent_size,
        latent_width=sizes.latent_size,
        num_classes=sizes.num_classes,
        class_names=_class_names(str(request.class_names), sizes.num_classes),
        autoencoder=None if request.autoencoder == 'pixels' else request.autoencoder,
        autoencoder_hash=request.autoencoder_hash,
    )
    exported = Exported(
        tensors=converted(tensors, layout, sizes),
        config=_config(Path(source).stem, layout, sizes, request, settings),
        data=facts,
        weights=request.weights,
        batch=request.batch,
        origin=f'imported from {Path(source).name} in the layout of {layout}; of the configuration only model, '
        'objective, latent_scale, latent_shift, autoencoder and algorithms are known, the rest are placeholders',
    )
    return {**write_with_cost(exported, source, request.out, request.overwrite), 'layout': layout}


def _ask_for_missing(request: ImportRequest, layout: str) -> None:
    if request.latent_stats is not None and (request.latent_scale is not None or request.latent_shift):
        raise UserError('--latent-stats: replaces --latent-scale and --latent-shift; leave one side out')
    scale, scale_text = request.latent_scale, 'the factor on raw latents in training; 0.18215 in all four projects'
    if layout == 'lightningdit':
        scale_text = 'the factor on raw latents in training; or --latent-stats latents_stats.pt, as for its VA-VAE'
    required = {
        '--autoencoder': (request.autoencoder, 'which autoencoder made the latents, such as stabilityai/sd-vae-ft-ema'),
        '--latent-scale': (request.latent_stats if scale is None else scale, scale_text),
        '--class-names': (request.class_names, "a file with one name a line or a JSON list, or 'numbers'"),
    }
    if layout == 'tread':
        text = 'CompVis/tread trains both and saves them alike: edm or flow_matching'
        required['--objective'] = (request.objective, text)
    lines = [f'  {option}: {reason}' for option, (value, reason) in required.items() if value is None]
    if lines:
        raise UserError('\n'.join(['import: the file does not say what sampling needs to know; give', *lines]))
    if layout != 'tread' and request.objective is not None:
        raise UserError(f'--objective {request.objective}: the layout {layout} has decided that; leave it out')
    if layout == 'maskdit' and request.route is not None:
        raise UserError('--route: MaskDiT masks tokens and routes none; leave it out')


def _check_route(request: ImportRequest, depth: int) -> None:
    try:
        if request.route is not None:
            Route(*request.route).span(depth)
    except ValueError as error:
        raise UserError(f'--route {",".join(map(str, request.route or ()))}: {error}') from None


def _class_names(source: str, num_classes: int) -> tuple[str, ...]:
    if source == 'numbers':
        return tuple(str(number) for number in range(num_classes))
    names = read_class_names(Path(source), unique=False)
    if len(names) != num_classes:
        raise UserError(
            f'--class-names {source}: {len(names)} names for the {num_classes} classes that the label table shows (its '
            f'last row is the null label)'
        )
    return names


def _latents(request: ImportRequest, channels: int) -> dict[str, Any]:
    """Scale and shift on raw latents: one number each, or one for each channel."""
    if request.latent_stats is None:
        return {'latent_scale': request.latent_scale, 'latent_shift': request.latent_shift}
    stats = read_pickled(Path(request.latent_stats))
    values = [stats.get(name) for name in ('mean', 'std')] if isinstance(stats, Mapping) else []
    tensors = [value for value in values if isinstance(value, Tensor) and value.numel() == channels]
    if len(tensors) < 2:
        raise UserError(
            f"--latent-stats {request.latent_stats}: does not hold 'mean' and 'std' of {channels} channels; it is the "
            'latents_stats.pt of the latents on which the network was trained'
        )
    mean, std = (value.double().flatten() for value in tensors)
    if not (std > 0).all():
        raise UserError(f'--latent-stats {request.latent_stats}: a standard deviation is not above 0')
    return {'latent_scale': std.reciprocal().tolist(), 'latent_shift': mean.tolist()}


def _objective(layout: str, sizes: Sizes, request: ImportRequest, settings: Mapping[str, Any]) -> dict[str, Any]:
    if layout == 'tread':
        return {'name': request.objective}
    if layout == 'dit':
        return {'name': 'ddpm', 'learned_variance': sizes.learn_sigma}
    objective = dict(_OBJECTIVES[layout])
    if layout == 'lightningdit':  # what its training wrote beside the weights
        objective |= {} if settings.get('use_lognorm', True) else {'time_distribution': {'name': 'uniform'}}
        objective['direction_weight'] = float(bool(settings.get('use_cosine_loss', True)))
        shift = settings.get('timestep_shift')
        objective |= {} if shift is None else {'sampling_shift': 1 / shift if shift > 0 else 1.0}
    return objective


def _config(name: str, layout: str, sizes: Sizes, request: ImportRequest, settings: Mapping[str, Any]) -> Config:
    """A configuration of the network and its conventions. What training would need and nobody has said is nominal."""
    model = {
        key: getattr(sizes, key)
        for key in ('patch_size', 'hidden_size', 'depth', 'num_heads', 'mlp_ratio', 'learn_sigma')
    }  # fmt: skip
    if layout in ('sit', 'lightningdit'):
        model['learn_sigma'] = False  # its forward gives the first half of the channels alone
    algorithms: dict[str, Any] = {}
    if sizes.decoder is not None:
        algorithms['maskdit'] = {f'decoder_{key}': value for key, value in sizes.decoder.items()}
    if request.route is not None:
        algorithms['tread'] = dict(zip(('start', 'end', 'selection_rate'), request.route, strict=True))
    autoencoder = {'name': 'pixels'} if request.autoencoder == 'pixels' else {'name': 'kl', 'path': request.autoencoder}
    shape = {'channels': sizes.in_channels, 'latent_size': sizes.latent_size, 'num_classes': sizes.num_classes}
    tree = {
        'run_name': name,
        # Nominal: training on from here needs a configuration of its own.
        'max_duration': '1ba',
        'global_train_batch_size': 1,
        'global_eval_batch_size': 1,
        'data': {'name': 'latents', 'local': 'unknown', **shape},
        'autoencoder': autoencoder,
        'model': {'name': 'lightning_dit' if layout == 'lightningdit' else 'dit', **model, **sizes.more},
        'objective': _objective(layout, sizes, request, settings),
        **_latents(request, sizes.in_channels),
        'optimizer': {'name': 'adamw', 'lr': 0.0},
        'algorithms': algorithms,
    }
    return restore_config(tree, source='import')
