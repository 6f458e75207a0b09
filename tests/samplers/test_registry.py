"""Which samplers and settings fit which objective, and samplers of another package."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import tiny_dit
from tests.samplers.gaussian import draw_checked
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.samplers import Equation, check_sampler, needs

CHAIN = r"walks the discrete steps of the objective 'ddpm'.*take 'heun'"


@pytest.mark.parametrize(
    ('name', 'objective', 'settings', 'message'),
    [
        ('ddpm', FlowMatching(), {}, CHAIN),
        ('ddpm', EDM(), {}, CHAIN),
        ('ddim', FlowMatching(), {}, CHAIN),
        ('ddim', EDM(), {}, CHAIN),
        ('ddpm', DDPM(), {'eta': 1.0}, "'ddpm' has no settings"),
        ('ddim', DDPM(), {'etta': 0.1}, r"'ddim' has no settings \['etta'\]; it has \['eta'\]"),
        ('euler', FlowMatching(), {'eta': 0.1}, r"'euler' has no settings \['eta'\]; it has none"),
        *(('ddim', DDPM(), {'eta': eta}, 'eta=') for eta in (-0.1, 1.1, math.nan)),
        ('dopri5', DDPM(), {}, 'times of its own choice, which DDPM does not have'),
        ('dopri5', FlowMatching(), {'rtol': 0.0}, 'rtol=0.0 must be above 0'),
        ('dopri5', FlowMatching(), {'tol': 1e-3}, r"no settings \['tol'\]; it has \['atol', 'rtol'\]"),
        ('edm_heun', FlowMatching(), {}, "objective 'edm', which FlowMatching does not have"),
        ('edm_heun', DDPM(), {}, "take 'heun'"),
        ('edm_heun', EDM(), {'S_churn': -1.0}, 'S_churn=-1.0'),
        ('edm_heun', EDM(), {'S_min': 2.0, 'S_max': 1.0}, 'S_min=2.0'),
        ('sde', EDM(), {}, "objective 'flow_matching', which EDM does not have"),
        ('sde', FlowMatching(), {'eta': 1.0}, r"no settings \['eta'\]; it has \['last_step', 'diffusion', 'last_"),
        ('sde', FlowMatching(), {'last_step': 1.0}, 'last_step=1.0 must be above 0'),
        ('sde', FlowMatching(), {'diffusion': -1.0}, 'diffusion=-1.0'),
        ('sde', FlowMatching(), {'diffusion': 'much'}, "diffusion='much': must be a number, such as 1.0"),
        ('sde', FlowMatching(), {'last_step_kind': 'mode'}, "last_step_kind='mode' is none of mean, tweedie, none"),
        ('sde', FlowMatching(), {'last_step_kind': 'none', 'last_step': 0.1}, 'last_step=0.1: has no effect with'),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    name: str, objective: Any, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        draw_checked(name, objective, settings)
    if not settings:  # an objective's class will do
        with pytest.raises(ValueError, match=message):
            check_sampler(name, type(objective))


def test_what_fits_passes() -> None:
    for objective in (FlowMatching(), EDM(), DDPM(), FlowMatching, EDM, DDPM):
        for sampler in ('euler', 'heun'):
            check_sampler(sampler, objective)
    for objective in (DDPM(), DDPM):
        check_sampler('ddpm', objective)
        check_sampler('ddim', objective, {'eta': 0.1})
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
