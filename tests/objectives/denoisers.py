"""Networks for losses: one that depends on all it is given and notes it, and what it reads."""

import torch
from torch import Tensor, nn


class Affine(nn.Module):
    """``weight x + 0.3 t + 0.1 label``; further channels repeat the first ones."""

    num_tokens = 4

    def __init__(self, out_channels: int = 2, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.dtype, self.out_channels = dtype, out_channels
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((x.detach(), t.detach(), labels))
        out = self.weight * x + (0.3 * t + 0.1 * labels).view(-1, 1, 1, 1)
        return out.repeat(1, 2, 1, 1)[:, : self.out_channels].to(self.dtype)


def batch(scale: float = 0.6, size: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, labels and noise."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(size, 2, 3, 3, generator=generator) * scale
    return latents, torch.tensor([0, 3, 1, 7, 2, 2][:size]), torch.randn(size, 2, 3, 3, generator=generator)
