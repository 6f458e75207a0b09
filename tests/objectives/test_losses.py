"""Both objectives against a second implementation that goes sample by sample in plain Python."""

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor, nn

from tread_composer.objectives import EDM, FlowMatching, LogitNormal, Uniform
from tread_composer.objectives.prediction import predict

QUANTILES = torch.tensor([0.03, 0.4, 0.5, 0.9])


class Affine(nn.Module):
    """A denoiser whose output depends on all that it is given, and which notes what that was."""

    num_tokens = 4

    def __init__(self, dtype: torch.dtype = torch.float32, out_channels: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.dtype, self.out_channels = dtype, out_channels
        self.seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.seen.append((x.detach(), t.detach(), labels))
        out = self.weight * x + (0.3 * t + 0.1 * labels).view(-1, 1, 1, 1)
        return out.repeat(1, 2, 1, 1)[:, : self.out_channels].to(self.dtype)


def slow_affine(x: float, t: float, label: int) -> float:
    return 0.7 * x + 0.3 * t + 0.1 * label


def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(4, 2, 3, 3, generator=generator) * 0.6
    return latents, torch.tensor([0, 3, 1, 7]), torch.randn(4, 2, 3, 3, generator=generator)


def slow_flow_matching(mean: float, std: float) -> list[float]:
    latents, labels, noise = batch()
    losses = []
    for i, u in enumerate(QUANTILES.tolist()):
        t = 1 / (1 + math.exp(-(mean + std * NormalDist().inv_cdf(u))))
        errors = []
        for x, n in zip(latents[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            errors.append((slow_affine((1 - t) * x + t * n, t, int(labels[i])) - (n - x)) ** 2)
        losses.append(sum(errors) / len(errors))
    return losses


def slow_edm(data: float) -> list[float]:
    latents, labels, noise = batch()
    losses = []
    for i, u in enumerate(QUANTILES.tolist()):
        s = math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(u))
        root = math.sqrt(s**2 + data**2)
        errors = []
        for x, n in zip(latents[i].flatten().tolist(), noise[i].flatten().tolist(), strict=True):
            noisy = x + s * n
            output = slow_affine(noisy / root, math.log(s) / 4, int(labels[i]))
            denoised = data**2 / root**2 * noisy + s * data / root * output
            errors.append((denoised - x) ** 2 * (s**2 + data**2) / (s * data) ** 2)
        losses.append(sum(errors) / len(errors))
    return losses


@pytest.mark.parametrize(('mean', 'std'), [(0.0, 1.0), (-0.4, 0.6)])
def test_flow_matching_equals_the_slow_implementation(mean: float, std: float) -> None:
    latents, labels, noise = batch()
    out = FlowMatching(LogitNormal(mean, std))(Affine(), latents, labels, noise, QUANTILES)
    torch.testing.assert_close(out['loss'], torch.tensor(slow_flow_matching(mean, std)), rtol=1e-5, atol=0)


def test_flow_matching_tells_the_denoiser_t_unscaled() -> None:
    latents, labels, noise = batch()
    denoiser = Affine()
    FlowMatching(time_distribution=Uniform())(denoiser, latents, labels, noise, QUANTILES)
    (x, t, seen_labels), *_ = denoiser.seen
    assert torch.equal(t, QUANTILES)
    assert torch.equal(seen_labels, labels)
    torch.testing.assert_close(x[3], 0.1 * latents[3] + 0.9 * noise[3])  # t = 1 is noise


def test_flow_matching_trains_on_logit_normal_times_by_default() -> None:
    assert FlowMatching().time_distribution == LogitNormal(0.0, 1.0)


@pytest.mark.parametrize('sigma_data', [0.5, 0.82])
def test_edm_equals_the_slow_implementation(sigma_data: float) -> None:
    latents, labels, noise = batch()
    out = EDM(sigma_data=sigma_data)(Affine(), latents, labels, noise, QUANTILES)
    torch.testing.assert_close(out['loss'], torch.tensor(slow_edm(sigma_data)), rtol=1e-4, atol=0)


def test_edm_draws_the_paper_s_noise_levels() -> None:
    latents, labels, noise = batch()
    denoiser = Affine()
    EDM()(denoiser, latents, labels, noise, QUANTILES)
    sigma = torch.exp(4 * denoiser.seen[0][1])
    expected = [math.exp(-1.2 + 1.2 * NormalDist().inv_cdf(u)) for u in QUANTILES.tolist()]
    torch.testing.assert_close(sigma, torch.tensor(expected), rtol=1e-5, atol=0)


@pytest.mark.parametrize('objective', [FlowMatching(), EDM()])
def test_losses_are_per_sample_differentiable_and_float32_whatever_the_denoiser_returns(
    objective: FlowMatching | EDM,
) -> None:
    latents, labels, noise = batch()
    exact = objective(Affine(), latents, labels, noise, QUANTILES)['loss']
    denoiser = Affine(torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        loss = objective(denoiser, latents.bfloat16(), labels, noise.bfloat16(), QUANTILES)['loss']
    assert loss.shape == (4,)
    assert loss.dtype == exact.dtype == torch.float32
    # Rounding the inputs and the prediction costs 2^-9 each; a loss summed in bfloat16 would be a bfloat16 number.
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    assert not torch.equal(loss, loss.bfloat16().float())
    assert denoiser.seen[0][0].dtype == denoiser.seen[0][1].dtype == torch.float32
    loss.sum().backward()
    assert denoiser.weight.grad != 0


@pytest.mark.parametrize('objective', [FlowMatching(), EDM()])
def test_a_sample_s_loss_does_not_depend_on_its_batch(objective: FlowMatching | EDM) -> None:
    latents, labels, noise = batch()
    together = objective(Affine(), latents, labels, noise, QUANTILES)['loss']
    alone = objective(Affine(), latents[2:3], labels[2:3], noise[2:3], QUANTILES[2:3])['loss']
    torch.testing.assert_close(alone, together[2:3])


@pytest.mark.parametrize('objective', [FlowMatching(), EDM()])
def test_the_global_generator_is_left_alone(objective: FlowMatching | EDM) -> None:
    before = torch.get_rng_state()
    objective(Affine(), *batch(), QUANTILES)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('objective', [FlowMatching(), EDM()])
@pytest.mark.parametrize('channels', [1, 4])
def test_another_number_of_channels_is_refused_in_training_and_sampling(
    objective: FlowMatching | EDM, channels: int
) -> None:
    latents, labels, noise = batch()
    denoiser = Affine(out_channels=channels)
    with pytest.raises(ValueError, match='learn_sigma: false'):
        objective(denoiser, latents, labels, noise, QUANTILES)
    with pytest.raises(ValueError, match='learn_sigma: false'):
        objective.drift(denoiser, labels)(noise.double(), torch.tensor(0.5, dtype=torch.float64))


@pytest.mark.parametrize(
    ('settings', 'message'),
    [
        ({'sigma_data': 0.0}, 'sigma_data=0.0'),
        ({'P_std': -1.0}, 'P_std=-1.0'),
        ({'rho': 0.0}, 'rho=0.0'),
        ({'sigma_min': 0.0}, 'sigma_min=0.0'),
        ({'sigma_min': 2.0, 'sigma_max': 1.0}, 'below sigma_max=1.0'),
    ],
)
def test_impossible_edm_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EDM(**settings)


def test_predictions_are_float32_on_both_sides_of_the_denoiser() -> None:
    latents, labels, _ = batch()
    denoiser = Affine(torch.bfloat16)
    assert predict(denoiser, latents.double(), QUANTILES.double(), labels).dtype == torch.float32
    assert denoiser.seen[0][0].dtype == denoiser.seen[0][1].dtype == torch.float32
