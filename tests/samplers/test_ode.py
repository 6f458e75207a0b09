"""Euler and Heun against the exact solution for Gaussian data, and the grids and priors of the objectives."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.samplers.gaussian import LABELS, MEAN, STD, GaussianEDM, GaussianVelocity, noise, unasked
from tread_composer.objectives import EDM, FlowMatching
from tread_composer.samplers import SAMPLERS, Equation, euler, heun

CASES = {'flow_matching': (FlowMatching(), GaussianVelocity), 'edm': (EDM(), GaussianEDM)}


def solution(name: str, start: Tensor) -> Tensor:
    """Where the exact equation ends: x keeps its place within the Gaussian, whose mean and spread move."""
    if name == 'flow_matching':
        return MEAN + STD * start
    return MEAN + (start - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)


class Plain:
    """An objective that is its drift."""

    def __init__(self, drift: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._drift = drift

    def drift(self, denoiser: object, labels_B: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        return self._drift


def plain(drift: Callable[[Tensor, Tensor], Tensor]) -> Equation:
    return Equation(Plain(drift), GaussianVelocity(), LABELS)


def error(name: str, sampler: str, num_steps: int) -> float:
    objective, network = CASES[name]
    start = objective.prior(noise())
    end = SAMPLERS[sampler](Equation(objective, network(), LABELS), start, objective.sampling_times(num_steps), unasked)
    assert end.dtype == torch.float64
    return float((end - solution(name, start)).abs().max())


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize(('sampler', 'order'), [('euler', 1), ('heun', 2)])
def test_convergence_to_the_exact_solution_has_the_sampler_s_order(name: str, sampler: str, order: int) -> None:
    errors = [error(name, sampler, num_steps) for num_steps in (20, 40, 80)]
    orders = [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]
    assert errors[-1] < {1: 0.05, 2: 0.002}[order]
    assert orders == pytest.approx([order, order], abs=0.35)


@pytest.mark.parametrize(
    ('name', 'sampler', 'calls'),
    [('flow_matching', 'euler', 40), ('edm', 'euler', 40), ('flow_matching', 'heun', 80), ('edm', 'heun', 79)],
)
def test_forty_steps_make_the_published_number_of_calls(name: str, sampler: str, calls: int) -> None:
    objective, network = CASES[name]
    denoiser = network()
    equation = Equation(objective, denoiser, LABELS)
    SAMPLERS[sampler](equation, objective.prior(noise()), objective.sampling_times(40), unasked)
    assert denoiser.calls == len(equation.clock.times) == calls


def test_heun_is_the_textbook_s_method_in_every_step_of_flow_matching() -> None:
    """Against the formula in numpy, on the velocity written out; ending with Euler's step it is 5 times as far off."""

    def velocity(x: np.ndarray, t: float) -> np.ndarray:
        return -MEAN + (t - (1 - t) * STD**2) / ((1 - t) ** 2 * STD**2 + t**2) * (x - (1 - t) * MEAN)

    num_steps, start = 25, noise().double().numpy()
    times, x, step = np.linspace(1, 0, num_steps + 1), start, 1 / num_steps
    for time, next_time in pairwise(times):
        slope = velocity(x, time)
        ended_by_euler = x - step * slope
        x = x - step * (slope + velocity(ended_by_euler, next_time)) / 2
    objective, exact = FlowMatching(), MEAN + STD * start
    equation = Equation(objective, GaussianVelocity(), LABELS)
    end = heun(equation, noise(), objective.sampling_times(num_steps), unasked).numpy()
    np.testing.assert_allclose(end, x, rtol=0, atol=1e-6)
    assert abs(ended_by_euler - exact).max() > 5 * abs(end - exact).max()


def test_heun_is_second_order_where_the_last_time_is_not_zero() -> None:
    times = torch.tensor([1.0, 0.5], dtype=torch.float64)
    out = heun(plain(lambda x, time: x * time), torch.ones(1, 1, 1, 1), times, unasked)
    # slope 1 at time 1, ahead 0.5, slope 0.25 there: 1 - 0.5 * (1 + 0.25) / 2
    assert out.item() == 0.6875


@pytest.mark.parametrize('sampler', [euler, heun])
def test_one_step_to_zero_is_an_euler_step(sampler: Callable) -> None:
    times = torch.tensor([2.0, 0.0], dtype=torch.float64)
    assert SAMPLERS[sampler.__name__] is sampler
    assert sampler(plain(lambda x, time: 3 * x * time), torch.ones(1), times, unasked).item() == -11.0


def test_edm_times_are_karras_sigmas_then_zero() -> None:
    times = EDM().sampling_times(18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    torch.testing.assert_close(times, torch.tensor([*expected, 0.0], dtype=torch.float64), rtol=1e-10, atol=0)
    assert times.dtype == torch.float64
    torch.testing.assert_close(EDM().sampling_times(1), torch.tensor([80.0, 0.0], dtype=torch.float64))


def test_priors() -> None:
    assert torch.equal(FlowMatching().prior(noise()), noise().double())
    assert torch.equal(EDM(sigma_max=10.0).prior(noise()), 10 * noise().double())
    assert FlowMatching().prior(noise()).dtype == EDM().prior(noise()).dtype == torch.float64


def test_labels_reach_the_denoiser_in_sampling() -> None:
    class LabelEcho(nn.Module):
        num_tokens = 1

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return labels.view(-1, 1, 1, 1).expand_as(x).bfloat16()

    drift = FlowMatching().drift(LabelEcho(), torch.tensor([1, 2, 3]))
    velocity = drift(noise().double(), torch.tensor(0.5, dtype=torch.float64))
    assert velocity.dtype == torch.float64
    assert velocity[:, 0, 0, 0].tolist() == [1.0, 2.0, 3.0]
