"""Real runs: through the documented command line, in processes of their own or in the test's, and by a Trainer here."""

import contextlib
import functools
import io
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from mlflow import MlflowClient
from torch import Tensor, nn

from tests.helpers import randomised
from tests.warm import ROOT, exit_codes, inside, may_have_namespaces, rank_variables, start_program
from tread_composer.builders.trainer import build_trainer
from tread_composer.cli import main
from tread_composer.config import load_config
from tread_composer.weights.trained import read_trained, write_with_cost

YAMLS = ROOT / 'yamls'
needs_namespaces = pytest.mark.skipif(
    not may_have_namespaces(), reason='needs mounts or a network of its own, which are refused here'
)
COMPOSER = str(Path(sys.executable).parent / 'composer')

# A network of a few thousand parameters on the real digits; an epoch is 11 batches.
SMALL = (
    'model={name: dit, patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2}',
    'optimizer.lr=1e-3',
    'scheduler={name: constant}',  # not bound to max_duration, which the tests of resuming extend
    'callbacks.sample_grid=null',
    'callbacks.digits_quality=null',
    'eval_interval=100ba',
    'save_interval=100ba',
    'max_duration=14ba',
)
SMALL_HERE = (
    *SMALL,
    'callbacks.speed_monitor=null',
    'callbacks.lr_monitor=null',
    'loggers.mlflow=null',
    'global_train_batch_size=16',
    'progress_bar=false',
    'save_interval=2ba',
    'max_duration=3ba',
)


def environment(**extra: str) -> dict[str, str]:
    """One thread for each process: sums must not depend on what else the machine does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('MLFLOW', 'TREAD'))}
    return {**kept, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **extra}


def command(yaml: str | Path, *overrides: str, launcher: int = 0) -> list[str]:
    """``python train.py x.yaml key=value ...``, or ``composer -n LAUNCHER train.py ...``, whose start takes 5 s."""
    program = [COMPOSER, '-n', str(launcher)] if launcher else [sys.executable]
    return [*program, str(ROOT / 'train.py'), str(yaml), *overrides]


def launch(folder: Path, words: Sequence[str], ranks: int = 1, **variables: str) -> subprocess.CompletedProcess:
    """Run to the end in ``folder``; what begins with Python and a file or ``-m`` is forked behind the imports.

    Several ranks get the variables that the launcher would set. Returns the first exit code that is not 0, and what
    rank 0 wrote; where it is not 0, what all wrote to stderr.
    """
    if words[0] != sys.executable:
        return subprocess.run(words, cwd=folder, env=environment(**variables), capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as name:
        outputs = [[Path(name, f'{stream}{rank}') for stream in ('out', 'err')] for rank in range(ranks)]
        of_ranks = rank_variables(ranks) if ranks > 1 else [{}]
        environments = [environment(**variables, **of_rank) for of_rank in of_ranks]
        each = zip(environments, outputs, strict=True)
        codes = exit_codes([start_program(words[1:], folder, env, files) for env, files in each])
        errors = '\n'.join(err.read_text() for _, err in (outputs if any(codes) else outputs[:1]))
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess(words, code, outputs[0][0].read_text(), errors)


def launch_here(folder: Path, yaml: str | Path, *overrides: str) -> subprocess.CompletedProcess:
    """The same command in this process, without the seconds of its imports, and without MLflow's global state."""
    settings = (*overrides, 'loggers.mlflow=null', 'device=cpu', 'progress_bar=false')
    return call_here(folder, main, ['train', str(yaml), *settings])


def refused_here(folder: Path, yaml: str | Path, *overrides: str) -> str:
    """The message of a command that must end with exit code 2, print nothing else and write nothing."""
    before = sorted(folder.rglob('*'))
    done = call_here(folder, main, ['train', str(yaml), *overrides])
    assert (done.returncode, done.stdout) == (2, '') and 'Traceback' not in done.stderr, done.stdout + done.stderr
    assert sorted(folder.rglob('*')) == before
    return done.stderr


