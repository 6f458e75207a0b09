"""Files of other projects: found in them are the weights asked for, under bare names, and whose layout it is.

Layouts: facebookresearch/DiT and willisma/SiT (a flat state dict, or ``model`` and ``ema``), CompVis/tread
(``model_state_dict`` and ``ema_state_dict``), Anima-Lab/MaskDiT (``model`` and ``ema``, with a decoder),
hustvl/LightningDiT (``model``, ``ema`` and ``config``, with gated MLPs).
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.io.checkpoint_reader import read_pickled

__all__ = ['check_trained_as', 'layout_of', 'read_weights']

_LAYOUTS = ('dit', 'sit', 'tread', 'maskdit', 'lightningdit')
_CONTAINERS = {'ema': ('ema', 'ema_state_dict'), 'raw': ('model', 'model_state_dict')}
_SIT = {'path_type': 'Linear', 'prediction': 'velocity'}  # of the choices that SiT trains, those that are flow matching
_ANCHOR = 'x_embedder.proj.weight'  # what stands before it is the prefix that wrappers have given to all names


def read_weights(path: str | os.PathLike[str], weights: str) -> tuple[dict[str, Tensor], str | None, Mapping[str, Any]]:
    """The weights asked for, float32, without the prefixes of wrappers (``model.``, ``module.``, ``_orig_mod.``).

    Args:
        path: ``.safetensors``, or a file of ``torch.save`` (read without running code that it may name).
        weights: ``'ema'`` or ``'raw'``: which of them to take where the file has both. A flat file has one; what it
            is, only its publisher knows.

    Returns:
        The tensors, the key of the file that they were under (None for a flat file), and the arguments of the training
        where the file has them.

    Raises:
        UserError: No such file, a damaged one, or no weights of a diffusion transformer in it.
    """
    path = Path(path)
    content = _read(path)
    names = [name for name in _CONTAINERS[weights] if isinstance(content.get(name), Mapping)]
    containers = [name for keys in _CONTAINERS.values() for name in keys if isinstance(content.get(name), Mapping)]
    if containers and not names:
        raise UserError(f'{path}: holds no {weights} weights, only {", ".join(containers)}; take the other: --weights')
    container = names[0] if names else None  # None: a flat file
    network = content if container is None else content[container]
    anchors = [name for name in network if isinstance(name, str) and name.endswith(_ANCHOR)]
    if len(anchors) != 1:
        raise UserError(
            f'{path}: holds {len(anchors) or "no"} tensors named {_ANCHOR!r}, so it is no diffusion transformer of the '
            f'layouts {", ".join(_LAYOUTS)}. It has: {", ".join(map(str, list(network)[:5]))}'
        )
    # A tensor beside the network would be lost without a word.
    prefix = anchors[0].removesuffix(_ANCHOR)
    foreign = [name for name, value in network.items() if not name.startswith(prefix) or not isinstance(value, Tensor)]
    if foreign:
        raise UserError(f'{path}: {foreign[0]!r} stands beside the network {prefix!r} and is not a tensor of it')
    # Codes of a quantised network would be taken for its weights, and what is imaginary would be lost.
    codes = [name for name, value in network.items() if not value.is_floating_point()]
    if codes:
        kind = str(network[codes[0]].dtype).removeprefix('torch.')
        raise UserError(f'{path}: {codes[0]!r} is {kind}; weights are floating-point numbers. Take a file of those')
    tensors = {name.removeprefix(prefix): value.float() for name, value in network.items()}
    return tensors, container, _settings(content)


def _settings(content: Mapping[Any, Any]) -> Mapping[str, Any]:
    arguments, tree = content.get('args'), content.get('config')
    if isinstance(arguments, argparse.Namespace):
        return vars(arguments)
    if not isinstance(tree, Mapping):
        return {}
    parts = [tree.get(section) for section in ('transport', 'sample')]  # what LightningDiT's file says of the objective
    return {name: value for part in parts if isinstance(part, Mapping) for name, value in part.items()}


def _read(path: Path) -> Mapping[Any, Any]:
    if path.suffix == '.safetensors':
        try:
            return load_file(path)
        except FileNotFoundError:
            raise UserError(f'{path}: there is no such file; give the path of published weights') from None
        except (OSError, SafetensorError) as error:
            raise UserError(f'{path}: no safetensors file, or a damaged one: {error}') from None
    content = read_pickled(path)
    if not isinstance(content, Mapping):
        raise UserError(f'{path}: holds a {type(content).__name__}; weights are a mapping of names to tensors')
    if isinstance(content.get('state'), Mapping):
        raise UserError(f'{path}: a checkpoint of a run of this project needs no import; use it, or export it')
    return content


def layout_of(requested: str, tensors: Mapping[str, Tensor], container: str | None, path: str) -> str:
    """The layout, if the file shows it; the ``requested`` one (or ``'auto'``), if the file does not contradict it.

    Raises:
        UserError: The file does not show it, or is of another layout.
    """
    detected, why = _detected(tensors, container)
    if requested == 'auto':
        if detected is None:
            raise UserError(
                f'{path}: DiT and SiT name their tensors alike, and what their networks predict differs; say which it '
                f'is: --layout dit, or --layout sit'
            )
        return detected
    if requested in _PARTS and detected != requested:
        part, tensor = _PARTS[requested]
        raise UserError(f'{path}: --layout {requested}, but it has no {part} ({tensor} is missing)')
    if detected is not None and detected != requested:
        raise UserError(f'{path}: --layout {requested}, but {why}, as in files of {detected}; take --layout {detected}')
    return requested


# What files of a layout always have, and the others never.
_PARTS = {
    'maskdit': ('decoder', 'decoder_layer.linear.weight'),
    'lightningdit': ('gated MLP', 'blocks.0.mlp.w12.weight'),
}


def _detected(tensors: Mapping[str, Tensor], container: str | None) -> tuple[str | None, str]:
    """The layout that a file shows, and by what."""
    if any(name.startswith('decoder_layer.') for name in tensors):
        return 'maskdit', 'it has a decoder (decoder_layer)'
    if 'blocks.0.mlp.w12.weight' in tensors:
        return 'lightningdit', 'it has gated MLPs (mlp.w12)'
    if (container or '').endswith('_state_dict'):
        return 'tread', f'its weights lie under {container!r}'
    return None, ''


def check_trained_as(layout: str, settings: Mapping[str, Any], path: str) -> None:
    """Refuse a network that predicts something else than networks of this layout are taken to predict.

    Raises:
        UserError: The arguments of its training say so.
    """
    project = {'sit': 'SiT', 'lightningdit': 'LightningDiT'}.get(layout)
    for name, needed in _SIT.items() if project else ():
        value = settings.get(name, needed)
        if value != needed:
            raise UserError(
                f'{path}: was trained with --{name.replace("_", "-")} {value}; of {project}, the path Linear and the '
                'prediction velocity can be imported, whose equation is sampled here. Sample it with the code of '
                f'{project}'
            )
