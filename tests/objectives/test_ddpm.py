"""The DDPM objective against the formulas of its papers, written out once more in scalar float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import ndtr  # float64, with erfc in its tails
from torch import Tensor, nn

from tests.objectives import denoisers
from tread_composer.objectives import DDPM, MinSNR
from tread_composer.objectives.ddpm import evenly_spaced

QUANTILES = torch.tensor([0.0004, 0.0304, 0.2504, 0.5004, 0.9004, 0.9996])
TIMESTEPS = [0, 30, 250, 500, 900, 999]  # floor(1000 u)


class Affine(nn.Module):
    """Noise and variance fraction that depend on all that the network is told."""

    num_tokens = 4

    def __init__(self, out_channels: int = 4) -> None:
        super().__init__()
        self.for_noise = nn.Parameter(torch.tensor(0.7))
        self.for_variance = nn.Parameter(torch.tensor(-0.4))
        self.out_channels = out_channels
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((x.detach(), t.detach(), labels))
        extra = (0.0001 * t + 0.05 * labels).view(-1, 1, 1, 1)
        out = torch.cat([self.for_noise * x + extra, self.for_variance * x + extra], dim=1)
        return out.repeat(1, 2, 1, 1)[:, : self.out_channels]


class Fixed(nn.Module):
    """Says what it was given, whatever it is asked."""

    num_tokens = 4

    def __init__(self, noise: Tensor, v: Tensor) -> None:
        super().__init__()
        self.out = torch.cat([noise, v], dim=1)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return self.out


def batch(scale: float = 0.8) -> tuple[Tensor, Tensor, Tensor]:
    return denoisers.batch(scale, size=6)


def slow_betas(schedule: str, steps: int) -> list[float]:
    if schedule == 'linear':
        return [1e-4 + (0.02 - 1e-4) * t / (steps - 1) for t in range(steps)]

    def wanted(t: float) -> float:
        return math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - wanted(t + 1) / wanted(t), 0.999) for t in range(steps)]


def slow_chain(schedule: str = 'linear', steps: int = 1000) -> list[dict[str, float]]:
    """Each timestep's constants, as the papers define them."""
    chain, bar = [], 1.0
    for beta in slow_betas(schedule, steps):
        before, bar = bar, bar * (1 - beta)
        row = {'beta': beta, 'bar': bar, 'before': before, 'tilde': (1 - before) / (1 - bar) * beta}
        row['clipped'] = row['tilde'] if chain else math.nan
        chain.append(row)
    chain[0]['clipped'] = chain[1]['tilde']
    return chain


def normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def slow_losses(chain: list[dict[str, float]], scale: float = 0.8, gamma: float = math.inf) -> dict[str, list[float]]:
    latents, labels, noise = (tensor.double() for tensor in batch(scale))
    losses: dict[str, list[float]] = {'loss': [], 'mse': [], 'vlb': []}
    for i, t in enumerate(TIMESTEPS):
        row = chain[t]
        squares, bits = [], []
        for x, n in zip(latents[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            noisy = math.sqrt(row['bar']) * x + math.sqrt(1 - row['bar']) * n
            eps = 0.7 * noisy + 0.0001 * t + 0.05 * float(labels[i])
            v = -0.4 * noisy + 0.0001 * t + 0.05 * float(labels[i])
            squares.append((eps - n) ** 2)
            variance = math.exp((v + 1) / 2 * math.log(row['beta']) + (1 - v) / 2 * math.log(row['clipped']))
            data = (noisy - math.sqrt(1 - row['bar']) * eps) / math.sqrt(row['bar'])

            def posterior_mean(data: float, row: dict[str, float] = row, noisy: float = noisy) -> float:
                of_data = math.sqrt(row['before']) * row['beta'] / (1 - row['bar'])
                of_noisy = math.sqrt(1 - row['beta']) * (1 - row['before']) / (1 - row['bar'])
                return of_data * data + of_noisy * noisy

            mean, std = posterior_mean(data), math.sqrt(variance)
            if t == 0:
                above, below = normal_cdf((x + 1 / 255 - mean) / std), normal_cdf((x - 1 / 255 - mean) / std)
                share = above if x < -0.999 else 1 - below if x > 0.999 else above - below
                bits.append(-math.log2(max(share, 1e-12)))
            else:
                apart = (posterior_mean(x) - mean) ** 2
                nats = math.log(std / math.sqrt(row['tilde'])) + (row['tilde'] + apart) / (2 * variance) - 0.5
                bits.append(nats / math.log(2))
        snr = row['bar'] / (1 - row['bar'])
        losses['mse'].append(sum(squares) / len(squares))
        losses['vlb'].append(sum(bits) / len(bits))
        losses['loss'].append(min(snr, gamma) / snr * losses['mse'][-1] + losses['vlb'][-1])
    return losses


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
@pytest.mark.parametrize('scale', [0.8, 0.05])  # with 0.8, values of the first sample lie beyond both open bins
def test_losses_equal_the_slow_implementation(schedule: str, scale: float) -> None:
    latents, labels, noise = batch(scale)
    out = DDPM(schedule=schedule)(denoiser := Affine(), latents, labels, noise, QUANTILES)  # type: ignore[arg-type]
    ((x, t, seen_labels),) = denoiser.seen
    assert t.tolist() == TIMESTEPS and t.dtype == torch.int64  # FSDP in bfloat16 would round floats
    assert torch.equal(seen_labels, labels)
    chain = slow_chain(schedule)
    bar = chain[900]['bar']
    torch.testing.assert_close(x[4], math.sqrt(bar) * latents[4] + math.sqrt(1 - bar) * noise[4])
    expected = slow_losses(chain, scale)
    assert out.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(out[name], torch.tensor(values), rtol=2e-4, atol=0, msg=name)
    assert (scale == 0.8) == bool((latents[0] < -0.999).any() and (latents[0] > 0.999).any())


def test_every_timestep_has_the_same_share_of_the_quantiles() -> None:
    denoiser = Affine(2)
    u = (torch.arange(4000) + 0.5) / 4000
    zeros = torch.zeros(4000, 2, 1, 1)
    DDPM(num_timesteps=40, learned_variance=False)(denoiser, zeros, torch.zeros(4000, dtype=torch.int64), zeros, u)
    assert torch.equal(denoiser.seen[0][1].long().bincount(minlength=40), torch.full((40,), 100))
    edges = torch.tensor([2.0**-25, 1 - 2.0**-24])
    DDPM(learned_variance=False)(denoiser, zeros[:2], torch.zeros(2, dtype=torch.int64), zeros[:2], edges)
    assert denoiser.seen[1][1].tolist() == [0, 999]


@pytest.mark.parametrize('schedule', ['linear', 'cosine'])
@pytest.mark.parametrize('steps', [2, 50, 1000])
def test_alpha_bars_are_those_of_the_schedule(schedule: str, steps: int) -> None:
    found = DDPM(num_timesteps=steps, schedule=schedule).alphas_cumprod  # type: ignore[arg-type]
    assert found.dtype == torch.float64 and found.shape == (steps,)
    np.testing.assert_allclose(found.numpy(), [row['bar'] for row in slow_chain(schedule, steps)], rtol=1e-9)


def test_the_bound_of_a_perfect_model_is_zero_and_of_one_with_the_largest_variance_what_theory_says() -> None:
    latents, labels, noise = batch()
    chain = slow_chain()
    for v, variance in ((-1.0, 'clipped'), (1.0, 'beta')):
        out = DDPM()(Fixed(noise, torch.full_like(noise, v)), latents, labels, noise, QUANTILES)
        assert out['mse'].abs().max() == 0
        assert torch.equal(out['loss'], out['vlb'])
        for i, t in enumerate(TIMESTEPS[1:], start=1):
            ratio = chain[t]['tilde'] / chain[t][variance]
            expected = (ratio - 1 - math.log(ratio)) / 2 / math.log(2)
            assert out['vlb'][i].item() == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # t = 0: the bin of width 2/255 around the very mean, with the standard deviation sqrt(beta_0) = 0.01.
    inside = 0.1 * torch.ones_like(latents)
    first = DDPM()(Fixed(noise, torch.ones_like(noise)), inside, labels, noise, torch.full((6,), 1e-4))['vlb']
    expected = -math.log2(2 * normal_cdf(1 / 255 / 0.01) - 1)
    torch.testing.assert_close(first, torch.full((6,), expected), rtol=1e-4, atol=0)


@pytest.mark.parametrize('deviations', [0.0, 1.0, 4.0, 5.6, 6.0, 6.9])
def test_the_likelihood_of_a_bin_far_from_the_mean_is_that_of_float64(deviations: float) -> None:
    """At t = 0 the mean is off by 0.01 for each unit of the noise's error, and the standard deviation is 0.01."""
    latents, labels, noise = batch()
    inside, wrong = torch.zeros_like(latents), noise + deviations * math.sqrt(1 - 1e-4)
    out = DDPM()(Fixed(wrong, torch.ones_like(noise)), inside, labels, noise, torch.full((6,), 1e-4))['vlb']
    half_bin = 1 / 255 / 0.01
    expected = -math.log2(ndtr(half_bin - deviations) - ndtr(-half_bin - deviations))
    torch.testing.assert_close(out, torch.full((6,), expected), rtol=1e-4, atol=0)


def test_the_bound_trains_the_variance_only_and_the_error_the_noise_only() -> None:
    gradients = {}
    for term in ('vlb', 'mse'):
        denoiser = Affine()
        DDPM()(denoiser, *batch(), QUANTILES)[term].sum().backward()
        gradients[term] = (denoiser.for_noise.grad, denoiser.for_variance.grad)
    assert gradients['vlb'][0] is None or gradients['vlb'][0] == 0
    assert gradients['vlb'][1] != 0
    assert gradients['mse'][0] != 0
    assert gradients['mse'][1] is None or gradients['mse'][1] == 0


def test_without_learned_variance_there_is_the_error_alone() -> None:
    latents, labels, noise = batch()
    out = DDPM(learned_variance=False)(Affine(2), latents, labels, noise, QUANTILES)
    full = DDPM()(Affine(4), latents, labels, noise, QUANTILES)
    assert out.keys() == {'loss'}
    assert torch.equal(out['loss'], full['mse'])


@pytest.mark.parametrize('learned', [True, False])
def test_min_snr_weighs_the_error_and_not_the_bound(learned: bool) -> None:
    latents, labels, noise = batch()
    objective = DDPM(learned_variance=learned, weighting=MinSNR(5.0))
    out = objective(Affine(4 if learned else 2), latents, labels, noise, QUANTILES)
    expected = slow_losses(slow_chain(), gamma=5.0)
    torch.testing.assert_close(out['mse'], torch.tensor(expected['mse']), rtol=2e-4, atol=0)
    weighted = torch.tensor(expected['loss']) - (0 if learned else torch.tensor(expected['vlb']))
    torch.testing.assert_close(out['loss'], weighted, rtol=2e-4, atol=1e-6)
    assert out['loss'][5] >= out['mse'][5]  # the noisiest is not made lighter


def test_losses_are_float32_per_sample_and_finite_for_a_wild_network() -> None:
    latents, labels, noise = batch()
    wild = Fixed(1e4 * noise, 20 * torch.ones_like(noise))
    with torch.autocast('cpu', torch.bfloat16):
        out = DDPM()(wild, latents.bfloat16(), labels, noise, QUANTILES)
    assert {(value.dtype, tuple(value.shape)) for value in out.values()} == {(torch.float32, (6,))}
    assert all(value.isfinite().all() for value in out.values())


@pytest.mark.parametrize(
    ('steps', 'of', 'expected'),
    [
        (3, 10, [0, 4, 9]),  # 4.5 to the even neighbour
        (2, 10, [0, 9]),
        (4, 10, [0, 3, 6, 9]),
        (10, 10, list(range(10))),
        (1000, 1000, list(range(1000))),
        (1, 1000, [999]),
        (3, 1000, [0, 500, 999]),
        (250, 1000, [round(i * 999 / 249) for i in range(250)]),  # DiT's, at strides of 4 and 5
    ],
)
def test_evenly_spaced_timesteps(steps: int, of: int, expected: list[int]) -> None:
    assert evenly_spaced(of, steps) == expected
    assert len(set(expected)) == steps


def test_the_stride_is_added_up_as_the_published_code_does() -> None:
    position, expected = 0.0, []
    for _ in range(43):
        expected.append(round(position))
        position += 999 / 42
    assert evenly_spaced(1000, 43) == expected != [round(i * 999 / 42) for i in range(43)]


def test_sampling_times_are_the_noise_levels_of_the_timesteps() -> None:
    times = DDPM().sampling_times(3)
    bars = [slow_chain()[t]['bar'] for t in (999, 500, 0)]
    np.testing.assert_allclose(times.numpy(), [*(math.sqrt((1 - bar) / bar) for bar in bars), 0.0], rtol=1e-9)
    assert times.dtype == torch.float64


def test_objectives_with_equal_settings_are_equal() -> None:
    assert DDPM() == DDPM(num_timesteps=1000) != DDPM(num_timesteps=999)


def test_known_alpha_bars() -> None:
    linear, cosine = DDPM().alphas_cumprod, DDPM(schedule='cosine').alphas_cumprod
    assert linear[0].item() == pytest.approx(0.9999)
    assert linear[-1].item() == pytest.approx(4.0358e-5, rel=1e-3)
    assert cosine[499].item() == pytest.approx(0.4938, abs=1e-3)
    betas = 1 - cosine[1:] / cosine[:-1]
    assert betas.max().item() == pytest.approx(0.999, abs=1e-9)
