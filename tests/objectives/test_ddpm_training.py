"""DDPM through a real Trainer; its recipe is in ``test_digits_family``."""

from typing import Any

import pytest
import torch
from composer.core import State
from composer.loggers import InMemoryLogger
from torch._dynamo.testing import CompileCounter

from tests.helpers import fit, loader, randomised
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import DDPM


def model() -> LatentDiffusion:
    sizes = {'patch_size': 2, 'hidden_size': 16, 'depth': 2, 'num_heads': 2}
    network = DiT(latent_size=8, in_channels=1, num_classes=10, learn_sigma=True, **sizes)
    randomised(network)
    return LatentDiffusion(network, DDPM(), latent_shape=(1, 8, 8), num_classes=10)


def logged(**settings: Any) -> tuple[dict[str, list[float]], State]:
    memory = InMemoryLogger()
    keep = {'eval_dataloader': loader(shuffle=False), 'eval_interval': '6ba'}
    trainer, _ = fit(model=model(), loggers=[memory], **keep, **settings)
    return {name: [float(value) for _, value in values] for name, values in memory.data.items()}, trainer.state


def test_terms_are_logged_apart_and_evaluation_reports_the_error_of_the_noise() -> None:
    found, state = logged()
    terms = (found[f'loss/train/{name}'] for name in ('total', 'mse', 'vlb'))
    for total, mse, vlb in zip(*terms, strict=True):
        assert total == pytest.approx(mse + vlb, rel=1e-5)
        assert mse > 0 and vlb > 0
    assert len(found['loss/train/vlb']) == 6
    trained: LatentDiffusion = state.model  # type: ignore[assignment]
    value = found['metrics/eval/loss'][-1]
    quarters = [found[f'metrics/eval/loss_time_quarter_{quarter}'][-1] for quarter in range(1, 5)]
    assert min(quarters) <= value <= max(quarters)
    assert trained.sample([1, 2], [3, 4], sampler='ddpm', num_steps=3).isfinite().all()


def test_it_compiles_into_one_graph() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled, _ = logged(compile_config={'backend': counter, 'fullgraph': True})
    assert counter.frame_count == 2  # training and evaluation
    eager, _ = logged()
    torch.testing.assert_close(compiled['loss/train/total'], eager['loss/train/total'], rtol=1e-5, atol=0)
