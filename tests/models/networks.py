"""Small networks with no zero weight left (a fresh one predicts 0 whatever its blocks do), and what they read."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import randomised
from tread_composer.models import DiT, LightningDiT, Mamba2DiT

SMALL: dict[str, Any] = {'latent_size': 8, 'in_channels': 3, 'patch_size': 2, 'hidden_size': 24}
MORE: dict[type, dict[str, Any]] = {
    DiT: {'depth': 2, 'num_heads': 3},
    LightningDiT: {'depth': 3, 'num_heads': 3},
    Mamba2DiT: {'depth': 4, 'head_size': 8, 'state_size': 5},
}


def fresh_net(backbone: type, num_classes: int = 5, **changes: Any) -> Any:
    return backbone(**{**SMALL, **MORE[backbone], **changes}, num_classes=num_classes)


def random_net(backbone: type, num_classes: int = 5, **changes: Any) -> Any:
    model = randomised(fresh_net(backbone, num_classes, **changes), seed=3)
    if backbone is not Mamba2DiT:
        for parameter in model.parameters():
            parameter.data *= 2 if parameter.requires_grad else 1
    return model


def inputs(batch_size: int = 3, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(5))
    return x, torch.linspace(-1.5, 0.9, batch_size), torch.arange(batch_size)


def on_meta(backbone: Any, name: str, latent_size: int = 32, channels: int = 4, **changes: Any) -> Any:
    """A published size, without memory."""
    with torch.device('meta'):
        sizes = {**backbone.presets[name], **changes}
        return backbone(latent_size=latent_size, in_channels=channels, num_classes=1000, **sizes)


def macs(model: Any) -> float:
    """Multiply-adds of one image through a network on the meta device."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        x = torch.empty(1, model.in_channels, model.latent_size, model.latent_size)
        model(x, torch.empty(1), torch.empty(1, dtype=torch.long))
    return counter.get_total_flops() / 2


# The parts of the slow second implementations.


def linear_of(weights: dict[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    return lambda name, v: v @ weights[f'{name}.weight'].T + weights.get(f'{name}.bias', 0.0)


def silu(v: Tensor) -> Tensor:
    return v / (1 + torch.exp(-v))


def gelu(v: Tensor) -> Tensor:
    return v / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))


def slow_position(width: int, row: int, column: int) -> Tensor:
    quarter = width // 4
    parts = []
    for coordinate in (column, row):
        angles = [coordinate / 10000 ** (k / quarter) for k in range(quarter)]
        parts += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(parts, dtype=torch.float64)
