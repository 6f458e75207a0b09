"""DiT (arXiv 2212.09748): the diffusion transformer, with parameter names and shapes of the published checkpoints.

For any objective of this package: ``t`` goes into the timestep embedding as it comes, unscaled. The file knows nothing
of routing: ``Tread`` works on ``blocks`` from outside.

Shapes: B samples, C latent channels, O output channels, H x W latent pixels, N tokens, D width, p patch size.
"""

from collections.abc import Mapping
from typing import Literal

from torch import Tensor, nn

from tread_composer.core.bounds import Depth, Positive, Width
from tread_composer.models.attention import ATTENTIONS
from tread_composer.models.base import LatentTransformer, initialise, size_table
from tread_composer.models.layers import Attention, Mlp, modulate

__all__ = ['DiT', 'DiTBlock', 'FinalLayer', 'without_sigma']


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a norm that the condition shifts and scales, and a gate (adaLN-Zero)."""

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: Literal[False, 'rms', 'layer'] = False
    ) -> None:
        super().__init__()
        # Norms have no weights of their own: shift and scale come from the condition.
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        # One modulation for each block (6 D outputs); the SiLU stands before it, as in the published names `.1`.
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, for any N, to tokens of the same shape."""
        # Six vectors [B, D] in the order of the published weights; adaLN-Zero starts them all at 0 (section 3.2).
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        x_BND = x_BND + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BND), shift1, scale1))
        return x_BND + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens ``[B, N, D]`` to patches ``[B, N, p * p * O]``; ``norm`` is DiT's LayerNorm if None."""

    def __init__(self, hidden_size: int, patch_values: int, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6) if norm is None else norm
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """See the class."""
        shift, scale = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BND), shift, scale))


class DiT(LatentTransformer):
    """The diffusion transformer. Latents of another size than in training are refused.

    Args beside those of ``LatentTransformer``:
        qk_norm: Normalise the queries and keys of each head, by their root mean square or by mean and deviation;
            the published checkpoints do not.

    Raises:
        ValueError: The sizes do not fit together.
    """

    block_class = DiTBlock
    attentions = ATTENTIONS
    # Its positions are the table of one grid (section 3.2): latents of another size are most likely a mistake.
    any_grid = False
    # Width D, depth, heads. S to XL: arXiv 2212.09748, Table 1. H: the code of MaskDiT, arXiv 2306.09305.
    presets = size_table(
        {
            'DiT-S': (384, 12, 6),
            'DiT-B': (768, 12, 12),
            'DiT-L': (1024, 24, 16),
            'DiT-XL': (1152, 28, 16),
            'DiT-H': (1280, 32, 16),
        },
        ('hidden_size', 'depth', 'num_heads'),
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
        num_heads: Width = 16,
        mlp_ratio: Positive = 4.0,
        learn_sigma: bool = False,
        qk_norm: Literal[False, 'rms', 'layer'] = False,
    ) -> None:
        super().__init__(
            latent_size, in_channels, num_classes, patch_size, hidden_size, depth, mlp_ratio, learn_sigma, num_heads
        )
        # Drawn in this order: blocks, head, then DiT's start over them. A seed's weights depend on it.
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        initialise(self)


def without_sigma(state_dict: Mapping[str, Tensor], in_channels: int, patch_size: int) -> dict[str, Tensor]:
    """Weights of a ``learn_sigma=True`` DiT, C ``in_channels``, for a model with ``learn_sigma=False``.

    Of the head's rows only those of the first C channels stay; ``state_dict`` itself is not changed.

    Raises:
        ValueError: The head does not have ``p * p * 2C`` rows.
    """
    out = dict(state_dict)  # the tensors are shared, but for the two of the head
    for name in ('final_layer.linear.weight', 'final_layer.linear.bias'):
        if name not in out:
            raise ValueError(f'these are not the weights of a DiT: {name!r} is missing')
        # The head writes p * p pixels of 2C channels: C of noise, then C of variance.
        rows, expected = out[name].shape[0], patch_size**2 * 2 * in_channels
        if rows != expected:
            raise ValueError(
                f'{name!r} has {rows} rows; a head with variance has {expected} for patch_size={patch_size} and '
                f'in_channels={in_channels}. Weights without variance are loaded as they are'
            )
        # Row (i * p + j) * 2C + channel belongs to pixel (i, j) of the patch:
        # [p * p * 2C, ...] -> [p * p, 2C, ...] -> [p * p * C, ...]; a bias has no further dimension.
        out[name] = out[name].unflatten(0, (-1, 2 * in_channels))[:, :in_channels].flatten(0, 1)
    return out
