"""LightningDiT (arXiv 2501.01423): DiT with rotary positions, RMSNorm and SwiGLU, names and shapes as published.

A published file has two entries more, ``feat_rope.freqs_cos`` and ``feat_rope.freqs_sin``: here the rotary table is
made from the grid in each forward pass and handed to each block as its argument ``rope``. Whoever takes tokens out of
a block's sequence must take their rows along (``token_arguments``).

Shapes: B samples, C latent channels, O output channels, H x W latent pixels, N tokens of a grid of h x w, D width,
p patch size, A attention heads, E half the width of a head.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from tread_composer.core.bounds import Depth, Positive, Width
from tread_composer.models.attention import ATTENTIONS
from tread_composer.models.base import LatentTransformer, initialise, size_table
from tread_composer.models.dit import FinalLayer
from tread_composer.models.layers import Attention, RMSNorm, check_rows, modulate

__all__ = ['LightningDiT', 'LightningDiTBlock', 'SwiGLU', 'rotary_table', 'rotate']

_THETA = 10000.0

QKNorm = Literal[False, True, 'rms', 'layer']  # True: as the authors' code writes 'rms'


def rotary_table(grid: tuple[int, int], head_size: int, *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of the angles by which a head's pairs of numbers are turned: ``[h * w, 2, E]``, raster order.

    Of a token in row r and column c, the first E / 2 pairs turn by ``r * 10000^(-2k / E)``, the others by c likewise:
    a dot product of two turned vectors depends on the difference of their positions alone (RoPE, arXiv 2104.09864,
    eq. 16; for two coordinates as in EVA-02, arXiv 2303.11331). ``dtype`` is float32 or wider, or else far positions
    would share an angle.

    Raises:
        ValueError: ``head_size``, 2E, cannot be split into pairs for two coordinates.
    """
    if head_size % 4:
        raise ValueError(
            f'a head of width {head_size} is not divisible by 4, which pairs of numbers for two coordinates need'
        )
    quarter = head_size // 4  # E / 2 pairs turn by the row, E / 2 by the column
    frequencies = _THETA ** -(torch.arange(quarter, device=device, dtype=dtype) / quarter)
    # Row r and column c times each frequency: [h, E / 2] and [w, E / 2].
    rows, columns = (torch.outer(torch.arange(n, device=device, dtype=dtype), frequencies) for n in grid)
    angles_hwE = torch.cat([rows.unsqueeze(1).expand(-1, grid[1], -1), columns.expand(grid[0], -1, -1)], dim=2)
    angles_NE = angles_hwE.flatten(0, 1)  # raster order, as the tokens
    return torch.stack([angles_NE.cos(), angles_NE.sin()], dim=1)


def rotate(x_BANF: Tensor, rope: Tensor) -> Tensor:
    """Turn the neighbouring pairs of numbers of each head (F = 2E) by the angles of ``rope`` ``[B, N, 2, E]``."""
    cos, sin = rope.unsqueeze(1).unbind(3)  # [B, 1, N, E]: the same for all heads
    even, odd = x_BANF[..., 0::2], x_BANF[..., 1::2]  # pair k is numbers 2k and 2k + 1, each [B, A, N, E]
    # (even + i odd) e^(i angle), written out (arXiv 2104.09864, eq. 34).
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=4).flatten(3)


