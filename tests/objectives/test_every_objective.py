"""What all objectives do alike: float32 losses per sample, nothing drawn; other channels and settings refused."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.objectives.denoisers import Affine, batch
from tread_composer.core.protocols import Objective
from tread_composer.objectives import DDPM, EDM, FlowMatching, LogitNormal, MinSNR, Mode, Shifted, Uniform

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


IMPOSSIBLE = [
    (DDPM, {'num_timesteps': 1}, 'num_timesteps: 1 must be at least 2'),
    (DDPM, {'schedule': 'sigmoid'}, "schedule: 'sigmoid'; choose of linear, cosine"),
    (DDPM, {'beta_start': 0.0}, 'beta_start: 0.0'),
    (DDPM, {'beta_start': 0.5, 'beta_end': 0.1}, '0 < beta_start <= beta_end < 1'),
    (DDPM, {'beta_end': 1.0}, 'beta_end=1.0'),
    (DDPM, {'beta_end': math.nan}, 'beta_end: nan'),
    (DDPM, {'beta_end': 0.9999}, 'leave nothing of the data at the last timestep'),
    (DDPM, {'schedule': 'cosine', 'beta_end': 0.1}, "belong to schedule 'linear'"),
    (EDM, {'sigma_data': 0.0}, 'EDM: sigma_data: 0.0 must be above 0'),
    (EDM, {'P_std': -1.0}, 'P_std: -1.0'),
    (EDM, {'rho': 0.0}, 'rho: 0.0'),
    (EDM, {'sigma_min': 0.0}, 'sigma_min: 0.0'),
    (EDM, {'sigma_min': 2.0, 'sigma_max': 1.0}, 'below sigma_max=1.0'),
    (EDM, {'rho': 0.001}, 'leaves the range of float64'),
    (EDM, {'sigma_min': 1e-300}, 'leaves the range of float64'),
    (DDPM, {'weighting': 3}, 'DDPM: weighting: 3 is no weighting'),
    (FlowMatching, {'weighting': 3}, 'FlowMatching: weighting: 3 is no weighting'),
    (FlowMatching, {'weighting': MinSNR}, r'is no weighting; give None, MinSNR\(\)'),
    (FlowMatching, {'time_distribution': 3}, 'FlowMatching: time_distribution: 3 is no distribution of times'),
    (Shifted, {'distribution': Uniform, 'shift': 2.0}, 'Shifted: distribution: .*Uniform.* is no distribution'),
    (FlowMatching, {'direction_weight': -1.0}, 'direction_weight: -1.0'),
    (FlowMatching, {'direction_weight': math.nan}, 'direction_weight: nan'),
    (FlowMatching, {'direction_patch': 0}, 'direction_patch: 0'),
    (FlowMatching, {'sampling_shift': 0.0}, 'sampling_shift: 0.0'),
    *((MinSNR, {'gamma': gamma}, 'gamma: ') for gamma in (0.0, -1.0, math.inf, math.nan)),
    *((LogitNormal, {'std': std}, 'LogitNormal: std: ') for std in (0.0, -1.0, math.inf)),
    (LogitNormal, {'mean': math.nan}, 'LogitNormal: mean: nan'),
    *(
        (Mode, {'scale': scale}, r'must be at least -1 and at most 1\.7519') for scale in (-1.01, 1.76, math.nan)
    ),  # not monotonous
    *((Shifted, {'distribution': Uniform(), 'shift': s}, 'shift: ') for s in (0.0, -1.0, math.inf, math.nan)),
    (FlowMatching().snr, {'data_std': 0.0}, r'data_std=0\.0'),
    (FlowMatching().sampling_times, {'num_steps': 0}, 'num_steps=0'),
    (EDM().sampling_times, {'num_steps': 0}, 'num_steps=0'),
    *((DDPM(num_timesteps=40).sampling_times, {'num_steps': n}, 'take 1 to 40 steps') for n in (0, -1, 41)),
    (MinSNR(), {'snr': torch.ones(1), 'prediction': 'noise'}, "prediction='noise': choose"),
]


@pytest.mark.parametrize(('call', 'arguments', 'message'), IMPOSSIBLE)
def test_impossible_settings_are_refused(call: Callable, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(**arguments)
