"""DiT (arXiv 2212.09748): the diffusion transformer, with parameter names and shapes of the published checkpoints.

For any objective of this package: ``t`` goes into the timestep embedding as it comes, unscaled. The file knows nothing
of routing: ``Tread`` works on ``blocks`` from outside.

Shapes: B samples, C latent channels, O output channels, H x W latent pixels, N tokens, D width, p patch size.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn

from tread_composer.bounds import AtLeast1, Positive
from tread_composer.models.common import check_sizes, initialise, unpatchify
from tread_composer.models.layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    TimestepEmbedder,
    modulate,
    sincos_positions,
)
from tread_composer.models.presets import PRESETS

__all__ = ['DiT', 'DiTBlock', 'FinalLayer', 'without_sigma']


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a norm that the condition shifts and scales, and a gate (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """Tokens ``[B, N, D]``, for any N, to tokens of the same shape."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition_BD).chunk(6, dim=1)
        x_BND = x_BND + gate1.unsqueeze(1) * self.attn(modulate(self.norm1(x_BND), shift1, scale1))
        return x_BND + gate2.unsqueeze(1) * self.mlp(modulate(self.norm2(x_BND), shift2, scale2))


class FinalLayer(nn.Module):
    """Tokens ``[B, N, D]`` to patches ``[B, N, p * p * O]``."""

    def __init__(self, hidden_size: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x_BND: Tensor, condition_BD: Tensor) -> Tensor:
        """See the class."""
        shift, scale = self.adaLN_modulation(condition_BD).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x_BND), shift, scale))


class DiT(nn.Module):
    """The diffusion transformer.

    Args:
        latent_size: Height and width of the latents, H = W.
        in_channels: Channels of the latents, C.
        num_classes: Number of classes; label ``num_classes`` is the null label. 0: unconditional, labels are ignored.
        patch_size: Height and width of the square that becomes one token, p.
        hidden_size: Width of a token, D.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Inner width of the MLPs over ``hidden_size``.
        learn_sigma: Predict 2C channels (the published checkpoints: noise, then variance fraction) instead of C.

    Raises:
        ValueError: The sizes do not fit together.
    """

    presets: ClassVar[Mapping[str, Mapping[str, int]]] = PRESETS
    """Published sizes by name: what ``preset`` in a configuration stands for."""
    token_arguments: ClassVar[tuple[str, ...]] = ()
    """Arguments of a block that belong to its tokens, ``[B, N, ...]``: none, positions are added at the input."""

    def __init__(
        self,
        *,
        latent_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: AtLeast1 = 2,
        hidden_size: AtLeast1 = 1152,
        depth: AtLeast1 = 28,
        num_heads: AtLeast1 = 16,
        mlp_ratio: Positive = 4.0,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            'latent_size': latent_size,
            'in_channels': in_channels,
            'patch_size': patch_size,
            'hidden_size': hidden_size,
            'depth': depth,
            'num_heads': num_heads,
        }
        check_sizes(sizes, num_classes, mlp_ratio)
        self.latent_size, self.in_channels, self.num_classes = latent_size, in_channels, num_classes
        self.patch_size, self.hidden_size, self.depth = patch_size, hidden_size, depth
        self.null_label = num_classes
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.num_tokens = (latent_size // patch_size) ** 2

        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A parameter, not a buffer: so it is in the published files' parameter count, and never trained.
        positions_ND = sincos_positions(hidden_size, latent_size // patch_size)
        self.pos_embed = nn.Parameter(positions_ND.unsqueeze(0), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * self.out_channels)
        initialise(self)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """Predict from noisy latents.

        Args:
            x_BCHW: Noisy latents.
            t_B: What the objective says about the noise level, in any dtype; embedded in float32.
            labels_B: Class ids, int64, ``0 .. num_classes``. An id outside is refused by the table look-up, see
                ``LabelEmbedder``. Ignored by an unconditional model.

        Returns:
            The prediction ``[B, O, H, W]``, O = C or, with ``learn_sigma``, 2C.

        Raises:
            ValueError: The latents have another shape than the model was made for, or labels are missing.
        """
        expected = (self.in_channels, self.latent_size, self.latent_size)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(
                f'this DiT was made for latents [B, {", ".join(map(str, expected))}], got {list(x_BCHW.shape)}'
            )
        x = self.x_embedder(x_BCHW) + self.pos_embed
        c = self.t_embedder(t_B)
        if self.num_classes:
            if labels_B is None:
                raise ValueError(f'labels are missing; without a class, pass the null label {self.null_label}')
            c = c + self.y_embedder(labels_B)
        for block in self.blocks:
            x = block(x, c)
        side = self.latent_size // self.patch_size
        return unpatchify(self.final_layer(x, c), (side, side), self.patch_size, self.out_channels)

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Composer's FSDP asks: is this module a unit of its own?"""
        return isinstance(module, DiTBlock)

    def activation_checkpointing_fn(self, module: nn.Module) -> bool:
        """Composer's activation checkpointing asks: recompute this module in the backward pass?"""
        return isinstance(module, DiTBlock)


def without_sigma(state_dict: Mapping[str, Tensor], in_channels: int, patch_size: int) -> dict[str, Tensor]:
    """Weights of a ``learn_sigma=True`` DiT for a model with ``learn_sigma=False``: the variance half is left out.

    Args:
        state_dict: Weights with ``2 * in_channels`` output channels; not changed.
        in_channels: C.
        patch_size: p.

    Returns:
        The same weights, but of the head's rows only those of the first C channels: row ``(i * p + j) * 2C + channel``
        belongs to pixel ``(i, j)`` of the patch.

    Raises:
        ValueError: The head does not have ``p * p * 2C`` rows.
    """
    out = dict(state_dict)
    for name in ('final_layer.linear.weight', 'final_layer.linear.bias'):
        if name not in out:
            raise ValueError(f'these are not the weights of a DiT: {name!r} is missing')
        rows, expected = out[name].shape[0], patch_size**2 * 2 * in_channels
        if rows != expected:
            raise ValueError(
                f'{name!r} has {rows} rows; a head with variance has {expected} for patch_size={patch_size} and '
                f'in_channels={in_channels}. Weights without variance are loaded as they are'
            )
        out[name] = out[name].unflatten(0, (-1, 2 * in_channels))[:, :in_channels].flatten(0, 1)
    return out
