"""What all objectives do alike: float32 losses per sample, nothing drawn, other channels refused."""

import pytest
import torch

from tests.objectives.denoisers import Affine, batch
from tread_composer.core.protocols import Objective
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.objectives.prediction import predict

QUANTILES = torch.tensor([0.03, 0.4, 0.5, 0.9])
OBJECTIVES = pytest.mark.parametrize('objective', [FlowMatching(), EDM(), DDPM(), DDPM(learned_variance=False)])


def affine(objective: Objective, dtype: torch.dtype = torch.float32) -> Affine:
    return Affine(4 if objective.learned_variance else 2, dtype)


@pytest.mark.parametrize('objective', [FlowMatching(), EDM()])
def test_losses_are_per_sample_differentiable_and_float32_whatever_the_denoiser_returns(objective: Objective) -> None:
    latents, labels, noise = batch()
    exact = objective(affine(objective), latents, labels, noise, QUANTILES)['loss']
    denoiser = affine(objective, torch.bfloat16)
    with torch.autocast('cpu', torch.bfloat16):
        loss = objective(denoiser, latents.bfloat16(), labels, noise.bfloat16(), QUANTILES)['loss']
    assert loss.shape == (4,)
    assert loss.dtype == exact.dtype == torch.float32
    # Rounding the inputs and the prediction costs 2^-9 each; a loss summed in bfloat16 would be a bfloat16 number.
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.02)
    assert not torch.equal(loss, loss.bfloat16().float())
    assert denoiser.seen[0][0].dtype == denoiser.seen[0][1].dtype == torch.float32
    loss.sum().backward()
    assert denoiser.weight.grad != 0


@OBJECTIVES
def test_a_sample_s_loss_does_not_depend_on_its_batch_and_nothing_is_drawn(objective: Objective) -> None:
    latents, labels, noise = batch()
    before = torch.get_rng_state()
    together = objective(affine(objective), latents, labels, noise, QUANTILES)['loss']
    assert torch.equal(torch.get_rng_state(), before)
    alone = objective(affine(objective), latents[2:3], labels[2:3], noise[2:3], QUANTILES[2:3])['loss']
    torch.testing.assert_close(alone, together[2:3])


@OBJECTIVES
def test_another_number_of_channels_is_refused_in_training_and_sampling(objective: Objective) -> None:
    latents, labels, noise = batch()
    remedy = f'learn_sigma: {"true" if objective.learned_variance else "false"}'
    for channels in {1, 2, 3, 4} - {affine(objective).out_channels}:
        with pytest.raises(ValueError, match=remedy):
            objective(Affine(channels), latents, labels, noise, QUANTILES)
        with pytest.raises(ValueError, match=remedy):
            objective.drift(Affine(channels), labels)(noise.double(), torch.tensor(0.5, dtype=torch.float64))


def test_predictions_are_float32_on_both_sides_of_the_denoiser() -> None:
    latents, labels, _ = batch()
    denoiser = Affine(dtype=torch.bfloat16)
    assert predict(denoiser, latents.double(), QUANTILES.double(), labels).dtype == torch.float32
    assert denoiser.seen[0][0].dtype == denoiser.seen[0][1].dtype == torch.float32
