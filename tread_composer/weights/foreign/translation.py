"""Tensors of other projects to those of our network: other names, other orders, other meanings of time.

Shapes: D width, E width of MaskDiT's decoder, N tokens, C latent channels, p patch size, K classes.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.models import DiT, LightningDiT, without_sigma
from tread_composer.models.base import LatentTransformer
from tread_composer.models.layers import sincos_positions
from tread_composer.models.lightning_dit import rotary_table

__all__ = ['Sizes', 'converted', 'sizes_of']

ROTARY_TABLE = 'feat_rope.'
"""What the names of its stored rotary table begin with."""

_MODULATION = 'blocks.0.adaLN_modulation.1.weight'
_QUERY_NORM = 'blocks.0.attn.q_norm'
_TOLERANCE = 1e-4  # of stored sines and cosines: other ways to compute them differ by 1e-6, another table by 1

_MAX_PERIOD = 10000.0
_TIME_WEIGHT = 't_embedder.mlp.0.weight'
_SINUSOID = 256  # its inputs, in all layouts


@dataclass(frozen=True)
class Sizes:
    """What the tensors say of the network; ``decoder`` are the sizes of MaskDiT's, None elsewhere."""

    hidden_size: int
    depth: int
    num_heads: int
    patch_size: int
    in_channels: int
    latent_size: int
    num_classes: int
    mlp_ratio: float
    learn_sigma: bool
    decoder: Mapping[str, int] | None = None
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of the backbone


