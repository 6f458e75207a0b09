"""DDPM and DDIM: on Gaussian data whose exact answer is known, and step by step against diffusers' schedulers."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor, nn

from tests.helpers import tiny_model
from tests.samplers.gaussian import LABELS, MEAN, STD, noise, unasked
from tests.samplers.test_draw import model
from tread_composer.core.randomness import KeyedRandom
from tread_composer.objectives import DDPM
from tread_composer.objectives.ddpm import evenly_spaced
from tread_composer.samplers import SAMPLERS, Equation, ddim, ddpm, euler, heun


class Gaussian(nn.Module):
    """The perfect network for pixels that are all N(MEAN, STD^2): the expected noise, and the true reverse variance.

    The reverse step of the exact posterior has a variance between that for a known and that for unit-variance data;
    v says where. It depends on where the step goes to, so the network knows the timesteps that are visited.
    """

    num_tokens = 1

    def __init__(self, objective: DDPM, visited: list[int], v: float | None = None) -> None:
        super().__init__()
        bars = objective.alphas_cumprod
        self.bars, self.v = bars, v
        self.previous = dict(zip(visited[1:], visited, strict=False))
        self.calls = 0

    def level(self, t: int) -> float:
        return math.sqrt((1 - self.bars[t]) / self.bars[t])

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        assert x.dtype == torch.float32 and t.dtype in (torch.int64, torch.float32)
        (step,) = t.unique().tolist()
        assert step == int(step)
        now = self.level(int(step))
        scaled = x.double() * math.sqrt(1 + now**2)  # data + now * noise
        noise = now * (scaled - MEAN) / (STD**2 + now**2)
        return torch.cat([noise, torch.full_like(noise, self.fraction(int(step), now))], dim=1)

    def fraction(self, step: int, now: float) -> float:
        if self.v is not None or step not in self.previous:
            return self.v or 0.0
        then = self.level(self.previous[step])
        removed = now**2 - then**2
        true = math.log((STD**2 + then**2) / (STD**2 + now**2) * removed)
        least, most = math.log((then / now) ** 2 * removed), math.log((1 + then**2) / (1 + now**2) * removed)
        return 2 * (true - least) / (most - least) - 1


class Wavy(nn.Module):
    """A deterministic network without any structure, for comparing arithmetic; ``v`` in place of its own variance."""

    num_tokens = 1

    def __init__(self, v: float | None = None) -> None:
        super().__init__()
        self.v = v

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        variance = torch.sin(2 * x + t / 70) if self.v is None else torch.full_like(x, self.v)
        return torch.cat([torch.tanh(x) + 0.3 * torch.cos(t / 90 + x), variance], dim=1)


def normal(step: int, *shape: int) -> Tensor:
    return noise(100 + step, *(shape or (3, 2, 4, 4))).double()


def moments(sampler: str, num_steps: int, settings: dict[str, Any], v: float | None = None, **objective: Any) -> tuple:
    process = DDPM(**objective)
    shape = (3, 8, 64, 64)
    network = Gaussian(process, evenly_spaced(process.num_timesteps, num_steps), v)
    start = process.prior(normal(-1, *shape))
    times = process.sampling_times(num_steps)
    equation = Equation(process, network, LABELS)
    out = SAMPLERS[sampler](equation, start, times, lambda step: normal(step, *shape), **settings)
    assert out.dtype == torch.float64
    assert network.calls == {'heun': 2 * num_steps - 1}.get(sampler, num_steps)
    return out.mean().item(), out.std().item()


# 98,304 values: the mean is known to 0.0022 and the standard deviation to 0.0016 (one sigma).
@pytest.mark.parametrize(
    ('schedule', 'sampler', 'num_steps', 'settings', 'tolerance'),
    [
        ('linear', 'ddpm', 250, {}, 0.008),
        ('cosine', 'ddpm', 250, {}, 0.008),
        ('linear', 'ddpm', 25, {}, 0.008),  # the true variance makes even few steps exact
        ('cosine', 'ddpm', 25, {}, 0.008),
        ('linear', 'ddim', 250, {}, 0.008),
        ('cosine', 'ddim', 250, {}, 0.008),
        ('linear', 'ddim', 250, {'eta': 0.5}, 0.01),
        ('linear', 'ddim', 250, {'eta': 1.0}, 0.02),  # draws too little for data that are not one point
        ('linear', 'euler', 250, {}, 0.008),
        ('linear', 'heun', 50, {}, 0.01),
    ],
)
def test_samples_of_gaussian_data_have_its_mean_and_spread(
    schedule: str, sampler: str, num_steps: int, settings: dict[str, Any], tolerance: float
) -> None:
    mean, std = moments(sampler, num_steps, settings, schedule=schedule)
    assert mean == pytest.approx(MEAN, abs=tolerance)
    assert std == pytest.approx(STD, abs=tolerance)


def test_fixed_variance_is_that_of_the_forward_steps() -> None:
    fixed, learned, largest = DDPM(learned_variance=False), DDPM(), Wavy(v=1.0)

    def noise_only(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return largest(x, t, labels)[:, : x.shape[1]]

    start, times = fixed.prior(normal(-1)), fixed.sampling_times(20)
    torch.testing.assert_close(
        ddpm(Equation(fixed, noise_only, LABELS), start, times, normal),
        ddpm(Equation(learned, largest, LABELS), start, times, normal),
    )


def scheduler(kind: Callable, timesteps: list[int] | int, **settings: Any) -> Any:
    """A scheduler of diffusers with DiT's process. Its tables are float32."""
    process = {'beta_start': 1e-4, 'beta_end': 0.02, 'beta_schedule': 'linear', 'clip_sample': False}
    made = kind(num_train_timesteps=1000, timestep_spacing='leading', **process, **settings)
    made.set_timesteps(
        **({'timesteps': timesteps} if isinstance(timesteps, list) else {'num_inference_steps': timesteps})
    )
    return made


