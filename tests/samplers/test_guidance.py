"""Classifier-free guidance on a real DiT."""

import math

import pytest
import torch
from torch import Tensor

from tread_composer.models import DiT
from tread_composer.objectives import FlowMatching
from tread_composer.samplers import Equation, classifier_free, euler


def make_dit(channels: int = 4, learn_sigma: bool = False) -> DiT:
    sizes = {'hidden_size': 16, 'depth': 1, 'num_heads': 2}
    model = DiT(latent_size=4, in_channels=channels, num_classes=5, learn_sigma=learn_sigma, **sizes)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    return model.eval().requires_grad_(False)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return x, torch.tensor([0.1, 0.5, 0.8]), torch.tensor([0, 1, 4])


@pytest.mark.parametrize('scale', [0.0, 0.5, 1.5, 4.0])
def test_guided_prediction_is_the_formula_on_all_channels(scale: float) -> None:
    model = make_dit()
    x, t, labels = inputs()
    conditional, unconditional = model(x, t, labels), model(x, t, torch.full((3,), 5))
    guided = classifier_free(model, scale, null_label=5)(x, t, labels)
    # A batch of 6 rounds differently from a batch of 3.
    torch.testing.assert_close(guided, scale * conditional + (1 - scale) * unconditional, rtol=1e-3, atol=1e-3)
    assert ((guided - conditional).abs().amax(dim=(0, 2, 3)) > 0.05).all()


def test_scale_one_is_the_denoiser_itself() -> None:
    model = make_dit()
    assert classifier_free(model, 1.0, null_label=5) is model
    assert classifier_free(model, 1, null_label=5) is model


def test_one_call_with_a_doubled_batch() -> None:
    model = make_dit()
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    guided = classifier_free(model, 2.0, null_label=5)
    assert guided(*inputs()).shape == (3, 4, 4, 4)
    assert sizes == [6]
    assert guided.num_tokens == model.num_tokens == 4


def test_the_difference_is_taken_in_float32() -> None:
    guided = classifier_free(make_dit().bfloat16(), 3.0, null_label=5)(*inputs())
    assert guided.dtype == torch.float32


def test_changing_the_label_changes_the_sample_and_guidance_moves_it_further() -> None:
    model, objective = make_dit(), FlowMatching()
    noise, _, labels = inputs()

    def sample(scale: float, labels: Tensor) -> Tensor:
        equation = Equation(objective, classifier_free(model, scale, null_label=5), labels)
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
    guided = classifier_free(model, scale, null_label=5)(x, t, labels)
    assert guided.shape == (3, 2 * channels, 4, 4)
    expected = scale * conditional + (1 - scale) * unconditional
    torch.testing.assert_close(guided[:, :channels], expected[:, :channels], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided[:, channels:], conditional[:, channels:], rtol=1e-3, atol=1e-3)
    assert ((expected - conditional)[:, channels:].abs().amax(dim=(0, 2, 3)) > 0.05).all()  # they would differ


@pytest.mark.parametrize('scale', [-0.5, math.nan, math.inf])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(ValueError, match='guidance_scale='):
        classifier_free(make_dit(), scale, null_label=5)
