"""The small parts of a DiT, with the parameter names of the published checkpoints.

Shapes: B samples, C channels, H x W latent pixels, N tokens, D width, T width of the timestep's sinusoid, A attention
heads, F width of a head.
"""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn

from tread_composer.models.attention import Attend, sdpa

__all__ = [
    'Attention', 'LabelEmbedder', 'Mlp', 'PatchEmbed', 'RMSNorm', 'TimestepEmbedder', 'check_rows', 'modulate',
    'sincos_positions',
]  # fmt: skip

_MAX_PERIOD = 10000.0
_SINUSOID = 256  # numbers for a time


def modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """``x * (1 + scale) + shift`` with one shift and scale per sample: ``[B, N, D]`` (DiT, section 3.2, adaLN)."""
    return x_BND * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def check_rows(name: str, rows: Tensor, x_BND: Tensor) -> None:
    """Refuse a block's argument of other tokens than ``x_BND`` with a ``ValueError``, as far as its shape shows."""
    if rows.shape[:2] != x_BND.shape[:2]:
        raise ValueError(
            f'{name}: its rows are of {rows.shape[0]} samples x {rows.shape[1]} tokens, the block got '
            f'{x_BND.shape[0]} x {x_BND.shape[1]}. Whoever takes tokens out must take their rows along: Tread and '
            f'apply_tread do with token_arguments=({name!r},), YAML: algorithms.tread.token_arguments: [{name}]'
        )


def sincos_positions(width: int, grid_size: int) -> Tensor:
    """Fixed 2D sin-cos positions of a square grid in raster order: float32 ``[grid_size**2, width]``.

    The first half of the width encodes the column, the second half the row; within a half, sines before cosines. The
    official code calls the first half "h", but its grid holds the w coordinate there: checkpoints depend on it.

    Raises:
        ValueError: ``width`` cannot be split into sines and cosines of two coordinates.
    """
    if width % 4:
        raise ValueError(f'width {width} is not divisible by 4, which sines and cosines of two coordinates need')
    quarter = width // 4  # sines and cosines of two coordinates
    # float64, as in the official code, and rounded once at the end.
    omega = _MAX_PERIOD ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.outer(torch.arange(grid_size, dtype=torch.float64), omega)  # [side, D / 4], radians
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # [side, D / 2]
    # Token r * side + c has column c (repeats as a whole) and row r (each value side times): [N, D / 2] both.
    columns, rows = axis.repeat(grid_size, 1), axis.repeat_interleave(grid_size, dim=0)
    return torch.cat([columns, rows], dim=1).float()


class PatchEmbed(nn.Module):
    """Latents ``[B, C, H, W]`` to one token per patch ``[B, N, D]``, in raster order."""

    def __init__(self, in_channels: int, patch_size: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """See the class."""
        # Without autocast a convolution refuses an input of another dtype than its weights (a model in bfloat16).
        x_BDhw = self.proj(x_BCHW.to(self.proj.weight.dtype))
        return x_BDhw.flatten(2).transpose(1, 2)  # [B, D, h * w] -> [B, N, D], raster order


class TimestepEmbedder(nn.Module):
    """Times ``[B]`` to vectors ``[B, D]``: a sinusoid of 256 numbers (cosines first), then a two-layer MLP."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(_SINUSOID, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t_B: Tensor) -> Tensor:
        """See the class."""
        # bfloat16 has 8 bits: it would merge neighbouring times before the network could tell them apart.
        half = _SINUSOID // 2
        exponents = torch.arange(half, dtype=torch.float32, device=t_B.device) / half
        angles = t_B.float().unsqueeze(1) * torch.exp(-math.log(_MAX_PERIOD) * exponents)
        sinusoid_BT = torch.cat([angles.cos(), angles.sin()], dim=1)
        return self.mlp(sinusoid_BT.to(cast(nn.Linear, self.mlp[0]).weight.dtype))


class LabelEmbedder(nn.Module):
    """Class ids ``[B]`` to vectors ``[B, D]``; the table's last row, ``num_classes``, is the null label's.

    An id outside of ``0 .. num_classes`` is refused by the table look-up itself, which needs no wait for the device:
    IndexError on the CPU, a device-side assertion on a GPU.
    """

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels_B: Tensor) -> Tensor:
        """See the class."""
        return self.embedding_table(labels_B)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension (arXiv 1910.07467), in float32 at least."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of bfloat16 numbers would lose their sum
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype) * self.weight


def _head_norm(kind: Literal['rms', 'layer'] | bool, size: int) -> nn.Module:
    """The norm of queries or keys, over the width of a head; False is none, True is ``'rms'``."""
    if kind not in (False, True, 'rms', 'layer'):
        raise ValueError(f"qk_norm={kind!r}: must be False, 'rms' or 'layer'")
    if kind is False:
        return nn.Identity()
    return nn.LayerNorm(size, eps=1e-6) if kind == 'layer' else RMSNorm(size)


class Attention(nn.Module):
    """Self-attention ``[B, N, D] -> [B, N, D]``; the rows of ``qkv`` are q, then k, then v, each split into heads.

    ``qk_norm`` normalises the queries and keys of each head (ViT-22B, arXiv 2302.05442, section 2): their products stay
    bounded, which is the usual cure for a loss that becomes nan in bfloat16.
    """

    attend: Attend
    """Chosen by ``LatentTransformer.use_attention``; no part of the weights."""

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: Literal['rms', 'layer'] | bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.attend = sdpa
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm, self.k_norm = _head_norm(qk_norm, self.head_size), _head_norm(qk_norm, self.head_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BND: Tensor, *places: Tensor) -> Tensor:
        """See the class; ``places`` are what ``placed`` takes."""
        # [B, N, 3 A F] -> [B, N, 3, A, F] -> three of [B, A, N, F].
        q, k, v = self.qkv(x_BND).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # Norms and rotary tables are float32 (FSDP in bfloat16 rounds its entries, not the positions): what they make
        # goes back to the precision of the rest.
        q, k = (self.placed(x_BANF, *places).to(v.dtype) for x_BANF in (self.q_norm(q), self.k_norm(k)))
        # The meta device has shapes only: there sdpa stands for the others, so that costs can be counted.
        out_BANF = (sdpa if v.is_meta else self.attend)(q, k, v)
        return self.proj(out_BANF.transpose(1, 2).flatten(2))  # heads side by side again: [B, N, A F = D]

    def placed(self, x_BANF: Tensor) -> Tensor:
        """Queries or keys with their tokens' positions, where a backbone brings them in here."""
        return x_BANF


class Mlp(nn.Module):
    """Two linear layers with a tanh-approximated GELU between them: ``[B, N, D] -> [B, N, D]``."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        """See the class."""
        return self.fc2(nn.functional.gelu(self.fc1(x_BND), approximate='tanh'))