def our_times(timesteps: list[int]) -> Tensor:
    bars = DDPM().alphas_cumprod[timesteps]
    return torch.cat([((1 - bars) / bars).sqrt(), torch.zeros(1, dtype=torch.float64)])


def our_path(sampler: Callable, timesteps: list[int], noise: Callable, **settings: float) -> list[Tensor]:
    """x_t in the papers' scale before the first step and after each."""
    times = our_times(timesteps)
    x = normal(-1) * (1 + times[0] ** 2).sqrt()
    path = [normal(-1)]
    for step, (now, then) in enumerate(pairwise(times)):
        equation = Equation(DDPM(), Wavy(), LABELS)
        x = sampler(equation, x, torch.stack([now, then]), lambda _, step=step: noise(step), **settings)
        path.append(x / (1 + then**2).sqrt())
    return path


@pytest.mark.parametrize('num_steps', [250, 40])
def test_ddpm_is_diffusers_scheduler_step_by_step(num_steps: int) -> None:
    timesteps = evenly_spaced(1000, num_steps)[::-1]
    theirs = scheduler(DDPMScheduler, timesteps, variance_type='learned_range')
    drawn = torch.Generator().manual_seed(5)
    noises = [torch.randn(3, 2, 4, 4, generator=drawn, dtype=torch.float64) for _ in timesteps[1:]]
    ours = our_path(ddpm, timesteps, noises.__getitem__)
    x, generator = normal(-1), torch.Generator().manual_seed(5)
    for t, expected in zip(timesteps, ours[1:], strict=True):
        out = Wavy()(x.float(), torch.full((3,), float(t)), LABELS).double()
        x = theirs.step(out, t, x, generator=generator).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('eta', [0.0, 0.4, 1.0])
def test_ddim_is_diffusers_scheduler_step_by_step(eta: float) -> None:
    theirs = scheduler(DDIMScheduler, 50)
    timesteps = theirs.timesteps.tolist()
    assert timesteps[0] == 980 and timesteps[-1] == 0
    ours = our_path(ddim, timesteps, normal, eta=eta)
    x = normal(-1)
    for step, (t, expected) in enumerate(zip(timesteps, ours[1:], strict=True)):
        out = Wavy()(x.float(), torch.full((3,), float(t)), LABELS).double()[:, :2]
        noise = None if eta == 0 else normal(step) * (t > 0)
        x = theirs.step(out, t, x, eta=eta, variance_noise=noise).prev_sample
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=2e-4)


def test_ddim_without_noise_is_euler_s_method_and_draws_nothing() -> None:
    objective = DDPM()
    start, times = objective.prior(normal(-1)), objective.sampling_times(30)
    equation = Equation(objective, Wavy(), LABELS)
    by_euler = euler(equation, start, times, unasked)
    torch.testing.assert_close(ddim(equation, start, times, unasked), by_euler, rtol=1e-12, atol=1e-12)
    # The other samplers of the package walk the same equation.
    fine = objective.sampling_times(1000)
    exact = euler(equation, start, fine, unasked)
    by_heun = heun(equation, start, times, unasked)
    assert (by_heun - exact).abs().mean() < 0.5 * (by_euler - exact).abs().mean()


def test_one_step_takes_the_network_s_word_and_draws_nothing() -> None:
    objective, x = DDPM(), normal(-1)
    out = ddpm(Equation(objective, Wavy(), LABELS), objective.prior(x), objective.sampling_times(1), unasked)
    bar = objective.alphas_cumprod[999]
    noise = Wavy()(x.float(), torch.full((3,), 999.0), LABELS)[:, :2]
    torch.testing.assert_close(out, (x - (1 - bar).sqrt() * noise) / bar.sqrt(), rtol=1e-5, atol=1e-4)


def test_predicted_data_are_not_clipped() -> None:
    assert moments('ddpm', 5, {}, 0.0)[0] == pytest.approx(MEAN, abs=0.01)
    objective = DDPM()
    assert ddim(Equation(objective, Wavy(), LABELS), 9 * normal(-1), our_times([3]), unasked).abs().max() > 9


def test_steps_get_noise_of_their_own_from_the_sample_s_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, list[int]]] = []
    drawn = KeyedRandom.normal

    def watched(self: KeyedRandom, purpose: str, *shape: int) -> Tensor:
        asked.append((purpose, self.rows))
        return drawn(self, purpose, *shape)

    monkeypatch.setattr(KeyedRandom, 'normal', watched)
    model(objective=DDPM()).sample([1, 2], [30, 40], sampler='ddpm', num_steps=4)
    assert asked == [(purpose, [30, 40]) for purpose in ('sampling', *(f'sampling_step_{k}' for k in range(3)))]
    numbers = [drawn(KeyedRandom(0, 0, [30, 40]), purpose, 64) for purpose, _ in asked]
    correlation = torch.corrcoef(torch.cat(numbers))
    assert (correlation - torch.eye(8)).abs().max() < 0.45  # 8 rows of 64 independent numbers


def test_a_model_refuses_what_its_objective_cannot_be_sampled_with() -> None:
    with pytest.raises(ValueError, match="sampler: 'ddpm' walks the discrete steps"):
        tiny_model().sample([0], [0], sampler='ddpm')
    with pytest.raises(ValueError, match='take 1 to 1000 steps'):
        model(objective=DDPM()).sample([0], [0], sampler='ddpm', num_steps=1001)
