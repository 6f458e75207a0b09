"""``load_trained``: a trained model, ready to sample, from whatever a user may name; and its weights into one file.

The one door for the commands that use weights (sample, evaluate, export, ...).
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tread_composer.algorithms.power_ema.snapshots import posthoc_width
from tread_composer.builders.cost import sampling_cost
from tread_composer.builders.model import build_model
from tread_composer.builders.run_folder import DATA_NAME, part_folder
from tread_composer.config import Config, restore_config
from tread_composer.core.errors import ResumeError, UserError, first_line
from tread_composer.data.manifest import LatentFacts, Manifest
from tread_composer.io.checkpoint_reader import read_checkpoint
from tread_composer.io.checkpoints import check_whole, find_checkpoint
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.samplers import SamplingSettings
from tread_composer.weights.exported import Exported, WeightFacts, digest_of, read_exported, write_exported

__all__ = [
    'checkpoint_weights', 'export_in_words', 'image_size', 'load_trained', 'model_of', 'read_trained', 'Trained',
    'weights_name', 'write_with_cost',
]  # fmt: skip

_NETWORK = 'denoiser.'  # where a LatentDiffusion has it
_MISFIT_CHARACTERS = 1500  # torch names each tensor of a network that is another one


@dataclass(frozen=True, kw_only=True)
class Trained(WeightFacts):
    """A trained model and what is known of it."""

    model: LatentDiffusion  # in evaluation mode, on the device asked for; its autoencoder is loaded when first used
    source: str  # what the user named
    digest: str  # of the network's weights, see `digest_of`
    attention: str  # a line that says which implementation of it runs

    def prepare_for(self, sampling: SamplingSettings) -> None:
        """Make the network ready for this guidance; ``UserError`` if it was not trained with what that needs."""
        if sampling.provider is None:
            return
        denoiser, config = self.model.denoiser, self.config
        try:
            sampling.provider.prepare(denoiser, routes=config.routes(), always_keep=config.always_keep())
        except ValueError as error:
            raise UserError(f'{self.source}: {error}') from None


def load_trained(
    path: str | os.PathLike[str],
    *,
    weights: str = 'ema',
    device: str | torch.device = 'cpu',
    overrides: Mapping[str, Any] | None = None,
) -> Trained:
    """A trained model.

    Args:
        path: A run's folder (its latest checkpoint is taken), a checkpoint in one, or an exported ``.safetensors``.
        weights: ``'ema'``, ``'raw'``, or of a run with ``algorithms.power_ema`` ``'posthoc:0.13'``, its average of
            this width up to its last snapshot. Of an exported file that holds a post-hoc average, ``'ema'`` is that.
        overrides: Dotted keys of the run's configuration and their values, for what is elsewhere or otherwise now,
            such as ``{'autoencoder.path': '/other/place'}``. ``model.attention`` is ``sdpa`` unless it stands here.

    Raises:
        UserError: There is no such file, it has not these weights, or it contradicts its configuration.
    """
    exported = read_trained(path, weights=weights, overrides=overrides)
    model = model_of(exported, str(path))
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'device {device}: cannot be used here: {first_line(error)}') from None
    denoiser: Any = model.denoiser
    # A network of another package has its own; a setting `attention` is refused there like any that it does not have.
    attention = f"attention: {type(denoiser).__name__}'s own"
    if hasattr(denoiser, 'use_attention'):
        # Not that of the training: an exported file goes anywhere.
        name = (overrides or {}).get('model.attention', 'sdpa')
        attention = denoiser.use_attention(name, torch.device(device), training=False)
    facts = {name: getattr(exported, name) for name in WeightFacts.__dataclass_fields__}
    return Trained(model=model, source=str(path), digest=digest_of(exported.tensors), attention=attention, **facts)


def read_trained(
    path: str | os.PathLike[str],
    *,
    weights: str = 'ema',
    overrides: Mapping[str, Any] | None = None,
    allow_inexact: bool = False,
) -> Exported:
    """Weights and facts of what ``load_trained`` loads, without the model; ``allow_inexact`` as ``reconstruct``."""
    weights = weights_name(weights)
    # JSON is YAML: a text with a colon or a number in it stays a text.
    path, texts = Path(path), [f'{key}={json.dumps(value)}' for key, value in (overrides or {}).items()]
    if path.suffix == '.safetensors':
        exported = read_exported(path, texts)
        # `ema` is the default of all commands, and takes a post-hoc average too.
        if exported.weights != weights and (weights != 'ema' or exported.average is None):
            raise UserError(
                f'{path}: holds the {exported.weights} weights alone; take weights={exported.weights}, or export the '
                f'run again with --weights {weights}'
            )
        return exported
    if not path.exists():
        raise UserError(f'{path}: there is no such file; give a run folder, a checkpoint or an exported .safetensors')
    file = find_checkpoint(path) if path.is_dir() else check_whole(path)
    settings = file.parent / 'config.yaml'
    if not settings.is_file():
        raise UserError(
            f'{file.parent}: no config.yaml beside the checkpoint, which says what the weights are of; copy it there '
            f"from the run's folder. Weights of another project: python -m tread_composer import"
        )
    config, state = restore_config(settings), read_checkpoint(file)
    # Runs of earlier versions have none.
    contract = state.get('callbacks', {}).get('ResumeContract', {}).get('settings', {})
    _check_config(config, contract, file)  # without overrides: these may differ
    facts: dict[str, Any] = {
        'data': LatentFacts.of(_manifest(file.parent)),
        'config': restore_config(settings, texts) if texts else config,
        'weights': weights,
        'origin': f'run {config.run_name}, {file.resolve().name}',
    }
    width = posthoc_width(weights)
    if width is None:
        tensors = checkpoint_weights(state, weights, str(file))
        return Exported(tensors=tensors, batch=int(state['timestamp']['Timestamp']['batch']), **facts)
    average = _average_afterwards(state, config, file, width, allow_inexact)
    tensors = averaged_weights(state, average.tensors, str(file.parent))
    return Exported(tensors=tensors, batch=average.facts['batch'], average=average.facts, **facts)


def weights_name(weights: str) -> str:
    """``'ema'``, ``'raw'`` or ``'posthoc:0.13'`` in one spelling, also of ``'posthoc:0.130'``; else ``UserError``."""
    width = posthoc_width(weights)
    if weights not in ('ema', 'raw') and width is None:
        raise UserError(f"weights: {weights!r} is not 'ema' or 'raw', nor of the form 'posthoc:0.13'")
    return weights if width is None else f'posthoc:{width}'


def model_of(exported: Exported, source: str) -> LatentDiffusion:
    """The model of these weights, whose tensors it takes over as they are: on the CPU, in evaluation mode.

    Raises:
        UserError: The weights do not fit the model; names what is missing, unknown or of another shape.
    """
    model = build_model(exported.config, exported.data, unfilled=True)  # no second copy in memory
    try:
        model.denoiser.load_state_dict(dict(exported.tensors), assign=True)
    except RuntimeError as error:
        text = f'{source}: the weights do not fit the model that its configuration describes'
        raise UserError(f'{text}: {str(error)[:_MISFIT_CHARACTERS]}') from None
    return model.eval()


def image_size(model: LatentDiffusion) -> int:
    """The side of its images in pixels, found by decoding one."""
    return model.decode(torch.zeros(1, *model.latent_shape, device=model.latent_scale.device)).shape[-1]


def checkpoint_weights(state: Mapping[str, Any], weights: str, source: str) -> dict[str, Tensor]:
    """Weights of the network (``'ema'`` or ``'raw'``), float32, under its own names.

    ``state`` is what ``read_checkpoint`` gives of the file or folder ``source``.

    Raises:
        UserError: The checkpoint does not have these weights.
    """
    raw = _network_part(state['model'])
    if not raw:
        raise UserError(f'{source}: its model has no {_NETWORK[:-1]}, so it is not a LatentDiffusion of this project')
    average = dict(state.get('algorithms', {})).get('EMA')
    if average is not None and 'average' not in average:  # Composer's own: `ema_weights_active` says which is which
        present = 'ema' if average.get('ema_weights_active') else 'raw'
        if weights != present:
            raise UserError(
                f"{source}: Composer's EMA has put its {'averaged' if present == 'ema' else 'raw'} weights into this "
                f'checkpoint in place of the others; take weights={present!r}, or train with algorithms.ema'
            )
        return raw
    if weights == 'raw':
        return raw
    if average is None or average['average'] is None:
        raise UserError(
            f'{source}: holds no averaged weights (the run had no algorithms.ema); take the raw ones: weights=raw'
        )
    return averaged_weights(state, average['average'], source)


def averaged_weights(state: Mapping[str, Any], average: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of the network from an average under the model's names; what is not averaged from the checkpoint."""
    raw, averaged = _network_part(state['model']), _network_part(average)
    foreign = averaged.keys() - raw.keys()
    if foreign:
        raise UserError(f'{source}: averages parameters that the model has not, such as {sorted(foreign)[0]!r}')
    return raw | averaged  # what is not trained (positions) is not averaged


