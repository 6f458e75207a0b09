"""A real ComposerModel that is small and can be sampled, and a Trainer for it, for the tests of the callbacks."""

from pathlib import Path
from typing import Any

import torch
from composer import ComposerModel, Trainer
from composer.loggers import InMemoryLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.helpers import tiny_dit
from tread_composer.autoencoders import Pixels
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import FlowMatching


class Files(InMemoryLogger):
    """Remembers which files it was handed, each with its folder of artifacts."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[tuple[str, str | None]] = []

    def log_file(self, path: Path, artifact_folder: str | None = None) -> None:
        self.files.append((path.name, artifact_folder))


def digits_model(num_classes: int = 10) -> LatentDiffusion:
    """The real model, on pixels."""
    settings = {'latent_shape': (1, 8, 8), 'num_classes': num_classes, 'autoencoder': Pixels()}
    return LatentDiffusion(tiny_dit(num_classes=num_classes), FlowMatching(), **settings)


class Painter(ComposerModel):
    """Learns one picture per class; a sample is the picture with some noise that depends on the seed."""

    num_classes = 10

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.pictures = nn.Embedding(10, 64)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.dropout(self.pictures(batch[1]))

    def loss(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs - batch[0].flatten(1)).square().mean()

    def sample(
        self, labels: list[int], seeds: list[int], *, sampler: str, num_steps: int, guidance_scale: float
    ) -> Tensor:
        assert not self.training
        noise = torch.stack([torch.randn(64, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        torch.rand(3)  # a careless model: draws from the global stream
        return (self.dropout(self.pictures(torch.tensor(labels))) + 0.05 * noise).view(-1, 1, 8, 8)

    def decode(self, latents: Tensor) -> Tensor:
        return latents


def trainer(max_duration: str = '6ba', model: nn.Module | None = None, **settings: Any) -> Trainer:
    """24 samples in batches of 4: an epoch is 6 batches."""
    model = model or Painter()
    data = TensorDataset(torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 10)
    defaults: dict[str, Any] = {
        'train_dataloader': DataLoader(data, batch_size=4),
        'optimizers': torch.optim.Adam(model.parameters(), lr=0.1),
        'run_name': 'painting',
        'progress_bar': False,
        'auto_log_hparams': False,
        'seed': 3,
    }
    return Trainer(model=model, max_duration=max_duration, **{**defaults, **settings})


def losses_of(run: Trainer) -> list[float]:
    """Train and return the loss of each batch, and a number from the global stream at the end."""
    memory = next(item for item in run.logger.destinations if isinstance(item, InMemoryLogger))
    run.fit()
    return [float(loss) for _, loss in memory.data['loss/train/total']] + [float(torch.rand(()))]


def store(folder: Path) -> str:
    return f'sqlite:///{folder.resolve()}/mlflow.db'
