"""What the backbones share beside their layers: rules of their sizes, their first weights, tokens back to latents.

Shapes: B samples, O output channels, H x W latent pixels, N tokens of a grid of h x w, p patch size.
"""

from collections.abc import Mapping

from torch import Tensor, nn

__all__ = ['check_sizes', 'initialise', 'unpatchify']


def check_sizes(sizes: Mapping[str, int], num_classes: int, mlp_ratio: float) -> None:
    """Refuse sizes of a transformer that do not fit together.

    Args:
        sizes: ``latent_size``, ``in_channels``, ``patch_size``, ``hidden_size``, ``depth`` and, for attention,
            ``num_heads``.
        num_classes: Number of classes; 0 for a model without labels.
        mlp_ratio: Inner width of the MLPs over ``hidden_size``.

    Raises:
        ValueError: Names the size, its value and the rule.
    """
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f'{name}={value}: must be at least 1')
    if num_classes < 0:
        raise ValueError(f'num_classes={num_classes}: must be at least 1, or 0 for a model without labels')
    if mlp_ratio <= 0:
        raise ValueError(f'mlp_ratio={mlp_ratio}: must be positive')
    hidden_size = sizes['hidden_size']
    if sizes['latent_size'] % sizes['patch_size']:
        raise ValueError(
            f'latent_size={sizes["latent_size"]} is not divisible by patch_size={sizes["patch_size"]}; '
            'choose a patch size that tiles the latents'
        )
    if hidden_size % sizes.get('num_heads', 1):
        raise ValueError(
            f'hidden_size={hidden_size} is not divisible by num_heads={sizes["num_heads"]}; heads take equal shares'
        )
    if hidden_size % 4:
        raise ValueError(
            f'hidden_size={hidden_size} is not divisible by 4; positions need sines and cosines of two coordinates'
        )


def initialise(network: nn.Module) -> None:
    """DiT's start: every block is the identity and the prediction is 0 (adaLN-Zero).

    Args:
        network: With the parts' names of a DiT. What is no linear layer, convolution or embedding stays as it is.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith('adaLN_modulation.1') or name == 'final_layer.linear':
                nn.init.zeros_(module.weight)
            elif name.startswith('t_embedder'):
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
    """Patches ``[B, h * w, p * p * O]``, in raster order, channel fastest, to ``[B, O, h * p, w * p]``.

    Args:
        patches: One for each token.
        grid: h and w.
        patch_size: p.
        channels: O.
    """
    x = patches.unflatten(2, (patch_size, patch_size, channels)).unflatten(1, grid)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
