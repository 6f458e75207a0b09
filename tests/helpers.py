"""Small real models, data and trainers that the tests share."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from composer import Callback, ComposerModel, State, Trainer
from composer.core import Algorithm
from composer.loggers import Logger
from composer.utils import dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from tread_composer.callbacks.keyed_draws import KeyedDraws
from tread_composer.core.batch import LABELS, NOISE, RAW_LATENTS, SAMPLE_IDS, TIME_QUANTILES
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models import DiT
from tread_composer.objectives import FlowMatching

DEPTH = 6


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fresh weights everywhere: DiT starts with zero gates, so that every block would be the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def tiny_dit(depth: int = DEPTH, hidden_size: int = 16, num_classes: int = 10, latent_size: int = 8) -> DiT:
    """16 tokens, weights that differ from zero and are the same on each call."""
    sizes = {'patch_size': 2, 'hidden_size': hidden_size, 'depth': depth, 'num_heads': 2}
    model = DiT(latent_size=latent_size, in_channels=1, num_classes=num_classes, **sizes)
    randomised(model)
    return model


def tiny_model(**sizes: Any) -> LatentDiffusion:
    denoiser = tiny_dit(**sizes)
    shape = (1, denoiser.latent_size, denoiser.latent_size)
    return LatentDiffusion(denoiser, FlowMatching(), latent_shape=shape, num_classes=denoiser.num_classes)


class Images(Dataset):
    """Noise images with labels and ids."""

    def __init__(self, size: int = 24) -> None:
        self.images = torch.randn(size, 1, 8, 8, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {RAW_LATENTS: self.images[index], LABELS: index % 10, SAMPLE_IDS: index}


def loader(size: int = 24, batch_size: int = 8, shuffle: bool = True) -> DataLoader:
    images = Images(size)
    sampler = dist.get_sampler(images, shuffle=shuffle, drop_last=True)
    return DataLoader(images, batch_size=batch_size, sampler=sampler, drop_last=True)


class Recorder(Callback):
    """What each batch trained on, and its loss to the bit."""

    def __init__(self) -> None:
        self.losses: list[str] = []
        self.batches: list[dict[str, Any]] = []

    def before_train_batch(self, state: State, logger: Logger) -> None:
        keys = (SAMPLE_IDS, LABELS, NOISE, TIME_QUANTILES, 'label_dropped')
        self.batches.append({key: state.batch[key].tolist() for key in keys if key in state.batch})

    def batch_end(self, state: State, logger: Logger) -> None:
        self.losses.append(float(state.total_loss_dict['loss/train/total']).hex())


class Lengths:
    """Counts the tokens that each block of a model sees, by forward hooks, in order of the calls."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.seen: list[int] = []
        for block in list(blocks):
            block.register_forward_pre_hook(lambda _, args: self.seen.append(args[0].shape[1]))


def trainer_of(model: ComposerModel, data: Any, algorithms: Sequence[Algorithm] = (), **keywords: Any) -> Trainer:
    """A Trainer of anybody's model, with AdamW unless another optimizer is given."""
    defaults = {'device': 'cpu', 'progress_bar': False, 'optimizers': torch.optim.AdamW(model.parameters(), lr=1e-2)}
    return Trainer(model=model, train_dataloader=data, algorithms=list(algorithms), **{**defaults, **keywords})


def make_trainer(
    model: LatentDiffusion | None = None,
    algorithms: Sequence[Algorithm] = (),
    callbacks: Sequence[Callback] = (),
    data: Callable[[], DataLoader] = loader,
    lr: float = 1e-2,
    **keywords: Any,
) -> Trainer:
    model = model or tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    settings = {'max_duration': '6ba', 'seed': 17, 'optimizers': optimizer, **keywords}
    return trainer_of(model, data(), algorithms, callbacks=[KeyedDraws(), *callbacks], **settings)


def fit(algorithms: Sequence[Algorithm] = (), **keywords: Any) -> tuple[Trainer, Recorder]:
    """Train and record."""
    recorder = Recorder()
    trainer = make_trainer(algorithms=algorithms, callbacks=[recorder, *keywords.pop('callbacks', ())], **keywords)
    trainer.fit()
    return trainer, recorder


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()}


def assert_equal_weights(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different
