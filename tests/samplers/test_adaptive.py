"""``dopri5`` against scipy's RK45 on each sample alone, and against the flow of a Gaussian; guided, in any batch."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor, nn

from tests.helpers import randomised, tiny_dit
from tests.samplers.gaussian import LABELS, MEAN, STD, GaussianEDM, GaussianVelocity, noise, unasked
from tread_composer.core.errors import UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import EDM, FlowMatching
from tread_composer.routing import Route, apply_tread
from tread_composer.samplers import Equation, Evaluations, SamplingSettings, dopri5, guidance_cost


class Wavy:
    """An equation that is easy for some samples and hard for others; no Gaussian, whose velocity is linear in x."""

    continuous_times, drift_at_zero = True, True

    def drift(self, denoiser: object, labels_B: Tensor):
        def slope(x_BCHW: Tensor, time: Tensor) -> Tensor:
            t = time.view(-1, 1, 1, 1)
            rate = 1 + 12 * labels_B.view(-1, 1, 1, 1).double()
            return torch.sin(rate * t + x_BCHW / 10) * rate - x_BCHW.mean(dim=(1, 2, 3), keepdim=True)

        return slope


@pytest.mark.parametrize(('atol', 'rtol'), [(1e-6, 1e-3), (1e-8, 1e-6), (1e-1, 1e-1)])
def test_each_sample_takes_the_steps_of_scipy_s_rk45_alone(atol: float, rtol: float) -> None:
    labels, start, objective = torch.tensor([0, 1, 3, 2]), noise(5, 4, 2, 3, 3).double(), Wavy()
    equation = Equation(objective, None, labels)  # type: ignore[arg-type]
    drawn = dopri5(equation, start, FlowMatching().sampling_times(2), unasked, atol=atol, rtol=rtol)
    counts = []
    for row in range(4):
        slope = objective.drift(None, labels[row : row + 1])

        def flat(t: float, x: np.ndarray, slope=slope) -> np.ndarray:
            return slope(torch.from_numpy(x).view(1, 2, 3, 3), torch.tensor([t], dtype=torch.float64)).flatten().numpy()

        expected = solve_ivp(flat, (1.0, 0.0), start[row].flatten().numpy(), 'RK45', atol=atol, rtol=rtol)
        np.testing.assert_allclose(drawn[row].flatten().numpy(), expected.y[:, -1], rtol=0, atol=1e-9)
        counts.append(expected.nfev)
    assert equation.clock.taken_B.tolist() == counts and len(set(counts)) > 2
    assert len(equation.clock.times) == max(counts)  # one network call for all


@pytest.mark.parametrize(('tolerance', 'close'), [(1e-3, 0.02), (1e-5, 5e-5)])
def test_it_follows_the_flow_of_a_gaussian(tolerance: float, close: float) -> None:
    start = FlowMatching().prior(noise())
    equation = Equation(FlowMatching(), GaussianVelocity(), LABELS)
    drawn = dopri5(equation, start, FlowMatching().sampling_times(2), unasked, atol=1e-6, rtol=tolerance)
    assert (drawn - (MEAN + STD * start)).abs().max() < close
    objective, network = EDM(), GaussianEDM()
    start, equation = objective.prior(noise()), Equation(objective, network, LABELS)
    drawn = dopri5(equation, start, objective.sampling_times(2), unasked, atol=1e-6, rtol=tolerance)
    exact = MEAN + (start - MEAN) * STD / math.sqrt(STD**2 + 80.0**2)
    assert (drawn - exact).abs().max() < close
    assert network.calls == int(equation.clock.taken_B.max()) < 200


def routed(objective=None) -> LatentDiffusion:
    denoiser = tiny_dit()
    apply_tread(denoiser, Route(1, -2, 0.5))
    return LatentDiffusion(denoiser, objective or FlowMatching(), latent_shape=(1, 8, 8), num_classes=10)


GUIDED = {'guidance': 'classifier_free', 'guidance_scale': 3.0}


@pytest.mark.parametrize(
    ('objective', 'more'),
    [(FlowMatching(), {}), (FlowMatching(), {**GUIDED, 'guidance_interval': (0.2, 0.7)}), (EDM(), GUIDED)],
)
def test_an_image_depends_on_its_label_and_seed_and_not_on_the_batch(objective, more: dict) -> None:
    # In float64: products of one sample are computed by another kernel than those of three.
    made, settings = routed(objective).double(), SamplingSettings(sampler='dopri5', **more)
    labels, seeds, taken, alone = [0, 1, 2], [7, 7, 8], Evaluations(), Evaluations()
    whole = made.draw(labels, seeds, settings, evaluations=taken)
    single = made.draw(labels, seeds, settings, batch_size=1, evaluations=alone)
    torch.testing.assert_close(single, whole, rtol=0, atol=2e-5)
    assert taken.taken == alone.taken and min(taken.taken) >= 14
    usual = routed(objective)  # float32, up to a tenth of the tolerance of a step
    alone_in_float32 = usual.draw(labels, seeds, settings, batch_size=1)
    torch.testing.assert_close(alone_in_float32, usual.draw(labels, seeds, settings), rtol=0, atol=5e-4)
    # At finer tolerances, of the same image: guidance and its interval are in the equation that is solved.
    fine = made.draw(labels, seeds, SamplingSettings('dopri5', sampler_settings={'rtol': 1e-5}, **more))
    heun = made.draw(labels, seeds, SamplingSettings('heun', num_steps=120, **more))
    torch.testing.assert_close(fine, heun, rtol=0.02, atol=0.02)
    assert (whole - made.draw(labels, seeds, SamplingSettings('dopri5'))).abs().max() > 0.05 or not more


def test_guided_by_a_second_network() -> None:
    made, weak = routed(), randomised(tiny_dit(), seed=3)
    auto = {'num_steps': 60, 'guidance': 'auto', 'guidance_scale': 2.0}
    drawn, exact = (
        made.draw([1, 2], [3, 4], SamplingSettings(sampler, **auto), weak=weak) for sampler in ('dopri5', 'heun')
    )
    torch.testing.assert_close(drawn, exact, rtol=0.01, atol=0.01)


def test_a_protocol_has_the_tolerances_and_no_steps() -> None:
    tree = SamplingSettings('dopri5', num_steps=7).to_dict()
    assert tree['sampler_settings'] == {'atol': 1e-6, 'rtol': 1e-3} and 'num_steps' not in tree
    explicit = SamplingSettings('dopri5', sampler_settings={'rtol': 1e-3})
    assert explicit.to_dict() == tree == SamplingSettings.from_dict(tree).to_dict()
    assert explicit.in_words == 'dopri5 atol=1e-06 rtol=0.001'


def test_what_it_costs_is_said_of_one_evaluation() -> None:
    made = routed()
    costs = [
        guidance_cost(made.denoiser, made.objective, settings, latent_shape=(1, 8, 8), null_label=10)
        for settings in (
            SamplingSettings('euler', num_steps=1),
            SamplingSettings('dopri5'),
            SamplingSettings('dopri5', guidance_interval=(0.1, 0.2), **GUIDED),
        )
    ]
    assert [cost.evaluations for cost in costs] == [1, None, None]
    assert [cost.gmacs / costs[0].gmacs for cost in costs] == pytest.approx([1, 1, 2])


class Cliff(Wavy):
    """A jump of the slope, which no step is small enough for."""

    def drift(self, denoiser: object, labels_B: Tensor):
        return lambda x_BCHW, time: torch.where(time.view(-1, 1, 1, 1) > 0.5, 1e6, -1e6).double().expand_as(x_BCHW)


class Broken(nn.Module):
    num_tokens = 1

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return torch.where(labels.view(-1, 1, 1, 1) == 1, math.nan, x)


def test_tolerances_that_cannot_be_kept_end_in_words_and_a_broken_sample_hinders_no_other() -> None:
    times, equation = FlowMatching().sampling_times(2), Equation(Cliff(), None, LABELS)  # type: ignore[arg-type]
    with pytest.raises(UserError, match='cannot keep atol=1e-18 and rtol=1e-18'):
        dopri5(equation, noise(), times, unasked, atol=1e-18, rtol=1e-18)
    equation = Equation(FlowMatching(), Broken(), torch.tensor([0, 1, 0]))
    drawn = dopri5(equation, noise(), times, unasked)
    assert drawn.isfinite().flatten(1).all(1).tolist() == [True, False, True]
    torch.testing.assert_close(drawn[0], noise()[0].double() * math.exp(-1), rtol=2e-3, atol=0)
