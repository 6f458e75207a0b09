"""Small runs on the real digits, in this process, and what they leave on disk."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from composer import Trainer
from torch import Tensor, nn

from tests.helpers import randomised
from tread_composer.builders.trainer import build_trainer
from tread_composer.config import load_config

YAMLS = Path(__file__).parent.parent / 'yamls'
SMALL = (
    'model={name: dit, patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2}',
    'callbacks.sample_grid=null',
    'callbacks.digits_quality=null',
    'callbacks.speed_monitor=null',
    'callbacks.lr_monitor=null',
    'loggers.mlflow=null',
    'scheduler={name: constant}',
    'global_train_batch_size=16',
    'eval_interval=100ba',
    'progress_bar=false',
    'save_interval=2ba',
    'max_duration=3ba',
)


@dataclass
class Run:
    """A run that is over: its folder, and the Trainer that still has it in memory."""

    folder: Path
    trainer: Trainer

    @property
    def denoiser(self) -> nn.Module:
        return self.trainer.state.model.denoiser.eval()  # type: ignore[union-attr, return-value]


def run(root: Path, yaml: str, *overrides: str) -> Run:
    """Train for three batches, from weights that differ from zero everywhere; the data are gone afterwards."""
    places = (f'data.local={root / "data"}', f'save_folder={root / "run"}')
    trainer = build_trainer(load_config(YAMLS / yaml, [*SMALL, *places, *overrides]))
    randomised(trainer.state.model)
    trainer.fit()
    trainer.close()
    shutil.rmtree(root / 'data')
    return Run(root / 'run', trainer)


def predict(denoiser: nn.Module, channels: int = 1, size: int = 8, labels: tuple[int, ...] = (0, 3, 7)) -> Tensor:
    """A prediction on fixed inputs."""
    x = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return denoiser(x, torch.linspace(0.1, 0.9, len(labels)), torch.tensor(labels))
