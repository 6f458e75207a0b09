"""Real runs through the documented command line, in processes of their own."""

import atexit
import contextlib
import functools
import io
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

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
    """``train.py x.yaml key=value ...``, under ``composer -n 2`` if that is asked for: its start takes 5 s."""
    program = [COMPOSER, '-n', str(ranks)] if launcher else [sys.executable]
    return [*program, str(ROOT / 'train.py'), str(yaml), *overrides]


class WarmProcess:
    """A command in a process that was forked behind the imports (``tests/warm.py``); looks like a ``Popen``."""

    def __init__(self, words: Sequence[str], cwd: Path, env: dict[str, str], stdout: IO[str], stderr: IO[str]) -> None:
        self.connection = socket.socket(socket.AF_UNIX)
        self.connection.connect(_warm_server())
        asked = {'words': words[1:], 'folder': str(cwd), 'environment': env}
        socket.send_fds(self.connection, [json.dumps(asked).encode()], [stdout.fileno(), stderr.fileno()])
        self.answers = self.connection.makefile('r')
        self.pid = int(self.answers.readline())
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self.returncode is None:
            ready = select.poll()  # select() itself refuses descriptors above 1,024
            ready.register(self.connection, select.POLLIN)
            if ready.poll(0):
                self.wait()
        return self.returncode

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self.answers.readline())
            self.answers.close()
            self.connection.close()
        return self.returncode

    def kill(self) -> None:
        """End it at once."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@functools.cache
def _warm_server() -> str:
    folder = tempfile.mkdtemp()
    path = f'{folder}/warm'
    words = [sys.executable, '-m', 'tests.warm', path]
    server = subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stdout.readline() == 'ready\n'
    atexit.register(shutil.rmtree, folder)
    atexit.register(server.communicate)  # the end of its stdin ends it
    return path


def launch(folder: Path, words: Sequence[str], timeout: float = 240, ranks: int = 1) -> subprocess.CompletedProcess:
    """Run to the end, in ``folder``; on several ranks with the variables that the launcher would set.

    Returns:
        The first exit code that is not 0, and what rank 0 wrote.
    """
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    of_all = {'WORLD_SIZE': ranks, 'LOCAL_WORLD_SIZE': ranks, 'NODE_RANK': 0, 'MASTER_ADDR': '127.0.0.1'}
    of_all = {} if ranks == 1 else {**of_all, 'MASTER_PORT': port}
    with contextlib.ExitStack() as stack:
        # Files: nobody would read a pipe of rank 1 while rank 0 is waited for.
        out, err = ([stack.enter_context(tempfile.TemporaryFile('w+')) for _ in range(ranks)] for _ in range(2))
        processes = []
        for rank in range(ranks):
            variables = {**of_all, 'RANK': rank, 'LOCAL_RANK': rank} if of_all else {}
            env = environment(**{key: str(value) for key, value in variables.items()})
            start = WarmProcess if words[0] == sys.executable and words[1].endswith('.py') else subprocess.Popen
            processes.append(start(words, cwd=folder, env=env, stdout=out[rank], stderr=err[rank]))
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):  # one failed: the others may wait for it for ever
                end = min(end, time.monotonic() + 5)
            time.sleep(0.05)
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
        for file in (*out, *err):
            file.seek(0)
        errors = '\n'.join(file.read() for file in (err if any(codes) else err[:1]))
        return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), out[0].read(), errors)


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


@functools.cache
def _empty_store() -> bytes:
    """An MLflow store that holds nothing: making one takes 70 migrations, as long as a run of ours."""
    with tempfile.TemporaryDirectory() as folder:
        MlflowClient(f'sqlite:///{folder}/mlflow.db').search_experiments()
        return Path(folder, 'mlflow.db').read_bytes()


def train(folder: Path, yaml: str, *overrides: str, **how: Any) -> subprocess.CompletedProcess:
    """Train a small version of a shipped recipe; it must succeed. Only the launcher makes a new MLflow store."""
    store = folder / 'runs' / 'mlflow.db'
    if not store.exists() and not how.get('launcher'):
        store.parent.mkdir(exist_ok=True)
        store.write_bytes(_empty_store())
    launched = 1 if how.get('launcher') else how.get('ranks', 1)
    done = launch(folder, command(ROOT / 'yamls' / yaml, *SMALL, *overrides, **how), ranks=launched)
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
