"""Real runs through the documented command line, in processes of their own."""

import contextlib
import io
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from tread_composer.cli import main

ROOT = Path(__file__).parent.parent
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


def environment(**extra: str) -> dict[str, str]:
    """One thread for each process: sums must not depend on what else the machine does."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(('MLFLOW', 'TREAD'))}
    return {**kept, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', **extra}


def command(yaml: str | Path, *overrides: str, ranks: int = 1, launcher: bool = False) -> list[str]:
    """``composer -n 2 train.py x.yaml key=value ...``.

    One rank runs without the launcher unless it is asked for: the same program, and the launcher's start takes 5 s.
    """
    program = [COMPOSER, '-n', str(ranks)] if launcher or ranks > 1 else [sys.executable]
    return [*program, str(ROOT / 'train.py'), str(yaml), *overrides]


def launch(folder: Path, words: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess:
    """Run to the end, in ``folder``."""
    return subprocess.run(words, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout)


def launch_here(folder: Path, yaml: str | Path, *overrides: str) -> subprocess.CompletedProcess:
    """The same command in this process, without the seconds of its imports, and without MLflow's global state."""
    out, err, before = io.StringIO(), io.StringIO(), os.getcwd()
    words = ['train', str(yaml), *overrides, 'loggers.mlflow=null', 'device=cpu', 'progress_bar=false']
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(words)
    except Exception:
        code = 1
        traceback.print_exc(file=err)
    finally:
        os.chdir(before)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def train(folder: Path, yaml: str, *overrides: str, **how: Any) -> subprocess.CompletedProcess:
    """Train a small version of a shipped recipe; it must succeed."""
    done = launch(folder, command(ROOT / 'yamls' / yaml, *SMALL, *overrides, **how))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def runs(folder: Path, experiment: str = 'digits') -> list[Any]:
    """All MLflow runs in ``folder``'s store."""
    client = MlflowClient(f'sqlite:///{folder}/runs/mlflow.db')
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id])


def history(folder: Path, metric: str = 'loss/train/total') -> dict[int, float]:
    """A metric by step, of the only run there is. A step that was trained twice must have the same value."""
    (run,) = runs(folder)
    client = MlflowClient(f'sqlite:///{folder}/runs/mlflow.db')
    values: dict[int, float] = {}
    for point in client.get_metric_history(run.info.run_id, metric):
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
