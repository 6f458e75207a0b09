"""``LatentDiffusion`` and the draws that it is fed with."""

import itertools

import pytest
import torch
from composer import Callback

from tests.helpers import fit, loader, make_trainer, tiny_dit, tiny_model
from tread_composer.algorithms.tread import Tread
from tread_composer.autoencoders import Pixels
from tread_composer.core.batch import LABEL_DROPPED, LABELS, NOISE, RAW_LATENTS, SAMPLE_IDS, TIME_QUANTILES
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import FlowMatching


class Evaluated(Callback):
    """What each evaluation batch held."""

    def __init__(self):
        self.batches = []

    def eval_after_forward(self, state, logger):
        keys = (SAMPLE_IDS, NOISE, TIME_QUANTILES, LABEL_DROPPED)
        self.batches.append({key: state.batch[key].tolist() for key in keys})


def evaluate(batch_size=8, **keywords):
    seen = Evaluated()
    data = loader(batch_size=batch_size, shuffle=False)
    trainer = make_trainer(callbacks=[seen], eval_dataloader=data, **keywords)
    trainer.eval()
    rows = {}
    for batch in seen.batches:
        for index, sample in enumerate(batch[SAMPLE_IDS]):
            rows[sample] = (batch[NOISE][index], batch[TIME_QUANTILES][index], batch[LABEL_DROPPED][index])
    metrics = {name: metric.compute().item() for name, metric in trainer.state.eval_metrics['eval'].items()}
    return rows, metrics


def test_evaluation_uses_the_same_noise_and_times_in_every_run():
    rows, metrics = evaluate(seed=1)
    others, same = evaluate(seed=2, algorithms=[Tread(1, -2, 0.5)], batch_size=6)
    assert rows == others and len(rows) == 24
    assert metrics['loss'] == pytest.approx(same['loss'], rel=1e-6)
    quantiles = sorted(quantile for _, quantile, _ in rows.values())
    assert max(b - a for a, b in itertools.pairwise(quantiles)) < 0.08  # all times are covered
    assert not any(dropped for _, _, dropped in rows.values())


def test_the_evaluation_loss_is_the_mean_and_the_quarters_are_its_parts():
    rows, metrics = evaluate()
    model = tiny_model().eval()
    batch = next(iter(loader(batch_size=24, shuffle=False)))
    noise, quantiles = (torch.tensor([rows[i][entry] for i in range(24)]) for entry in (0, 1))
    losses = FlowMatching()(model.denoiser, batch[RAW_LATENTS], batch[LABELS], noise, quantiles)['loss']
    assert metrics['loss'] == pytest.approx(losses.mean().item(), rel=1e-5)
    for quarter in range(4):
        inside = (quantiles >= quarter / 4) & (quantiles < (quarter + 1) / 4)
        expected = losses[inside].mean().item()
        assert metrics[f'loss_time_quarter_{quarter + 1}'] == pytest.approx(expected, rel=1e-5)


def test_a_sample_gets_other_noise_and_another_time_in_every_epoch():
    _, recorder = fit(data=lambda: loader(shuffle=False))  # two epochs of three batches
    for first, second in zip(recorder.batches[:3], recorder.batches[3:], strict=True):
        assert first[SAMPLE_IDS] == second[SAMPLE_IDS]
        assert all(a != b for a, b in zip(first[NOISE], second[NOISE], strict=True))
        assert all(a != b for a, b in zip(first[TIME_QUANTILES], second[TIME_QUANTILES], strict=True))


def test_labels_are_dropped_at_the_rate_asked_for_and_become_the_null_label():
    labels = []
    model = LatentDiffusion(tiny_dit(), FlowMatching(), latent_shape=(1, 8, 8), num_classes=10, label_dropout=0.3)
    model.denoiser.register_forward_pre_hook(lambda _, args: labels.extend(args[2].tolist()))
    fit(model=model, data=lambda: loader(96, 24), max_duration='20ba')
    share = labels.count(10) / len(labels)
    assert len(labels) == 480 and 0.23 < share < 0.37


def test_scale_and_shift_per_channel_and_back():
    denoiser = tiny_dit()
    sizes = {'latent_shape': (1, 8, 8), 'num_classes': 10}
    numbers = {'latent_scale': [0.5], 'latent_shift': 2.0}
    model = LatentDiffusion(denoiser, FlowMatching(), **sizes, **numbers, autoencoder=Pixels())
    raw = torch.randn(3, 1, 8, 8)
    latents = model.latents({RAW_LATENTS: raw.half()})
    assert latents.dtype == torch.float32
    assert torch.allclose(latents, (raw.half().float() - 2) * 0.5)
    assert torch.allclose(model.decode(latents), raw.half().float(), atol=1e-6)
    with pytest.raises(ValueError, match='Pixels decodes in float32 only'):
        model.decode(latents, torch.bfloat16)
    assert list(model.state_dict()) == [f'denoiser.{key}' for key in denoiser.state_dict()]
    with pytest.raises(ValueError, match='one for each channel'):
        LatentDiffusion(denoiser, FlowMatching(), **sizes, latent_scale=[1.0, 2.0])


def test_impossible_samples_and_a_batch_without_draws_are_refused():
    model = tiny_model()
    for arguments, settings, message in (
        (([0], [0]), {'sampler': 'dopri'}, "sampler: 'dopri' is none of"),
        (([0], [0, 1]), {}, '1 labels but 2 seeds'),
        (([11], [0]), {}, r'labels \[11\] are not between 0 and 10'),
    ):
        with pytest.raises(ValueError, match=message):
            model.sample(*arguments, **settings)
    with pytest.raises(ValueError, match=r'KeyedDraws\(\)'):
        model({RAW_LATENTS: torch.zeros(2, 1, 8, 8), LABELS: torch.zeros(2, dtype=torch.int64)})


def test_an_unconditional_model_trains_samples_and_refuses_guidance():
    model = tiny_model(num_classes=0)
    _, recorder = fit([Tread(1, -2, 0.5)], model=model)
    assert len(recorder.losses) == 6
    assert model.sample([0, 0], [1, 2], num_steps=2).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match='needs classes'):
        model.sample([0], [0], guidance_scale=2.0)
