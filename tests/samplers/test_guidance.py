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
from tread_composer.samplers import Clock, SamplingSettings, guidance_cost, guided_denoiser
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
@pytest.mark.parametrize(('channels', 'learn_sigma'), [(4, False), (4, True), (3, True)])
def test_the_formula_on_latent_channels_and_the_variance_of_the_conditional_branch(
    channels: int, learn_sigma: bool, scale: float
) -> None:
    model = make_dit(channels, learn_sigma)
    x, t, labels = inputs()
    x = x[:, :channels]
    conditional, unconditional = model(x, t, labels), model(x, t, torch.full((3,), 5))
    guided = classifier_free(model, scale)(x, t, labels)
    assert guided.shape == conditional.shape
    expected = scale * conditional + (1 - scale) * unconditional
    # A batch of 6 rounds differently from a batch of 3.
    torch.testing.assert_close(guided[:, :channels], expected[:, :channels], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided[:, channels:], conditional[:, channels:], rtol=1e-3, atol=1e-3)
    assert ((expected - conditional).abs().amax(dim=(0, 2, 3)) > 0.05).all()  # each channel would differ


def test_one_call_with_a_doubled_batch_and_none_without_guidance() -> None:
    model = make_dit()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    guided = classifier_free(model, 2.0)
    assert guided(*inputs()).shape == (3, 4, 4, 4)
    assert sizes == [6]
    assert guided.num_tokens == model.num_tokens == 4
    assert classifier_free(model, 1.0) is model and classifier_free(model, 1) is model
    # The difference is taken in float32.
    assert classifier_free(make_dit().bfloat16(), 3.0)(*inputs()).dtype == torch.float32


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
