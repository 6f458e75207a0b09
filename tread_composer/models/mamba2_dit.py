"""Mamba2DiT: a DiT whose attention is a bidirectional Mamba-2 scan (SSD, arXiv 2405.21060). A network of our own.

It answers what another way of mixing tokens does to a method: patches, positions, conditions, head and first weights
are DiT's, and a preset has width, depth and, within 4 %, the number of parameters of the DiT of the same letter (the
mixer is twice as wide as attention; an MLP of ratio 3 in place of 4 pays for that). No published result belongs to it.

The order of the tokens counts in a scan. So each block gets the places of its tokens in the scan (``positions``), puts
them in that order, scans, and puts them back: the result for a token does not depend on where it lies in the tensor.
Whoever takes tokens out of a block's sequence must take their ``positions`` along (``token_arguments``); it then scans
the others, in the same order.

Shapes: B samples, C latent channels, O output channels, H x W latent pixels, N tokens of a grid of h x w, D width,
p patch size.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from tread_composer.core.bounds import Depth, Positive, Width
from tread_composer.models.base import LatentTransformer, initialise, size_table
from tread_composer.models.dit import FinalLayer
from tread_composer.models.layers import Mlp, check_rows, modulate
from tread_composer.models.ssd import BidirectionalSSD

__all__ = ['Mamba2Block', 'Mamba2DiT', 'scan_positions']


def scan_positions(grid: tuple[int, int], order: str, *, device: torch.device | None = None) -> Tensor:
    """Where each token of a grid, in raster order, stands in a scan of it: int64 ``[h * w]``.

    The scan goes row by row (``order`` ``'raster'``) or column by column (``'column'``).
    """
    tokens = torch.arange(grid[0] * grid[1], device=device)  # token i is at row i // w, column i % w
    return tokens if order == 'raster' else tokens % grid[1] * grid[0] + tokens // grid[1]


class Mamba2Block(nn.Module):
    """A scan and an MLP, each behind an RMSNorm that the condition shifts and scales, and a gate (adaLN-Zero)."""

    def __init__(self, hidden_size: int, mixer: BidirectionalSSD, mlp_ratio: float) -> None:
        super().__init__()
        # As in DiT, shift and scale come from the condition alone.
        self.norm1 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mixer = mixer
        self.norm2 = nn.RMSNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor, positions: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, for any N and in any order, to tokens of the same shape in that order.

        ``positions`` ``[B, N]`` say where these very tokens stand in this block's scan, no two of a sample alike; only
        their order counts. Those of other tokens, as far as their shape shows, are a ``ValueError``.
        """
        check_rows('positions', positions, x_BND)
        # Six vectors [B, D], zero at the start (adaLN-Zero).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        order_BN = positions.argsort(dim=1)  # the token that comes k-th in the scan; its argsort is the way back
        scanned = self.mixer(_taken(modulate(self.norm1(x_BND), shift1, scale1), order_BN))
        x_BND = x_BND + gate1.unsqueeze(1) * _taken(scanned, order_BN.argsort(dim=1))
        return x_BND + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


def _taken(x_BND: Tensor, ids_BN: Tensor) -> Tensor:
    """The tokens in the order of ``ids_BN``; ``take_along_dim`` would keep ids for all of D in memory."""
    return x_BND.gather(1, ids_BN.unsqueeze(2).expand_as(x_BND))  # ids [B, N, 1], the same for all of D


class Mamba2DiT(LatentTransformer):
    """The state-space counterpart of ``DiT``; called as that is.

    Args beside those of ``LatentTransformer``:
        expand: Inner width of a mixer over ``hidden_size``.
        head_size: Width of a head of the scan; divides ``expand * hidden_size``.
        state_size: Numbers of state for each number of a head.
        scan: ``'raster'``: all blocks scan row by row, there and back. ``'alternate'``: every second block, the one
            with index 1 first, scans column by column.
        chunk_size: Sequences of at most so many tokens are mixed by one matrix, longer ones in chunks of that length.
        kernel: ``'torch'``, or ``'fused'``: the package ``mamba_ssm`` on a CUDA device, and an error without it.

    Raises:
        ValueError: The sizes do not fit together, or there is no such scan or kernel.
    """

    block_class = Mamba2Block
    token_arguments = ('positions',)
    # None is published: width D and depth of the DiT of the same letter.
    presets = size_table(
        {
            'Mamba2-DiT-S': (384, 12),
            'Mamba2-DiT-B': (768, 12),
            'Mamba2-DiT-L': (1024, 24),
            'Mamba2-DiT-XL': (1152, 28),
        },
        ('hidden_size', 'depth'),
        patch_sizes=(2, 4, 8),
    )

    def __init__(
        self,
        *,
        latent_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: Width = 2,
        hidden_size: Width = 1152,
        depth: Depth = 28,
        expand: Width = 2,
        head_size: Width = 64,
        state_size: Width = 64,
        mlp_ratio: Positive = 3.0,
        scan: Literal['raster', 'alternate'] = 'raster',
        chunk_size: Width = 256,
        kernel: Literal['torch', 'fused'] = 'torch',
        learn_sigma: bool = False,
    ) -> None:
        super().__init__(latent_size, in_channels, num_classes, patch_size, hidden_size, depth, mlp_ratio, learn_sigma)
        if scan not in ('raster', 'alternate'):
            raise ValueError(f"scan={scan!r}: must be 'raster' or 'alternate'")
        # Block i scans in the order i % len(orders).
        self.orders = ('raster', 'column') if scan == 'alternate' else ('raster',)
        mixer = partial(
            BidirectionalSSD, hidden_size, expand=expand, head_size=head_size, state_size=state_size,
            chunk_size=chunk_size, kernel=kernel,
        )  # fmt: skip
        self.blocks = nn.ModuleList(Mamba2Block(hidden_size, mixer(), mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        initialise(self)  # the scans' own parameters have their first values already

    def block_inputs(self, x_BND: Tensor, grid: tuple[int, int]) -> Sequence[tuple[Tensor, ...]]:
        """Where the tokens of the grid stand in each block's scan."""
        # One row for each sample, all the same memory: a route then takes other tokens of each sample.
        return [(scan_positions(grid, order, device=x_BND.device).expand(len(x_BND), -1),) for order in self.orders]
