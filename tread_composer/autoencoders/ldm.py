"""Autoencoders stored in one file, with the names of the original latent-diffusion code.

Rombach et al. 2022 (arXiv 2112.10752) released theirs so, and those who trained on that code still do: VA-VAE (Yao et
al. 2025, arXiv 2501.01423) with 16-fold downsampling and 32 channels, the f8 and f16 autoencoders of many papers. The
file says nothing about its architecture, so it is read off the tensors: levels, widths, blocks, where attention stands.
The weights then live in diffusers' ``AutoencoderKL``, so ``weight_hash`` is the same as that of a converted folder.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tread_composer.autoencoders.folder import network_class
from tread_composer.autoencoders.pretrained import refuse_misfits
from tread_composer.core.errors import UserError

__all__ = ['ldm_network']

_GROUPS = 32  # of every group norm: the one number that no tensor shows, and a constant in that code
_ANCHOR = 'encoder.conv_in.weight'  # what stands before it is the prefix of the whole autoencoder
# Losses, and the feature network with its projection that VA-VAE is aligned with: used in its training only.
_TRAINING_ONLY = ('loss.', 'discriminator.', 'foundation_model.', 'linear_proj.')


def ldm_network(tensors: Mapping[str, Tensor], path: str) -> Any:
    """The ``AutoencoderKL`` of the tensors of a file, which may stand behind a prefix such as ``first_stage_model.``.

    Raises:
        UserError: Other contents, or a tensor that is missing, left over or of another shape than the rest asks for;
            names it.
    """
    tensors = _own_tensors(tensors, path)
    with torch.device('meta'):  # the weights are in memory already
        network = network_class('AutoencoderKL', path)(**_architecture(tensors, path))
    levels = len(network.config.block_out_channels)
    empty = network.state_dict()
    names = {name: _original_name(name, levels) for name in empty}
    shapes = {names[name]: value.shape for name, value in empty.items()}
    # Attention was written as convolutions of size 1, which are the linear layers that diffusers has.
    linear = [name for name, shape in shapes.items() if name in tensors and tensors[name].shape == (*shape, 1, 1)]
    tensors |= {name: tensors[name].reshape(shapes[name]) for name in linear}
    fault = f'autoencoder {path!r}: not an autoencoder of the latent-diffusion layout with Gaussian latents'
    refuse_misfits(tensors, shapes, fault)
    weights = {name: tensors[names[name]].float() for name in empty}
    network.load_state_dict(weights, assign=True)
    return network


def _own_tensors(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The autoencoder's tensors without their prefix, and without the parts that only its training needs."""
    prefixes = [name.removesuffix(_ANCHOR) for name in tensors if name == _ANCHOR or name.endswith(f'.{_ANCHOR}')]
    if any('encoder.down_blocks.' in name for name in tensors):
        raise UserError(
            f'autoencoder {path!r}: a file of diffusers, whose architecture its config.json says; give the folder that '
            f'holds both (the weights under the name diffusion_pytorch_model.safetensors)'
        )
    if len(prefixes) != 1:
        raise UserError(
            f'autoencoder {path!r}: {len(prefixes)} tensors are named {_ANCHOR} (behind any prefix); a file of the '
            f'latent-diffusion layout has one. A folder of diffusers is given as a folder'
        )
    (prefix,) = prefixes
    # Behind a prefix the autoencoder is one part of a larger model, and the other parts are not its own.
    bare = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return {name: value for name, value in bare.items() if not name.startswith(_TRAINING_ONLY)}


def _architecture(tensors: Mapping[str, Tensor], path: str) -> dict[str, Any]:
    """Arguments of diffusers' ``AutoencoderKL``, from names and shapes."""

    def shape(name: str) -> torch.Size:
        if name not in tensors or tensors[name].ndim != 4:  # all that are asked for are convolutions
            state = 'missing' if name not in tensors else f'{list(tensors[name].shape)}, no convolution'
            raise UserError(f'autoencoder {path!r}: {name} is {state}, without which its architecture is unknown')
        return tensors[name].shape

    def count(pattern: str) -> int:
        return len({match.group(1) for name in tensors if (match := re.match(pattern, name))})

    levels = count(r'encoder\.down\.(\d+)\.block\.')
    widths = [shape(f'encoder.down.{level}.block.0.conv1.weight')[0] for level in range(levels)]
    if not widths or any(width % _GROUPS or not width for width in widths):
        raise UserError(
            f'autoencoder {path!r}: levels with {widths or "no"} channels; the layout normalises {_GROUPS} groups of '
            f'them, so each must be a multiple of {_GROUPS}'
        )

    def attends(part: str) -> bool:
        return any(name.startswith(part) for name in tensors)

    down = [f'{"Attn" * attends(f"encoder.down.{level}.attn.")}DownEncoderBlock2D' for level in range(levels)]
    up = [f'{"Attn" * attends(f"decoder.up.{level}.attn.")}UpDecoderBlock2D' for level in range(levels)]
    return {
        'in_channels': shape(_ANCHOR)[1],
        'out_channels': shape('decoder.conv_out.weight')[0],
        'latent_channels': shape('decoder.conv_in.weight')[1],
        'block_out_channels': widths,
        'layers_per_block': count(r'encoder\.down\.0\.block\.(\d+)\.'),
        'down_block_types': down,
        'up_block_types': up[::-1],
        'mid_block_add_attention': attends('encoder.mid.attn_1.'),
        'use_quant_conv': 'quant_conv.weight' in tensors,
        'use_post_quant_conv': 'post_quant_conv.weight' in tensors,
        'norm_num_groups': _GROUPS,
    }


_RENAMED = [
    (r'\.resnets\.', '.block.'),
    (r'\.attentions\.', '.attn.'),
    (r'\.(down|up)samplers\.0\.', r'.\1sample.'),
    (r'\.conv_shortcut\.', '.nin_shortcut.'),
    (r'\.group_norm\.', '.norm.'),
    (r'\.to_([qkv])\.', r'.\1.'),
    (r'\.to_out\.0\.', '.proj_out.'),
    (r'\.conv_norm_out\.', '.norm_out.'),
]


def _original_name(name: str, levels: int) -> str:
    """The layout's name for a tensor of diffusers. Its ``up.0`` is the level of the pixels, there the last block."""
    name = re.sub(r'\.mid_block\.resnets\.(\d)', lambda match: f'.mid.block_{int(match[1]) + 1}', name)
    name = re.sub(r'\.mid_block\.attentions\.0', '.mid.attn_1', name)
    name = re.sub(r'\.down_blocks\.(\d+)', r'.down.\1', name)
    name = re.sub(r'\.up_blocks\.(\d+)', lambda match: f'.up.{levels - 1 - int(match[1])}', name)
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name