class SwiGLU(nn.Module):
    """``w3(silu(a) * b)``, where ``w12`` gives a and b (arXiv 2002.05202, section 2): ``[B, N, D] -> [B, N, D]``."""

    def __init__(self, hidden_size: int, inner_size: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(hidden_size, 2 * inner_size)
        self.w3 = nn.Linear(inner_size, hidden_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        """See the class."""
        a, b = self.w12(x_BND).chunk(2, dim=-1)  # gate first, as in the published weights
        return self.w3(nn.functional.silu(a) * b)


class RotaryAttention(Attention):
    """Self-attention ``[B, N, D] -> [B, N, D]`` whose queries and keys are turned by their tokens' positions."""

    def placed(self, x_BANF: Tensor, rope: Tensor) -> Tensor:
        """Turned; ``rope`` is ``[B, N, 2, E]``."""
        return rotate(x_BANF, rope)


class LightningDiTBlock(nn.Module):
    """Rotary attention and SwiGLU, each behind an RMSNorm that the condition shifts and scales, and a gate."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: QKNorm) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size)
        self.attn = RotaryAttention(hidden_size, num_heads, qk_norm)
        self.norm2 = RMSNorm(hidden_size)
        # Two thirds of the width of DiT's MLP: three matrices then cost what its two do.
        self.mlp = SwiGLU(hidden_size, 2 * int(hidden_size * mlp_ratio) // 3)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor, rope: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, for any N and in any order, to tokens of the same shape.

        ``rope`` are the rows of ``rotary_table`` for these very tokens, ``[B, N, 2, E]``; of other tokens, as far as
        its shape shows, it is a ``ValueError``.
        """
        check_rows('rope', rope, x_BND)
        # Six vectors [B, D], zero at the start (adaLN-Zero).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        x_BND = x_BND + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BND), shift1, scale1), rope)
        return x_BND + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


class LightningDiT(LatentTransformer):
    """The diffusion transformer of LightningDiT; called as ``DiT`` is.

    Args beside those of ``LatentTransformer``:
        patch_size: 1 in the paper, whose latents are small.
        mlp_ratio: Inner width of a SwiGLU over ``hidden_size``, times 3 / 2: at 4 it costs as much as DiT's MLP.
        qk_norm: Normalise queries and keys of each head; the authors' cure for losses that become nan.

    Raises:
        ValueError: The sizes do not fit together.
    """

    block_class = LightningDiTBlock
    token_arguments = ('rope',)
    attentions = ATTENTIONS
    # Width D, depth, heads: the authors' code.
    presets = size_table(
        {
            'LightningDiT-B': (768, 12, 12),
            'LightningDiT-L': (1024, 24, 16),
            'LightningDiT-XL': (1152, 28, 16),
            'LightningDiT-1p0B': (1536, 24, 24),
            'LightningDiT-1p6B': (1792, 28, 28),
        },
        ('hidden_size', 'depth', 'num_heads'),
        patch_sizes=(1, 2),
    )

    def __init__(
        self,
        *,
        latent_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: Width = 1,
        hidden_size: Width = 1152,
        depth: Depth = 28,
        num_heads: Width = 16,
        mlp_ratio: Positive = 4.0,
        qk_norm: QKNorm = False,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(
            latent_size, in_channels, num_classes, patch_size, hidden_size, depth, mlp_ratio, learn_sigma, num_heads
        )
        self.head_size = hidden_size // num_heads  # 2E: pairs of numbers
        if self.head_size % 4:
            raise ValueError(
                f'hidden_size={hidden_size} over num_heads={num_heads} is {self.head_size}, not divisible by 4; rotary '
                'positions turn pairs of numbers of a head for each of two coordinates'
            )
        if 2 * int(hidden_size * mlp_ratio) < 3:
            raise ValueError(f'mlp_ratio={mlp_ratio}: leaves no inner width at hidden_size={hidden_size}; raise it')
        self.blocks = nn.ModuleList(LightningDiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels, RMSNorm(hidden_size))
        initialise(self)

    def block_inputs(self, x_BND: Tensor, grid: tuple[int, int]) -> Sequence[tuple[Tensor, ...]]:
        """The rotary table of the grid, for all blocks the same."""
        # One row for each sample, all the same memory: a route then takes other rows for each sample.
        dtype = torch.promote_types(x_BND.dtype, torch.float32)
        rope = rotary_table(grid, self.head_size, device=x_BND.device, dtype=dtype).expand(len(x_BND), -1, -1, -1)
        return ((rope,),)