def _network_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        # A copy: the file may be overwritten by the run while the weights are in use.
        name.removeprefix(_NETWORK): value.to(torch.float32, copy=True)
        for name, value in state_dict.items()
        if name.startswith(_NETWORK)
    }


def write_with_cost(exported: Exported, source: str, out: str | os.PathLike[str], overwrite: bool) -> dict[str, Any]:
    """Write weights, which come from ``source``, to one file that ``load_trained`` reads back to the bit.

    Returns:
        ``out``, ``weights``, ``batch``, ``digest``, ``average`` (see ``WeightFacts``), and of one network call in
        sampling ``parameters`` and ``gmacs``.

    Raises:
        UserError: Weights and facts make no model, or the file is there already or cannot be written.
    """
    model_of(exported, source)  # refused here: not when the file is used
    # A fresh one: what was filled has weights, and shapes are enough.
    with torch.device('meta'):
        denoiser = build_model(exported.config, exported.data).denoiser
    cost = sampling_cost(denoiser, exported.data.sizes)
    texts = {'parameters': str(cost['parameters']), 'gmacs': f'{cost["gmacs"]:.6g}'}
    digest = write_exported(out, exported, texts, overwrite)
    facts = {'weights': exported.weights, 'batch': exported.batch, 'average': exported.average}
    return {'out': str(out), **facts, 'digest': digest, **cost}


