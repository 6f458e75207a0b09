"""Flow matching and EDM against a second implementation that goes sample by sample in plain Python."""

import math
from statistics import NormalDist

import pytest
import torch

from tests.objectives.denoisers import Affine, batch
from tread_composer.objectives import EDM, FlowMatching, LogitNormal

QUANTILES = torch.tensor([0.03, 0.4, 0.5, 0.9])


def slow_affine(x: float, t: float, label: int) -> float:
    return 0.7 * x + 0.3 * t + 0.1 * label


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
    default = FlowMatching()  # logit-normal times, 0 and 1
    objective = default if (mean, std) == (0.0, 1.0) else FlowMatching(LogitNormal(mean, std))
    out = objective(Affine(), latents, labels, noise, QUANTILES)
    torch.testing.assert_close(out['loss'], torch.tensor(slow_flow_matching(mean, std)), rtol=1e-5, atol=0)


@pytest.mark.parametrize('sigma_data', [0.5, 0.82])
def test_edm_equals_the_slow_implementation(sigma_data: float) -> None:
    latents, labels, noise = batch()
    out = EDM(sigma_data=sigma_data)(Affine(), latents, labels, noise, QUANTILES)
    torch.testing.assert_close(out['loss'], torch.tensor(slow_edm(sigma_data)), rtol=1e-4, atol=0)
