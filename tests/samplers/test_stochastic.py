"""EDM's churn and flow matching's SDE, on Gaussian data whose exact answer is known."""

import math

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_dit
from tests.samplers.test_ode import LABELS, MEAN, STD, GaussianEDM, GaussianVelocity, noise
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.samplers import Equation, check_sampler, edm_heun, heun, integrate, needs, sde


def fresh(step: int) -> Tensor:
    return torch.randn(3, 8, 64, 64, generator=torch.Generator().manual_seed(100 + step)).double()


def draw(sampler, objective, network, num_steps: int, **settings: float) -> Tensor:
    start = objective.prior(torch.randn(3, 8, 64, 64, generator=torch.Generator().manual_seed(4)))
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


def test_fresh_noise_above_one_widens_what_churn_keeps() -> None:
    wide = draw(edm_heun, EDM(), GaussianEDM(), 30, S_churn=10.0, S_noise=1.3)
    assert wide.std() > 1.02 * draw(edm_heun, EDM(), GaussianEDM(), 30, S_churn=10.0).std()


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
    def none(step: int) -> Tensor:
        raise AssertionError(step)

    objective, times = EDM(), EDM().sampling_times(9)
    equation = Equation(objective, GaussianEDM(), LABELS)
    found = edm_heun(equation, objective.prior(noise()), times, none, **settings)
    expected = heun(equation, objective.prior(noise()), times, none)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_sde_keeps_the_distribution() -> None:
    samples = draw(sde, FlowMatching(), GaussianVelocity(), 250)
    # Its last step of 0.04 leaves about 0.4% of spread, and Euler-Maruyama another.
    assert samples.mean() == pytest.approx(MEAN, abs=0.01)
    assert samples.std() == pytest.approx(STD, abs=0.02)
    equation = Equation(FlowMatching(), GaussianVelocity(), LABELS)
    other = sde(equation, fresh(-1), FlowMatching().sampling_times(250), fresh)
    # Two starts, one noise: little of the start is left, unlike in the ODE.
    start = torch.randn(3, 8, 64, 64, generator=torch.Generator().manual_seed(4)).double()
    assert abs(torch.corrcoef(torch.stack([samples.flatten(), start.flatten()]))[0, 1]) < 0.5
    assert not torch.allclose(samples, other, atol=0.1)


def test_two_steps_of_the_sde_by_hand() -> None:
    """In SiT's own time s = 1 - t, from its formulas (4.2 of the methods sheet)."""
    x, network = noise().double(), GaussianVelocity()

    def forward(s: float, x: Tensor) -> tuple[Tensor, Tensor]:
        velocity = -network(x.float(), torch.full((3,), 1 - s, dtype=torch.float64).float(), LABELS).double()
        return velocity, (s * velocity - x) / (1 - s)

    velocity, score = forward(0.0, x)
    size, w = 0.96, 1.0
    x1 = x + size * (velocity + w * score) + math.sqrt(2 * w * size) * 0.25
    velocity, score = forward(0.96, x1)
    expected = x1 + 0.04 * (velocity + 0.04 * score)
    times = FlowMatching().sampling_times(2)
    found = sde(Equation(FlowMatching(), network, LABELS), x, times, lambda step: torch.full_like(x, 0.25))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('num_steps', [1, 2, 7])
def test_the_sde_makes_one_call_a_step_and_asks_for_one_noise_less(num_steps: int) -> None:
    network, asked = GaussianVelocity(), []

    def note(step: int) -> Tensor:
        asked.append(step)
        return noise()

    sde(Equation(FlowMatching(), network, LABELS), noise(), FlowMatching().sampling_times(num_steps), note)
    assert network.calls == num_steps
    assert asked == list(range(num_steps - 1))


def test_without_diffusion_the_sde_is_the_ode() -> None:
    found = draw(sde, FlowMatching(), GaussianVelocity(), 400, diffusion=0.0)
    start = torch.randn(3, 8, 64, 64, generator=torch.Generator().manual_seed(4)).double()
    assert (found - (MEAN + STD * start)).abs().max() < 0.05


@pytest.mark.parametrize(
    ('name', 'objective', 'settings', 'message'),
    [
        ('edm_heun', FlowMatching(), {}, "objective 'edm', which FlowMatching does not have"),
        ('edm_heun', DDPM(), {}, "take 'heun'"),
        ('sde', EDM(), {}, "objective 'flow_matching', which EDM does not have"),
        ('sde', FlowMatching(), {'eta': 1.0}, r"no settings \['eta'\]; it has \['last_step', 'diffusion'\]"),
        ('sde', FlowMatching(), {'last_step': 1.0}, 'last_step=1.0 must be above 0'),
        ('sde', FlowMatching(), {'diffusion': -1.0}, 'diffusion=-1.0'),
        ('edm_heun', EDM(), {'S_churn': -1.0}, 'S_churn=-1.0'),
        ('edm_heun', EDM(), {'S_min': 2.0, 'S_max': 1.0}, 'S_min=2.0'),
    ],
)
def test_what_does_not_fit_is_refused(name: str, objective, settings: dict[str, float], message: str) -> None:
    times, equation = objective.sampling_times(2), Equation(objective, GaussianVelocity(), LABELS)
    with pytest.raises(ValueError, match=message):
        integrate(name, equation, noise(), times, lambda step: noise(), settings)


def test_the_registry_knows_them() -> None:
    check_sampler('edm_heun', EDM, {'S_churn': 1.0, 'S_noise': 1.0, 'S_min': 0.0, 'S_max': 1.0})
    check_sampler('sde', FlowMatching)


@needs('score', 'goes straight along the score', "take 'euler'")
def leap(equation: Equation, x_BCHW: Tensor, times: Tensor, noise, /, *, gain: float = 1.0) -> Tensor:
    """A sampler of another package."""
    return x_BCHW.double() + gain * (times[-1] - times[0]) * equation.drift(x_BCHW.double(), times[0])


def test_a_sampler_of_another_package_is_drawn_with_and_checked_by_its_reference() -> None:
    name = f'{__name__}:leap'
    model = LatentDiffusion(tiny_dit(), FlowMatching(), latent_shape=(1, 8, 8), num_classes=10)
    drawn = model.sample([1, 2], [3, 4], sampler=name, num_steps=1)
    assert torch.equal(drawn, model.sample([1, 2], [3, 4], sampler='euler', num_steps=1))
    other = model.sample([1, 2], [3, 4], sampler=name, num_steps=1, sampler_settings={'gain': 0.5})
    assert (other - drawn).abs().max() > 0.01
    for objective, settings, message in (
        (EDM(), {}, "leap' goes straight along the score, which EDM does not have; take 'euler'"),
        (FlowMatching(), {'gian': 1.0}, r"has no settings \['gian'\]; it has \['gain'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sampler(name, objective, settings)
    for wrong in (f'{__name__}:lap', 'no.such.module:leap'):
        with pytest.raises(ValueError, match=f"'{wrong}' cannot be imported"):
            check_sampler(wrong, FlowMatching())
