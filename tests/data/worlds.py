"""Small splits, and what runs in other processes: several ranks, and processes that are killed."""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer import Callback, ComposerModel, Trainer
from composer.utils import dist
from streaming import MDSWriter
from torchmetrics import MeanMetric

from tread_composer.core.batch import RAW_LATENTS, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME, columns
from tread_composer.data.digits import prepare_digits
from tread_composer.data.latents import LatentDataset
from tread_composer.data.loaders import eval_loader, train_loader

SAMPLES = 200


def write_shards(folder: Path, mirrored: bool = False, **options: Any) -> Path:
    """200 samples without a manifest. Sample i is i + 1 everywhere, its mirror -(i + 1), its label i % 3."""
    settings = {'hashes': ['xxh64'], 'size_limit': 2000, **options}
    with MDSWriter(out=str(folder), columns=columns('pixels', (1, 4, 6), mirrored), **settings) as writer:
        for index in range(SAMPLES):
            array = np.full((1, 4, 6), index + 1, np.float16)
            views = {LATENTS: array, LATENTS_MIRRORED: -array} if mirrored else {LATENTS: array}
            writer.write({**views, LABEL: index % 3, NAME: f'n{index}'})
    return folder


def flip_last_byte(file: Path) -> None:
    """Damage that no size tells; a second time it repairs it."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def register_together(local: Path, moment: float, times: int, temporary: Path | None = None) -> None:
    """Build data sets from one moment on, as a run does that was started beside others; may have its own TMPDIR."""
    torch.set_num_threads(1)
    if temporary is not None:
        temporary.mkdir()
        tempfile.tempdir = str(temporary)
    time.sleep(max(moment - time.time(), 0))
    for _ in range(times):
        LatentDataset(local, batch_size=4)


def read_epochs(
    local: Path, global_batch_size: int, num_workers: int = 0, epochs: int = 1, **arguments: Any
) -> list[list[list[int]]]:
    """Ids by epoch, batch and row."""
    loader = train_loader(
        local, batch_size=global_batch_size // dist.get_world_size(), num_workers=num_workers, **arguments
    )
    return [[batch[SAMPLE_IDS].tolist() for batch in loader] for _ in range(epochs)]


def read_mirrors(local: Path, global_batch_size: int, num_workers: int) -> list[list[list[float]]]:
    """The first number of each sample's latents by epoch, batch and row, for two epochs."""
    batch_size = global_batch_size // dist.get_world_size()
    loader = train_loader(local, batch_size=batch_size, num_workers=num_workers, mirror_seed=5)
    return [[batch[RAW_LATENTS][:, 0, 0, 0].tolist() for batch in loader] for _ in range(2)]


def refusal_of_a_cache(local: str, remote: str) -> str:
    try:
        train_loader(local, batch_size=4, remote=remote)
    except UserError as error:
        return str(error)
    raise AssertionError('a cache that another run is using was taken')


def read_and_wait(local: Path, remote: str | None, ready: Path) -> None:
    """Reads a first batch and then hangs, to be killed."""
    batches = iter(train_loader(local, batch_size=8, remote=remote))
    next(batches)
    ready.touch()
    time.sleep(60)


def read_all(local: Path, remote: str | None, result: Path) -> None:
    result.write_text(str(sum(len(batch[SAMPLE_IDS]) for batch in train_loader(local, batch_size=8, remote=remote))))


def prepare_many_times(parent: Path, times: int, started: Path) -> None:
    """Prepares one folder after another, to be killed in the middle of one."""
    for index in range(times):
        prepare_digits(parent / str(index))
        started.touch()


class IdsModel(ComposerModel):
    """The smallest model that Composer trains; remembers which samples its metric was updated with."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.evaluated: list[int] = []

    def forward(self, batch: dict) -> torch.Tensor:
        return self.layer(batch[RAW_LATENTS].float().mean((1, 2, 3)).unsqueeze(1))

    def loss(self, outputs: torch.Tensor, batch: dict) -> torch.Tensor:
        return outputs.square().mean()

    def get_metrics(self, is_train: bool) -> dict:
        return {} if is_train else {'mean': MeanMetric()}

    def update_metric(self, batch: dict, outputs: torch.Tensor, metric: MeanMetric) -> None:
        metric.update(outputs)
        self.evaluated += batch[SAMPLE_IDS].tolist()


class RecordBatches(Callback):
    """Ids and first numbers of the latents."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[int], list[float]]] = []

    def batch_start(self, state: Any, logger: Any) -> None:
        self.batches.append((state.batch[SAMPLE_IDS].tolist(), state.batch[RAW_LATENTS][:, 0, 0, 0].tolist()))


def evaluated_ids(local: Path, batch_size: int) -> list[int]:
    model, loader = IdsModel(), eval_loader(local, batch_size=batch_size)
    trainer = Trainer(model=model, eval_dataloader=loader, device='cpu', progress_bar=False, run_name='ids')
    trainer.eval()
    trainer.close()
    return model.evaluated


def trained_batches(local: Path, folder: Path, num_workers: int, load_path: str | None = None) -> list:
    """What ``RecordBatches`` notes of a run of 18 batches, image or mirror; saves a checkpoint after each batch."""
    model, record = IdsModel(), RecordBatches()
    trainer = Trainer(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.01),
        train_dataloader=train_loader(local, batch_size=16, num_workers=num_workers, mirror_seed=5),
        max_duration='18ba',
        callbacks=[record],
        device='cpu',
        progress_bar=False,
        run_name='ids',
        save_folder=str(folder),
        save_interval='1ba',
        save_filename='ba{batch}.pt',
        load_path=load_path,
    )
    trainer.fit()
    trainer.close()
    return record.batches
