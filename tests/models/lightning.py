"""A small LightningDiT, what it reads, and its rotary tables."""

from typing import Any

import torch
from torch import Tensor

from tread_composer.models import LightningDiT
from tread_composer.models.lightning_dit import rotary_table

SMALL: dict[str, Any] = {
    'latent_size': 8,
    'in_channels': 3,
    'patch_size': 2,
    'hidden_size': 24,
    'depth': 3,
    'num_heads': 3,
}


def random_net(num_classes: int = 5, **changes: Any) -> LightningDiT:
    """A small network with no zero weight left: a fresh one predicts 0 whatever its blocks do."""
    model = LightningDiT(**{**SMALL, **changes}, num_classes=num_classes)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if name != 'pos_embed':
            parameter.data.normal_(std=0.2, generator=generator)
    return model


def inputs(batch_size: int = 3, height: int = 8, width: int = 8, channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch_size, channels, height, width, generator=torch.Generator().manual_seed(5))
    return x, torch.linspace(-1.5, 0.9, batch_size), torch.arange(batch_size)


def table(grid: tuple[int, int], head_size: int = 8, batch_size: int = 1) -> Tensor:
    made = rotary_table(grid, head_size, device=torch.device('cpu'), dtype=torch.float64)
    return made.expand(batch_size, -1, -1, -1)
