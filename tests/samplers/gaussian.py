"""Perfect networks for data whose pixels are all N(MEAN, STD^2): every equation can be solved by hand."""

from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.samplers import SAMPLERS, Equation, check_sampler

MEAN, STD = 0.4, 0.7
LABELS = torch.zeros(3, dtype=torch.long)


class GaussianVelocity(nn.Module):
    """For flow matching: ``E[noise - x | x_t]``."""

    num_tokens = 1

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        assert x.dtype == t.dtype == torch.float32
        x, t = x.double(), t.double().view(-1, 1, 1, 1)
        variance = (1 - t) ** 2 * STD**2 + t**2
        return -MEAN + (t - (1 - t) * STD**2) / variance * (x - (1 - t) * MEAN)


class GaussianEDM(GaussianVelocity):
    """For EDM, behind the preconditioning with ``sigma_data`` 0.5."""

    def forward(self, x: Tensor, c_noise: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        assert x.dtype == c_noise.dtype == torch.float32
        sigma = torch.exp(4 * c_noise.double()).view(-1, 1, 1, 1)
        root = torch.sqrt(sigma**2 + 0.25)
        noisy = x.double() * root
        denoised = (MEAN * sigma**2 + STD**2 * noisy) / (sigma**2 + STD**2)
        return (denoised - 0.25 / root**2 * noisy) / (sigma * 0.5 / root)


def noise(seed: int = 2, *shape: int) -> Tensor:
    return torch.randn(*(shape or (3, 2, 2, 2)), generator=torch.Generator().manual_seed(seed))


def draw_checked(name: str, objective: Any, settings: dict[str, Any]) -> Tensor:
    """Two steps, as the model takes them: what the check lets pass, the sampler itself may still refuse."""
    check_sampler(name, objective, settings)
    times, equation = objective.sampling_times(2), Equation(objective, GaussianVelocity(), LABELS)
    return SAMPLERS[name](equation, noise(), times, lambda step: noise(), **settings)


def unasked(step: int) -> Tensor:
    raise AssertionError(f'step {step} drew noise')