def sizes_of(tensors: Mapping[str, Tensor], layout: str, num_heads: int | None, path: str) -> Sizes:
    """Read the sizes off the tensors of a layout, and check the positions.

    ``num_heads`` is what no tensor shows; None for the published sizes.

    Raises:
        UserError: A tensor is missing or contradicts the others, or the positions are not the fixed ones.
    """

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        text = f'so these are not the weights of a {layout} network'
        if name not in tensors:
            raise UserError(f'{path}: {name!r} is missing, {text}')
        if tensors[name].ndim != dimensions or not tensors[name].numel():
            raise UserError(f'{path}: {name!r} is {list(tensors[name].shape)}, not of {dimensions} dimensions, {text}')
        return tuple(tensors[name].shape)

    table, is_lightning = shape('y_embedder.embedding_table.weight', 2), layout == 'lightningdit'
    hidden_size, in_channels, patch_size, _ = shape('x_embedder.proj.weight', 4)
    depth = 1 + max((int(match[1]) for name in tensors if (match := re.match(r'blocks\.(\d+)\.', name))), default=-1)
    inner_size = shape(f'blocks.0.mlp.{"w12" if is_lightning else "fc1"}.weight', 2)[0] * (3 / 4 if is_lightning else 1)
    if table[0 if layout == 'maskdit' else 1] != hidden_size:
        raise UserError(
            f'{path}: the label table is {list(table)} for a width of {hidden_size}; {layout} has '
            f'{"[width, classes]" if layout == "maskdit" else "[classes + 1, width]"}. Is it of another layout?'
        )
    rows, patch_numel = shape('final_layer.linear.weight', 2)[0], patch_size**2 * in_channels
    allowed = (patch_numel,) if layout in ('tread', 'maskdit') else (patch_numel, 2 * patch_numel)
    if rows not in allowed:
        raise UserError(
            f'{path}: the head has {rows} rows; a {layout} network with {in_channels} channels and patches of '
            f'{patch_size} has {" or ".join(map(str, allowed))}'
        )
    # What `converted` will rewrite; of all others the network itself says what is wrong.
    if shape('final_layer.linear.bias', 1) != (rows,) or shape(_TIME_WEIGHT, 2)[1] != _SINUSOID:
        raise UserError(
            f'{path}: the bias of the head is {list(tensors["final_layer.linear.bias"].shape)} for {rows} rows, '
            f'{_TIME_WEIGHT} {list(tensors[_TIME_WEIGHT].shape)} for {_SINUSOID} numbers of a time'
        )
    sizes = Sizes(
        hidden_size=hidden_size,
        depth=depth,
        num_heads=_heads(LightningDiT if is_lightning else DiT, hidden_size, depth, num_heads, path),
        patch_size=patch_size,
        in_channels=in_channels,
        latent_size=patch_size * _grid(tensors, 'pos_embed', path),
        num_classes=table[1] if layout == 'maskdit' else table[0] - 1,
        mlp_ratio=math.ceil(inner_size) / hidden_size,  # a gated MLP has two thirds of it, rounded down
        learn_sigma=rows != patch_numel,
    )
    if is_lightning:
        return dataclasses.replace(sizes, more=lightning_facts(tensors, sizes.hidden_size // sizes.num_heads, path))
    if layout != 'maskdit':
        return sizes
    width = shape('decoder_pos_embed', 3)[2]
    _grid(tensors, 'decoder_pos_embed', path)
    blocks = {match[1] for name in tensors if (match := re.match(r'decoder_blocks\.(\d+)\.', name))}
    decoder = {'depth': len(blocks), 'hidden_size': width, 'num_heads': 16}
    return dataclasses.replace(sizes, decoder=decoder)


def _heads(backbone: type[LatentTransformer], hidden_size: int, depth: int, num_heads: int | None, path: str) -> int:
    """The number of heads is in no tensor; published sizes have published numbers."""
    if num_heads is not None:
        if hidden_size % num_heads:
            raise UserError(f'--num-heads {num_heads}: does not divide the width {hidden_size} of {path}')
        return num_heads
    for size in backbone.presets.values():
        if (size['hidden_size'], size['depth']) == (hidden_size, depth):
            return size['num_heads']
    raise UserError(
        f'{path}: width {hidden_size} and {depth} blocks are no published size, and no tensor shows the number of '
        f'attention heads; give it: --num-heads'
    )


def _grid(tensors: Mapping[str, Tensor], name: str, path: str) -> int:
    """Side of the grid; the positions must be the fixed sines and cosines of a square one."""
    if name not in tensors:
        raise UserError(f'{path}: {name!r} is missing, and its network has fixed positions')
    shape = tensors[name].shape
    if len(shape) != 3 or shape[0] != 1 or math.isqrt(shape[1]) ** 2 != shape[1]:
        raise UserError(
            f'{path}: {name} is {list(shape)}; [1, N, width] with N tokens of a square grid can be read. A class token '
            f'or another grid has no place in our network'
        )
    side = math.isqrt(shape[1])
    positions_ND = tensors[name][0]
    apart = float((positions_ND - sincos_positions(shape[2], side)).abs().max())
    if not apart <= position_tolerance(positions_ND):
        raise UserError(
            f'{path}: {name} differs by {apart:.2g} from the fixed sines and cosines of a {side} x {side} grid: these '
            f'positions are learned, or stretched from another grid, and sampling would be of another network'
        )
    return side


def converted(tensors: Mapping[str, Tensor], layout: str, sizes: Sizes) -> dict[str, Tensor]:
    """Our network's weights, which predict in our conventions what the file's predict in theirs."""
    if layout == 'maskdit':
        return _maskdit(tensors, sizes)
    if layout == 'lightningdit':
        tensors = {name: value for name, value in tensors.items() if not name.startswith(ROTARY_TABLE)}  # made anew
    elif layout != 'sit':
        return dict(tensors)
    plain = without_sigma(tensors, sizes.in_channels, sizes.patch_size) if sizes.learn_sigma else tensors
    return _with_time_reversed(plain)


def _with_time_reversed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """SiT's and LightningDiT's velocity, data - noise with data at t = 1, as ours: ``v(x, t) = -v_SiT(x, 1 - t)``.

    The sign goes into the head. ``1 - t`` goes into the first layer of the timestep embedding: its inputs are
    ``cos(w t)`` and ``sin(w t)``, and by the addition theorems ``cos(w (1 - t)) = cos w cos wt + sin w sin wt`` and
    ``sin(w (1 - t)) = sin w cos wt - cos w sin wt``, which is a linear map of them. So the network stays a plain DiT
    under the same names, can be trained further, and is equal but for the rounding of that one layer.
    """
    out = dict(tensors)
    for name in ('final_layer.linear.weight', 'final_layer.linear.bias'):
        out[name] = -out[name]
    weight = out[_TIME_WEIGHT].double()
    half = weight.shape[1] // 2
    # In float32, as both networks compute them, then on in float64.
    omega = torch.exp(-math.log(_MAX_PERIOD) * (torch.arange(half, dtype=torch.float32) / half)).double()
    cosines, sines = weight[:, :half], weight[:, half:]
    turned = [cosines * omega.cos() + sines * omega.sin(), cosines * omega.sin() - sines * omega.cos()]
    out[_TIME_WEIGHT] = torch.cat(turned, dim=1).float()
    return out


_MASKDIT_NAMES = (
    ('decoder_layer.', 'final_layer.bridge.'),
    ('decoder_blocks.', 'final_layer.blocks.'),
    ('decoder_pos_embed', 'final_layer.positions'),
    ('mask_token', 'final_layer.mask_token'),
    ('final_layer.', 'final_layer.head.'),
)


def _maskdit(tensors: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Decoder and head under our names; the linear layer on one-hot labels as a table, with its null label: zero."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        for foreign_prefix, prefix in _MASKDIT_NAMES:
            if name.startswith(foreign_prefix):
                name = prefix + name.removeprefix(foreign_prefix)
                break
        out[name] = tensor
    assert sizes.decoder is not None
    out['final_layer.positions'] = out['final_layer.positions'][0]
    # Trained without the reconstruction, their network has no mask token, and puts zeros where masked tokens were.
    mask_token = out.get('final_layer.mask_token', torch.zeros(sizes.decoder['hidden_size']))
    out['final_layer.mask_token'] = mask_token.flatten()
    rows = out['y_embedder.embedding_table.weight'].T
    out['y_embedder.embedding_table.weight'] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return out


def lightning_facts(tensors: Mapping[str, Tensor], head_size: int, path: str) -> dict[str, Any]:
    """Arguments of our ``LightningDiT`` besides its sizes; ``UserError`` where it cannot have the file's switches."""
    if 'blocks.0.norm1.weight' not in tensors:
        raise UserError(
            f'{path}: trained with use_rmsnorm false; of LightningDiT, networks with RMSNorm can be imported'
        )
    modulation = tensors.get(_MODULATION)
    if modulation is not None and modulation.ndim == 2 and modulation.shape[0] != 6 * modulation.shape[1]:
        raise UserError(f'{path}: trained with wo_shift true; of LightningDiT, networks with shifts can be imported')
    _check_table(tensors, head_size, path)
    if f'{_QUERY_NORM}.weight' not in tensors:
        return {'qk_norm': False}
    return {'qk_norm': 'layer' if f'{_QUERY_NORM}.bias' in tensors else 'rms'}


def _check_table(tensors: Mapping[str, Tensor], head_size: int, path: str) -> None:
    names = [f'{ROTARY_TABLE}{name}' for name in ('freqs_cos', 'freqs_sin')]
    if any(name not in tensors for name in names):
        raise UserError(
            f'{path}: has no {names[0]}, so it was trained with use_rope false; of LightningDiT, networks with rotary '
            'positions can be imported'
        )
    if head_size % 4:  # two axes, and pairs of numbers
        raise UserError(f'{path}: heads of width {head_size} have no rotary positions; is --num-heads right?')
    side = math.isqrt(tensors[names[0]].numel() // head_size)
    table = rotary_table((side, side), head_size, device=torch.device('cpu'), dtype=torch.float64)  # [N, 2, E]
    for name, expected in zip(names, table.unbind(dim=1), strict=True):
        stored = tensors[name]  # each angle twice, once for each number of its pair
        expected = expected.repeat_interleave(2, dim=1)
        fits = stored.shape == expected.shape and stored.numel() > 0
        if not fits or not float((stored - expected).abs().max()) <= position_tolerance(stored):  # nan too
            raise UserError(
                f'{path}: {name} {list(stored.shape)} is not the rotary table of a grid for heads of width {head_size} '
                '(--num-heads decides that); sampling would be of another network'
            )


def position_tolerance(values: Tensor) -> float:
    """How far float32 sines and cosines may be from those computed here, whatever they were rounded to before."""
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values.to(dtype).float(), values))
    # Half the distance of two numbers at 1: what values up to 1 lose in the type in which they were stored.
    return _TOLERANCE + torch.finfo(next(narrow, torch.float32)).eps / 2
