"""The base of the backbones: latents as tokens in, the same prediction out; a backbone adds its blocks.

What stands here is the published DiT (arXiv 2212.09748, section 3): a grid of patches with fixed sin-cos positions, one
vector of time and label for all blocks, a head that gives patches back. Nothing here knows of routing or of Composer.

Shapes: B samples, C latent channels, D width, O output channels, H x W latent pixels, N tokens of a grid of h x w, p
patch size.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from tread_composer.models.attention import choose_attention
from tread_composer.models.layers import Attention, LabelEmbedder, PatchEmbed, TimestepEmbedder, sincos_positions

__all__ = ['LatentTransformer', 'initialise', 'size_table', 'unpatchify']


class LatentTransformer(nn.Module):
    """Noisy latents, their noise level and labels to a prediction of the latents' shape.

    A subclass passes its own arguments on, adds ``blocks`` (``nn.ModuleList``) and ``final_layer``, and calls
    ``initialise(self)``. Its blocks are called as ``block(x_BND, condition_BD, *inputs)``. Its file and one line in
    ``tread_composer.models.BACKBONES`` are all that it costs: its constructor is its section of a configuration.

    Args:
        latent_size: Height and width of the latents in training, H = W.
        in_channels: Channels of the latents, C.
        num_classes: Number of classes; label ``num_classes`` is the null label. 0: unconditional, labels are ignored.
        patch_size: Height and width of the square that becomes one token, p.
        hidden_size: Width of a token, D.
        depth: Number of blocks.
        mlp_ratio: Inner width of the MLPs over ``hidden_size``.
        learn_sigma: Predict 2C channels (noise, then variance fraction) instead of C.
        num_heads: Attention heads of a block, where it has any.

    Raises:
        ValueError: The sizes do not fit together.
    """

    block_class: ClassVar[type[nn.Module]]  # of `blocks`: what FSDP gathers and activation checkpointing recomputes
    token_arguments: ClassVar[tuple[str, ...]] = ()  # arguments of a block that belong to its tokens, [B, N, ...]
    # Published sizes by name, as constructor arguments; all of them decide the same arguments.
    presets: ClassVar[Mapping[str, Mapping[str, int]]] = {}
    attentions: ClassVar[tuple[str, ...]] = ()  # what the setting `attention` may be; none where blocks have none
    # Takes latents of any size that patches tile: beyond training's, positions that the weights have not seen.
    any_grid: ClassVar[bool] = True
    blocks: nn.ModuleList
    final_layer: nn.Module

    def __init__(
        self,
        latent_size: int,
        in_channels: int,
        num_classes: int,
        patch_size: int,
        hidden_size: int,
        depth: int,
        mlp_ratio: float,
        learn_sigma: bool,
        num_heads: int = 1,
    ) -> None:
        super().__init__()
        self.latent_size, self.in_channels, self.num_classes = latent_size, in_channels, num_classes
        self.patch_size, self.hidden_size, self.depth = patch_size, hidden_size, depth
        self._check_sizes(mlp_ratio, num_heads)
        self.null_label = num_classes  # one row more in the table of labels
        self.out_channels = 2 * in_channels if learn_sigma else in_channels  # O: noise, then variance fraction
        self.num_tokens = (latent_size // patch_size) ** 2  # N in training

        self.x_embedder = PatchEmbed(in_channels, patch_size, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if num_classes:
            self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A parameter, not a buffer: so it is in the published files' parameter count, and never trained.
        positions_ND = sincos_positions(hidden_size, latent_size // patch_size)
        self.pos_embed = nn.Parameter(positions_ND.unsqueeze(0), requires_grad=False)

    def forward(self, x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor | None = None) -> Tensor:
        """The prediction ``[B, O, H, W]``, O = C or, with ``learn_sigma``, 2C.

        Args:
            x_BCHW: Noisy latents, H and W divisible by p.
            t_B: What the objective says about the noise level, in any dtype; embedded in float32.
            labels_B: Class ids, int64, ``0 .. num_classes`` (see ``LabelEmbedder``). Ignored without classes.

        Raises:
            ValueError: The latents are of another shape than the model takes, or labels are missing.
        """
        grid = self.grid_of(x_BCHW)
        x = self.x_embedder(x_BCHW) + self.positions(grid)  # [B, N, D], raster order
        c = self.condition(t_B, labels_B)  # [B, D]: time and label are added, not concatenated (section 3.2)
        inputs = self.block_inputs(x, grid)
        for index, block in enumerate(self.blocks):
            x = block(x, c, *inputs[index % len(inputs)])
        # [B, N, p * p * O] -> [B, O, H, W]
        return unpatchify(self.final_layer(x, c), grid, self.patch_size, self.out_channels)

    def block_inputs(self, x_BND: Tensor, grid: tuple[int, int]) -> Sequence[tuple[Tensor, ...]]:
        """What blocks get beside tokens and condition: block i the entry ``i % len``. Nothing, unless a backbone says.

        ``x_BND`` are the tokens of all patches, whose number, device and dtype count; ``grid`` is h and w.
        """
        return ((),)

    def condition(self, t_B: Tensor, labels_B: Tensor | None) -> Tensor:
        """Time and label for the blocks: ``[B, D]``. Without labels, where it has classes, a ``ValueError``."""
        c = self.t_embedder(t_B)
        if self.num_classes:
            if labels_B is None:
                raise ValueError(f'labels are missing; without a class, pass the null label {self.null_label}')
            c = c + self.y_embedder(labels_B)
        return c

    def grid_of(self, x_BCHW: Tensor) -> tuple[int, int]:
        """``(h, w)`` of the patches of these latents; ``ValueError`` for latents that the model does not take."""
        (channels, height, width), side, p = x_BCHW.shape[1:], self.latent_size, self.patch_size
        fits = height % p == width % p == 0 if self.any_grid else (height, width) == (side, side)
        if channels != self.in_channels or not fits:
            shape = f'H, W] with H and W divisible by {p}' if self.any_grid else f'{side}, {side}]'
            raise ValueError(
                f'this {type(self).__name__} was made for latents [B, {self.in_channels}, {shape}, got '
                f'{list(x_BCHW.shape)}'
            )
        return height // p, width // p

    def positions(self, grid: tuple[int, int]) -> Tensor:
        """Sin-cos vectors ``[1, h * w, D]``: those of the weights for the grid of training, others as they are."""
        side = self.latent_size // self.patch_size
        if grid == (side, side):
            return self.pos_embed
        # Coordinates count patches and are not stretched: a corner of the larger square, [h, w, D].
        square = sincos_positions(self.hidden_size, max(grid)).unflatten(0, (max(grid), max(grid)))
        return square[: grid[0], : grid[1]].reshape(1, -1, self.hidden_size).to(self.pos_embed)

    def use_attention(
        self,
        name: str,
        device: torch.device,
        *,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        training: bool = True,
    ) -> str:
        """Compute attention otherwise from now on. Weights, their names and, up to rounding, results stay the same.

        To be called before compilation; probes on the device (``choose_attention``) and returns one line that says what
        runs. ``dtypes`` are what its attention will run in: that of autocast, or that of the weights without.

        Raises:
            ValueError: The network has no such attention.
            UserError: It cannot run there.
        """
        if name not in ('sdpa', *self.attentions):
            raise ValueError(f'attention={name!r}: {type(self).__name__} has {", ".join(self.attentions) or "none"}')
        layers = [module for module in self.modules() if isinstance(module, Attention)]
        # Each shape once: it is probed on the device.
        heads = tuple(dict.fromkeys((layer.num_heads, layer.head_size) for layer in layers))
        attend, line = choose_attention(name, device, heads, tuple(dict.fromkeys(dtypes)), training)
        for layer in layers:
            layer.attend = attend
        return line

    def fsdp_wrap_fn(self, module: nn.Module) -> bool:
        """Composer's FSDP asks: is this module a unit of its own?"""
        return isinstance(module, self.block_class)

    # Likewise: is this module recomputed as one in the backward pass?
    activation_checkpointing_fn = fsdp_wrap_fn

    def _check_sizes(self, mlp_ratio: float, num_heads: int) -> None:
        names = ('latent_size', 'in_channels', 'patch_size', 'hidden_size', 'depth')
        for name, value in {**{name: getattr(self, name) for name in names}, 'num_heads': num_heads}.items():
            if value < 1:
                raise ValueError(f'{name}={value}: must be at least 1')
        if self.num_classes < 0:
            raise ValueError(f'num_classes={self.num_classes}: must be at least 1, or 0 for a model without labels')
        if mlp_ratio <= 0:
            raise ValueError(f'mlp_ratio={mlp_ratio}: must be positive')
        if self.latent_size % self.patch_size:
            raise ValueError(
                f'latent_size={self.latent_size} is not divisible by patch_size={self.patch_size}; '
                'choose a patch size that tiles the latents'
            )
        width = f'hidden_size={self.hidden_size} is not divisible by'
        if self.hidden_size % num_heads:
            raise ValueError(f'{width} num_heads={num_heads}; heads take equal shares')
        if self.hidden_size % 4:
            raise ValueError(f'{width} 4; positions need sines and cosines of two coordinates')


