"""EDM's churn and flow matching's SDE, on Gaussian data whose exact answer is known."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.samplers.gaussian import LABELS, MEAN, STD, GaussianEDM, GaussianVelocity, noise, unasked
from tread_composer.objectives import EDM, FlowMatching
from tread_composer.samplers import Equation, edm_heun, heun, sde


def fresh(step: int) -> Tensor:
    return noise(100 + step, 3, 8, 64, 64).double()


def draw(sampler, objective, network, num_steps: int, **settings: float) -> Tensor:
    start = objective.prior(noise(4, 3, 8, 64, 64))
    return sampler(Equation(objective, network, LABELS), start, objective.sampling_times(num_steps), fresh, **settings)


@pytest.mark.parametrize(
    ('settings', 'num_steps'),
    [({'S_churn': 20.0}, 120), ({'S_churn': 1000.0, 'S_min': 0.05, 'S_max': 50.0}, 240)],
)
def test_churn_keeps_the_distribution(settings: dict[str, float], num_steps: int) -> None:
    samples = draw(edm_heun, EDM(), GaussianEDM(), num_steps, **settings)
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(STD, abs=0.01)
    without = draw(edm_heun, EDM(), GaussianEDM(), num_steps)
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), without.flatten()]))[0, 1]) < 0.9  # it did add noise


def test_one_step_with_churn_is_algorithm_2_by_hand() -> None:
    times = torch.tensor([2.0, 1.0], dtype=torch.float64)
    network, objective, x = GaussianEDM(), EDM(), noise().double()
    drift = objective.drift(network, LABELS)
    raised = torch.tensor(2.0 * (1 + 0.3), dtype=torch.float64)
    there = x + math.sqrt(2.6**2 - 2.0**2) * 1.1 * 0.5
    slope = drift(there, raised)
    ahead = there + (1 - raised) * slope
    expected = there + (1 - raised) * (slope + drift(ahead, times[1])) / 2
    equation = Equation(objective, network, LABELS)
    found = edm_heun(equation, x, times, lambda step: torch.full_like(x, 0.5), S_churn=0.3, S_noise=1.1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('settings', [{}, {'S_churn': 30.0, 'S_min': 90.0, 'S_max': 91.0}])
def test_without_churn_it_is_heun_and_asks_for_no_noise(settings: dict[str, float]) -> None:
    objective, times = EDM(), EDM().sampling_times(9)
    equation = Equation(objective, GaussianEDM(), LABELS)
    found = edm_heun(equation, objective.prior(noise()), times, unasked, **settings)
    expected = heun(equation, objective.prior(noise()), times, unasked)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_sde_keeps_the_distribution() -> None:
    samples = draw(sde, FlowMatching(), GaussianVelocity(), 250)
    # Its last step of 0.04 leaves about 0.4% of spread, and Euler-Maruyama another.
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(STD, abs=0.02)
    equation = Equation(FlowMatching(), GaussianVelocity(), LABELS)
    other = sde(equation, fresh(-1), FlowMatching().sampling_times(250), fresh)
    # Two starts, one noise: little of the start is left, unlike in the ODE.
    start = noise(4, 3, 8, 64, 64).double()
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), start.flatten()]))[0, 1]) < 0.5
    assert not torch.allclose(samples, other, atol=0.1)


def sit(network, x: Tensor, num_steps: int, kind: str, size: float, w: float, fresh) -> Tensor:
    """SiT's loop in its own time s = 1 - t, data = alpha(s): Euler-Maruyama up to 1 - size, then a last step."""
    alpha, sigma = lambda s: s, lambda s: 1 - s

    def at(s: float) -> tuple[Tensor, Tensor, Tensor]:
        velocity = -network(x.float(), torch.full((3,), 1 - s, dtype=torch.float64).float(), LABELS).double()
        score = (alpha(s) * velocity - x) / (sigma(s) * (alpha(s) + sigma(s)))
        return velocity, score, velocity + w * sigma(s) * score

    grid = torch.linspace(0, 1 if kind == 'none' else 1 - size, num_steps + (kind == 'none'), dtype=torch.float64)
    for step, (s, following) in enumerate(pairwise(grid.tolist())):
        x = x + (following - s) * at(s)[2] + math.sqrt(2 * w * sigma(s) * (following - s)) * fresh(step)
    s = 1 - size
    if kind == 'mean':
        return x + size * at(s)[2]
    return x if kind == 'none' else x / alpha(s) + sigma(s) ** 2 / alpha(s) * at(s)[1]


@pytest.mark.parametrize(
    ('settings', 'kind', 'size', 'w'),
    [
        ({}, 'mean', 0.04, 1.0),
        ({'last_step': 0.2, 'diffusion': 0.7}, 'mean', 0.2, 0.7),
        ({'last_step': 0.1, 'diffusion': 0.7, 'last_step_kind': 'tweedie'}, 'tweedie', 0.1, 0.7),
        ({'diffusion': 0.7, 'last_step_kind': 'none'}, 'none', 0.04, 0.7),
    ],
)
@pytest.mark.parametrize('num_steps', [1, 2, 9])
def test_the_sde_is_sit_s(settings: dict, kind: str, size: float, w: float, num_steps: int) -> None:
    network, start, asked = GaussianVelocity(), noise().double(), []

    def fresh(step: int) -> Tensor:
        asked.append(step)
        return noise(50 + step).double()

    expected = sit(network, start, num_steps, kind, size, w, fresh)
    network.calls = 0
    asked.clear()
    equation, times = Equation(FlowMatching(), network, LABELS), FlowMatching().sampling_times(num_steps)
    drawn = sde(equation, start, times, fresh, **settings)
    if num_steps > 1:  # one step goes all the way
        torch.testing.assert_close(drawn, expected, rtol=1e-5, atol=1e-5)
    assert network.calls == num_steps and asked == list(range(num_steps - (kind != 'none')))


def test_without_diffusion_the_sde_is_the_ode() -> None:
    found = draw(sde, FlowMatching(), GaussianVelocity(), 400, diffusion=0.0)
    start = noise(4, 3, 8, 64, 64).double()
    assert (found - (MEAN + STD * start)).abs().max() < 0.05
