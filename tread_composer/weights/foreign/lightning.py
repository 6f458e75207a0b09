"""What the tensors of LightningDiT (hustvl/LightningDiT) say of its switches, of which ours has the published choice.

Shapes: N tokens, E half the width of a head.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.models.lightning_dit import rotary_table

__all__ = ['ROTARY_TABLE', 'lightning_facts', 'position_tolerance']

ROTARY_TABLE = 'feat_rope.'
"""What the names of its stored rotary table begin with."""

_MODULATION = 'blocks.0.adaLN_modulation.1.weight'
_QUERY_NORM = 'blocks.0.attn.q_norm'
_TOLERANCE = 1e-4  # of stored sines and cosines: other ways to compute them differ by 1e-6, another table by 1


def lightning_facts(tensors: Mapping[str, Tensor], head_size: int, path: str) -> dict[str, Any]:
    """The arguments of our ``LightningDiT`` besides its sizes.

    Raises:
        UserError: The network was trained with switches that ours does not have, or with another rotary table.
    """
    if 'blocks.0.norm1.weight' not in tensors:
        raise UserError(
            f'{path}: trained with use_rmsnorm false; of LightningDiT, networks with RMSNorm can be imported'
        )
    if _MODULATION in tensors and tensors[_MODULATION].shape[0] != 6 * tensors[_MODULATION].shape[1]:
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
    side = math.isqrt(tensors[names[0]].shape[0])
    table = rotary_table((side, side), head_size, device=torch.device('cpu'), dtype=torch.float64)  # [N, 2, E]
    for name, expected in zip(names, table.unbind(dim=1), strict=True):
        stored = tensors[name]  # each angle twice, once for each number of its pair
        expected = expected.repeat_interleave(2, dim=1)
        if stored.shape != expected.shape or float((stored - expected).abs().max()) > position_tolerance(stored):
            raise UserError(
                f'{path}: {name} {list(stored.shape)} is not the rotary table of a grid for heads of width {head_size} '
                '(--num-heads decides that); sampling would be of another network'
            )


def position_tolerance(values: Tensor) -> float:
    """How far float32 sines and cosines may be from those computed here, whatever they were rounded to before."""
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values.to(dtype).float(), values))
    # Half the distance of two numbers at 1: what values up to 1 lose in the type in which they were stored.
    return _TOLERANCE + torch.finfo(next(narrow, torch.float32)).eps / 2
