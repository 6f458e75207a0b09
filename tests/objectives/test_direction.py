"""FasterDiT's velocity-direction loss against loops over samples and pixels, and how it joins the squared error."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_dit
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import FlowMatching, MinSNR, Uniform
from tread_composer.objectives.flow_matching import direction_error

QUANTILES = torch.tensor([0.03, 0.4, 0.9])
LABELS = torch.tensor([0, 3, 1])


class Mixing:
    """Every output channel depends on two input channels, the time and the label."""

    num_tokens = 4

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return x.flip(1) * 0.4 + 0.3 * x + (0.2 * t + 0.1 * labels).view(-1, 1, 1, 1)


def batch(channels: int = 3, side: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, channels, side, side)
    return torch.randn(shape, generator=generator) * 0.6, LABELS, torch.randn(shape, generator=generator)


def cosine(a: list[float], b: list[float]) -> float:
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a)) / math.sqrt(sum(q * q for q in b))


def slow_terms(patch: int, channels: int = 3) -> tuple[list[float], list[float]]:
    """Squared error and direction loss of each sample, pixel by pixel."""
    latents, labels, noise = batch(channels)
    side = latents.shape[-1]
    squares, directions = [], []
    for i, t in enumerate(QUANTILES.tolist()):
        x, n = latents[i].tolist(), noise[i].tolist()
        noisy = [
            [[(1 - t) * x[c][h][w] + t * n[c][h][w] for w in range(side)] for h in range(side)] for c in range(channels)
        ]
        shift = 0.2 * t + 0.1 * int(labels[i])
        total, cosines = 0.0, []
        for top in range(0, side, patch):
            for left in range(0, side, patch):
                predicted, target = [], []
                for h in range(top, top + patch):
                    for w in range(left, left + patch):
                        for c in range(channels):
                            predicted.append(0.4 * noisy[channels - 1 - c][h][w] + 0.3 * noisy[c][h][w] + shift)
                            target.append(n[c][h][w] - x[c][h][w])
                total += sum((p - q) ** 2 for p, q in zip(predicted, target, strict=True))
                cosines.append(cosine(predicted, target))
        squares.append(total / (channels * side * side))
        directions.append(1 - sum(cosines) / len(cosines))
    return squares, directions


@pytest.mark.parametrize(('patch', 'channels'), [(1, 3), (2, 3), (2, 1), (4, 1)])
def test_terms_equal_the_slow_implementation(patch: int, channels: int) -> None:
    objective = FlowMatching(Uniform(), direction_weight=0.7, direction_patch=patch)
    out = objective(Mixing(), *batch(channels), QUANTILES)
    squares, directions = (torch.tensor(values) for values in slow_terms(patch, channels))
    torch.testing.assert_close(out['mse'], squares, rtol=1e-5, atol=0)
    torch.testing.assert_close(out['direction'], directions, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out['loss'], squares + 0.7 * directions, rtol=1e-5, atol=0)


def test_the_switch_is_for_each_sample_and_leaves_the_terms_visible() -> None:
    objective = FlowMatching(Uniform(), direction_weight=2.0, weighting=MinSNR())
    on = objective(Mixing(), *batch(), QUANTILES)
    switched = objective(Mixing(), *batch(), QUANTILES, direction_switch_B=torch.tensor([1.0, 0.0, 1.0]))
    weighted = FlowMatching(Uniform(), weighting=MinSNR())(Mixing(), *batch(), QUANTILES)['loss']
    assert torch.equal(switched['direction'], on['direction']) and torch.equal(switched['mse'], on['mse'])
    assert torch.equal(switched['loss'][[0, 2]], on['loss'][[0, 2]])
    assert switched['loss'][1] == weighted[1] != on['loss'][1]


def test_the_first_step_of_a_fresh_network_has_no_huge_gradient() -> None:
    """Its output is exactly 0, which has no direction; a tiny epsilon would make gradients of 10^8."""
    model = DiT(latent_size=4, in_channels=3, num_classes=10, patch_size=2, hidden_size=16, depth=1, num_heads=2)
    out = FlowMatching(direction_weight=1.0)(model, *batch(), QUANTILES)
    assert out['direction'].tolist() == [1.0, 1.0, 1.0]
    gradients = {}
    for name in ('mse', 'direction'):
        model.zero_grad()
        out[name].mean().backward(retain_graph=True)
        gradients[name] = max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)
    assert 0 < gradients['direction'] < 200 * gradients['mse']


def test_one_channel_has_no_direction() -> None:
    for shape, patch, message in (((1, 8, 8), 1, 'one channel'), ((1, 8, 8), 3, 'does not divide latents of 8 x 8')):
        objective = FlowMatching(direction_weight=1.0, direction_patch=patch)
        with pytest.raises(ValueError, match=message):
            LatentDiffusion(tiny_dit(), objective, latent_shape=shape, num_classes=10)
    for objective in (FlowMatching(direction_patch=3), FlowMatching(direction_weight=1.0, direction_patch=2)):
        LatentDiffusion(tiny_dit(), objective, latent_shape=(1, 8, 8), num_classes=10)


def test_sampling_shift_moves_the_times_between_the_ends() -> None:
    times = FlowMatching(sampling_shift=3.0).sampling_times(4)
    assert times.dtype == torch.float64
    assert times.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])
    assert torch.equal(FlowMatching().sampling_times(4), torch.linspace(1, 0, 5, dtype=torch.float64))


def test_the_direction_has_no_length() -> None:
    a, b = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(direction_error(3 * a, b), direction_error(a, 0.5 * b))
    torch.testing.assert_close(direction_error(a, a), torch.zeros(2), rtol=0, atol=1e-6)
    torch.testing.assert_close(direction_error(a, -a), torch.full((2,), 2.0))