def call_here(folder: Path, program: Callable[..., int], words: Sequence[str]) -> subprocess.CompletedProcess:
    """A program of ours in this process, started in ``folder``: exit code and what it wrote."""
    out, err = io.StringIO(), io.StringIO()
    with inside(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = program(words)
        except Exception:
            code = 1
            traceback.print_exc()
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def make_store(folder: Path) -> None:
    """An MLflow store that holds nothing, unless there is one: one of MLflow's takes 70 migrations and a second."""
    folder.mkdir(exist_ok=True)
    store = folder / 'mlflow.db'
    if not store.exists():
        store.write_bytes(_empty_store())


@functools.cache
def _empty_store() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f'sqlite:///{folder}/mlflow.db').search_experiments()
        return Path(folder, 'mlflow.db').read_bytes()


def train(folder: Path, yaml: str, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess:
    """Train a small version of a shipped recipe; it must succeed."""
    make_store(folder / 'runs')
    done = launch(folder, command(YAMLS / yaml, *SMALL, *overrides), ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def tracked(folder: Path) -> Any:
    """The only MLflow run in ``folder``'s store."""
    client = MlflowClient(f'sqlite:///{folder}/runs/mlflow.db')
    (tracked_run,) = client.search_runs([client.get_experiment_by_name('digits').experiment_id])
    return tracked_run


def history(folder: Path, metric: str = 'loss/train/total') -> dict[int, float]:
    """A metric by step, of the only run there is. A step that was trained twice must have the same value."""
    client = MlflowClient(f'sqlite:///{folder}/runs/mlflow.db')
    values: dict[int, float] = {}
    for point in client.get_metric_history(tracked(folder).info.run_id, metric):
        assert values.setdefault(point.step, point.value) == point.value, point.step
    return values


def checkpoint(folder: Path, name: str) -> dict[str, Any]:
    """``state`` of the latest checkpoint of a run."""
    return torch.load(folder / 'runs' / name / 'latest-rank0.pt', weights_only=False)['state']


def assert_same_training(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, optimizer moments and average are equal to the bit."""
    pairs = [(a['model'], b['model'])]
    pairs.append((dict(a['algorithms'])['EMA']['average'], dict(b['algorithms'])['EMA']['average']))
    for one, other in zip(a['optimizers'].values(), b['optimizers'].values(), strict=True):
        pairs += [(one['state'][name], other['state'][name]) for name in one['state']]
    for one, other in pairs:
        assert one.keys() == other.keys() and one
        different = [name for name in one if not torch.equal(torch.as_tensor(one[name]), torch.as_tensor(other[name]))]
        assert not different, different[:5]


@dataclass
class Run:
    """A run that is over: its folder, and the Trainer that still has it in memory."""

    folder: Path
    trainer: Trainer

    @property
    def denoiser(self) -> nn.Module:
        return self.trainer.state.model.denoiser.eval()  # type: ignore[union-attr, return-value]


def run(root: Path, yaml: str, *overrides: str) -> Run:
    """Train here for three batches, from weights that differ from zero everywhere; the data are gone afterwards."""
    places = (f'data.local={root / "data"}', f'save_folder={root / "run"}')
    trainer = build_trainer(load_config(YAMLS / yaml, [*SMALL_HERE, *places, *overrides]))
    randomised(trainer.state.model)
    trainer.fit()
    trainer.close()
    shutil.rmtree(root / 'data')
    return Run(root / 'run', trainer)


def export(source: Any, out: Path, weights: str = 'ema', overwrite: bool = False) -> dict[str, Any]:
    """As the command does."""
    return write_with_cost(read_trained(source, weights=weights), str(source), out, overwrite)


def predict(denoiser: nn.Module, channels: int = 1, size: int = 8, labels: tuple[int, ...] = (0, 3, 7)) -> Tensor:
    """A prediction on fixed inputs."""
    x = torch.randn(len(labels), channels, size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return denoiser(x, torch.linspace(0.1, 0.9, len(labels)), torch.tensor(labels))