def export_in_words(result: dict[str, Any]) -> str:
    """What was written, for a terminal."""
    batch = f'after {result["batch"]:,} batches' if result['batch'] else 'after an unknown number of batches'
    size = Path(result['out']).stat().st_size / 1e6
    average = result['average']
    lines = [
        f'written   {result["out"]} ({size:.1f} MB): the {result["weights"]} weights {batch}',
        f'sampling  {result["parameters"]:,} parameters, {result["gmacs"]:.4g} GMACs per network call (one image, no '
        'guidance)',
        f'digest    {result["digest"]}',
    ]
    if average is not None:
        lines.append(
            f'average   width {average["sigma_rel"]:g} of the run (gamma {average["gamma"]:.2f}) from '
            f'{average["snapshots"]} snapshots of batches {average["first"]:,} to {average["last"]:,}; its profile is '
            f'within {average["residual"]:.1%} of the wanted one'
        )
    return '\n'.join(lines)


def _average_afterwards(state: Mapping[str, Any], config: Config, file: Path, width: float, allow_inexact: bool) -> Any:
    """What the algorithm that keeps averages makes of this width (``AlgorithmFacts.average_afterwards``)."""
    saved_parts = dict(state.get('algorithms', {}))
    for part in config.algorithms.values():
        # Composer keeps the state of an algorithm under the name of its class.
        saved = saved_parts.get(type(part.instance).__qualname__)
        if saved is not None and hasattr(part.instance, 'average_afterwards'):
            folder = part_folder(part, file.parent, config.run_name)
            return part.instance.average_afterwards(saved, folder, width, allow_inexact=allow_inexact)
    raise UserError(
        f'{file}: the run kept no averages to choose from afterwards; train with algorithms.power_ema, or take '
        f'weights=ema or raw'
    )


def _check_config(config: Config, contract: Mapping[str, Any], file: Path) -> None:
    """The configuration in the folder must be the one that the checkpoint was trained with."""
    names = ('model', 'objective', 'latent_scale', 'latent_shift')
    saved = {name: contract[name] for name in names if name in contract}
    current = _of_these(config.to_dict(), saved)
    if saved != current:
        remedy = f'Put back the config.yaml that {file.name} was trained with.'
        raise ResumeError.from_differences(f'{file.parent / "config.yaml"}', saved, current, remedy)


def _of_these(tree: Any, saved: Any) -> Any:
    """What a newer version has as a setting had its default before: only what the checkpoint knows is compared."""
    if not isinstance(tree, Mapping) or not isinstance(saved, Mapping):
        return tree
    return {name: _of_these(tree[name], value) for name, value in saved.items() if name in tree}


def _manifest(folder: Path) -> Manifest:
    path = folder / DATA_NAME
    if not path.exists():
        raise UserError(
            f"{path}: there is no such file, which says what the run was trained on; copy it from the run's folder"
        )
    return Manifest.parse(path.read_bytes(), str(path), 'Put back the file that the run has written')
