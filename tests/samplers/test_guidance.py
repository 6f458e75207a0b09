"""Classifier-free guidance on a real DiT, and guidance of another package."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from tread_composer.core.protocols import Denoiser
from tread_composer.core.randomness import KeyedRandom
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import FlowMatching
from tread_composer.routing import Route
from tread_composer.samplers import Clock, Equation, SamplingSettings, euler, guidance_cost, guided_denoiser
from tread_composer.samplers.guidance.provider import Branches, SamplingRun


def make_dit(channels: int = 4, learn_sigma: bool = False) -> DiT:
    sizes = {'hidden_size': 16, 'depth': 1, 'num_heads': 2}
    model = DiT(latent_size=4, in_channels=channels, num_classes=5, learn_sigma=learn_sigma, **sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def classifier_free(model: DiT, scale: float) -> Denoiser:
    settings = SamplingSettings(guidance='classifier_free', guidance_scale=scale)
    run = {'random': KeyedRandom(0, 0, [0, 1, 2]), 'clock': Clock(), 'times': FlowMatching().sampling_times(4)}
    return guided_denoiser(model, settings, null_label=5, **run)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 1, 4])


@pytest.mark.parametrize('scale', [0.0, 0.5, 1.5, 4.0])
def test_guided_prediction_is_the_formula_on_all_channels(scale: float) -> None:
    model = make_dit()
    x, t, labels = inputs()
    conditional, unconditional = model(x, t, labels), model(x, t, torch.full((3,), 5))
    guided = classifier_free(model, scale)(x, t, labels)
    # A batch of 6 rounds differently from a batch of 3.
    torch.testing.assert_close(guided, scale * conditional + (1 - scale) * unconditional, rtol=1e-3, atol=1e-3)
    assert ((guided - conditional).abs().amax(dim=(0, 2, 3)) > 0.05).all()


def test_scale_one_is_the_denoiser_itself() -> None:
    model = make_dit()
    assert classifier_free(model, 1.0) is model
    assert classifier_free(model, 1) is model


def test_one_call_with_a_doubled_batch() -> None:
    model = make_dit()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    guided = classifier_free(model, 2.0)
    assert guided(*inputs()).shape == (3, 4, 4, 4)
    assert sizes == [6]
    assert guided.num_tokens == model.num_tokens == 4


def test_the_difference_is_taken_in_float32() -> None:
    guided = classifier_free(make_dit().bfloat16(), 3.0)(*inputs())
    assert guided.dtype == torch.float32


def test_changing_the_label_changes_the_sample_and_guidance_moves_it_further() -> None:
    model, objective = make_dit(), FlowMatching()
    noise, _, labels = inputs()

    def sample(scale: float, labels: Tensor) -> Tensor:
        equation = Equation(objective, classifier_free(model, scale), labels)
        return euler(equation, objective.prior(noise), objective.sampling_times(4), lambda step: noise)

    other = torch.tensor([0, 2, 4])
    for scale in (1.0, 3.0):
        change = (sample(scale, other) - sample(scale, labels)).abs().amax(dim=(1, 2, 3))
        assert change[1] > 0.01
        torch.testing.assert_close(change[[0, 2]], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (sample(3.0, labels) - sample(1.0, labels)).abs().max() > 0.01


@pytest.mark.parametrize(('scale', 'channels'), [(0.0, 4), (1.5, 4), (4.0, 3)])
def test_latent_channels_are_guided_and_the_variance_is_the_conditional_branch_s(scale: float, channels: int) -> None:
    model = make_dit(channels, learn_sigma=True)
    x, t, labels = inputs()
    x = x[:, :channels]
    conditional, unconditional = model(x, t, labels), model(x, t, torch.full((3,), 5))
    guided = classifier_free(model, scale)(x, t, labels)
    assert guided.shape == (3, 2 * channels, 4, 4)
    expected = scale * conditional + (1 - scale) * unconditional
    torch.testing.assert_close(guided[:, :channels], expected[:, :channels], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided[:, channels:], conditional[:, channels:], rtol=1e-3, atol=1e-3)
    assert ((expected - conditional)[:, channels:].abs().amax(dim=(0, 2, 3)) > 0.05).all()  # they would differ


@dataclass(frozen=True)
class Damped:
    """Guidance of another package: the weak prediction is the network's own, made smaller; one call gives both."""

    second_network: ClassVar[bool] = False
    factor: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise ValueError(f'factor: {self.factor} is not in [0, 1)')

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        if num_classes > 100:
            raise ValueError("guidance: 'damped' is for few classes")

    def prepare(self, network: nn.Module, *, routes: Sequence[Route], always_keep: int) -> None:
        pass

    def protocol_facts(self, routes: Sequence[Route]) -> dict[str, Any]:
        return {'damped_routes': len(routes)}

    def branches(self, run: SamplingRun) -> Branches:
        def both(x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            strong = run.denoiser(x, t, labels)
            return strong, self.factor * strong

        return both


def test_guidance_of_another_package_is_drawn_with_stored_counted_and_checked() -> None:
    kind = f'{__name__}:Damped'
    model = LatentDiffusion(make_dit(), FlowMatching(), latent_shape=(4, 4, 4), num_classes=5)
    settings = SamplingSettings(
        sampler='euler', num_steps=2, guidance=kind, guidance_scale=3.0, guidance_settings={'factor': 0.25}
    )
    assert SamplingSettings.from_dict(settings.to_dict()) == settings
    assert settings.to_dict()['factor'] == 0.25 and settings.protocol([Route(0, 0)])['damped_routes'] == 1
    found = model.draw([1, 2], [3, 4], settings)
    with torch.no_grad():
        x = KeyedRandom(0, 0, [3, 4]).normal('sampling', 4, 4, 4).double()
        for time in (1.0, 0.5):
            x = x - 0.5 * 2.5 * model.denoiser.eval()(x.float(), torch.full((2,), time), torch.tensor([1, 2])).double()
    torch.testing.assert_close(found, x.float(), rtol=1e-4, atol=1e-4)  # 2.5 = 0.25 + 3 (1 - 0.25)
    cost, plain = (
        guidance_cost(model.denoiser, FlowMatching(), how, latent_shape=(4, 4, 4), null_label=5)
        for how in (settings, SamplingSettings(sampler='euler', num_steps=2))
    )
    assert (cost.gmacs, cost.guided, plain.guided) == (plain.gmacs, 2, 0)
    for wrong, message in (
        ({'factor': 2.0}, 'factor: 2.0 is not in'),
        ({'facto': 0.5}, f"facto: guidance '{kind}' has no such setting; it has factor"),
        ({'weak_rate': 0.5}, "weak_rate: 0.5 has no effect .* belongs to guidance 'sparse'"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(settings, guidance_settings=wrong)
    with pytest.raises(ValueError, match='has no use for a second network; take'):
        model.draw([1], [3], settings, weak=make_dit())
    with pytest.raises(ValueError, match='few classes'):
        guidance_cost(model.denoiser, FlowMatching(), settings, latent_shape=(4, 4, 4), null_label=101)
    with pytest.raises(ValueError, match='cannot be imported'):
        SamplingSettings(guidance='no.such.module:Damped')
