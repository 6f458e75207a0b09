"""A run of twelve batches whose folder is spoilt, and the same command again."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from tests.runs import SMALL, YAMLS, launch, launch_here, refused_here

YAML = YAMLS / 'digits_tread.yaml'
LENGTH = 12  # batches; an epoch has 11
NAME = 'digits_tread'
WORDS = (
    *SMALL,
    'algorithms.tread={start: 1, end: -2, selection_rate: 0.5}',
    'save_interval=3ba',
    f'max_duration={LENGTH}ba',
)


def folder_of(root: Path) -> Path:
    return root / 'runs' / NAME


def names(root: Path) -> set[str]:
    """What is in the run's folder, without what is not about checkpoints."""
    texts = ('config.yaml', 'data.json', 'environment.json', '.lock')
    return {path.name for path in folder_of(root).iterdir() if path.name not in texts}


def batch_of(name: int | str) -> str:
    """The file name of a batch's checkpoint."""
    return f'ep{(int(name) - 1) // 11}-ba{name}-rank0.pt'


def again(root: Path, *words: str):
    return launch_here(root, YAML, *WORDS, *words)


def program(root: Path, name: str, *words: str, **variables: str):
    """The same by one of the programs in this folder, in a process of its own."""
    start = [sys.executable, str(Path(__file__).parent / name), str(YAML)]
    return launch(
        root, [*start, *WORDS, 'loggers.mlflow=null', 'device=cpu', 'progress_bar=false', *words], **variables
    )


def refused(root: Path, *words: str) -> str:
    """The message of a command that must end with exit code 2 and write nothing."""
    return refused_here(root, YAML, *WORDS, *words)


def sharded(folder: Path, entry: object = 'text') -> Path:
    """A checkpoint of torch's writer."""
    dcp.save({'weight': torch.zeros(3), 'other': entry}, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


class Trap:
    """Makes a folder when it is unpickled, by a function of a pickle's choice."""

    def __init__(self, marker: Path, function: object = os.mkdir, arguments: tuple[object, ...] | None = None) -> None:
        self.call = (function, (str(marker),) if arguments is None else arguments)

    def __reduce__(self) -> tuple:
        return self.call