def size_table(
    sizes: Mapping[str, tuple[int, ...]], names: Sequence[str], patch_sizes: Sequence[int]
) -> dict[str, dict[str, int]]:
    """Presets ``'<size>/<patch size>'``: each row of a published table with columns ``names``, at each patch size."""
    return {
        f'{size}/{patch_size}': {'patch_size': patch_size, **dict(zip(names, row, strict=True))}
        for size, row in sizes.items()
        for patch_size in patch_sizes
    }


def initialise(network: nn.Module) -> None:
    """DiT's start for a network with its parts' names: every block is the identity, the prediction 0 (adaLN-Zero)."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            # Gates, shifts and scales of 0: each block is the identity. A head of 0: the prediction is 0.
            if name.endswith('adaLN_modulation.1') or name == 'final_layer.linear':
                nn.init.zeros_(module.weight)
            elif name.startswith('t_embedder'):  # as the label table below: normal, 0.02
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.xavier_uniform_(module.weight.view(module.out_channels, -1))  # as the linear layer that it is
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int, channels: int) -> Tensor:
    """Patches ``[B, h * w, p * p * O]``, in raster order, channel fastest, to ``[B, O, h * p, w * p]``."""
    x = patches.unflatten(2, (patch_size, patch_size, channels)).unflatten(1, grid)  # [B, h, w, p, p, O]
    # [B, O, h, p, w, p]: a row of pixels is a row of patches and a row within them.
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
