"""Commands of the public command line, each in a process of its own, and what they leave as comparable values.

A command spends five seconds on imports and often less than one on its work. So one process imports everything, plans
one recipe to reach the imports inside of functions too, and forks a child for each command. The child runs
``python -m tread_composer``. Nothing here knows a module of the package.
"""

import atexit
import contextlib
import gc
import hashlib
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

__all__ = [
    'ROOT',
    'Commands',
    'Done',
    'launch_ranks',
    'normalised',
    'picture_digest',
    'tensor_digest',
    'tensor_norms',
    'with_recipes',
]

ROOT = Path(__file__).resolve().parents[2]

# What differs from run to run or from machine to machine, and what stands for it.
_MOVING = (
    (r'\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d', '<date>'),
    (r'\b\d+:\d\d:\d\d\b', '<duration>'),
    (r'\bin \d+(\.\d+)? s\b', 'in <seconds> s'),
    (r'\b[\d,]+(\.\d+)? (images|batches)/s', r'<rate> \2/s'),
    (r'\b0x[0-9a-f]{6,}', '<address>'),
)


@dataclass(frozen=True)
class Done:
    """A command that has ended: exit code, and what it wrote to either stream, as written."""

    code: int
    out: str
    err: str


class Commands:
    """Runs commands one after another; a context manager, whose process ends with it.

    Args:
        folder: Where the commands run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, '-m', 'tests.frozen.commands', str(folder)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> 'Commands':
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """The end of its input ends the process."""
        self.process.communicate()

    def __call__(self, *words: str | Path, cwd: Path | None = None) -> Done:
        """``python -m tread_composer WORDS``, to the end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {'words': [str(word) for word in words], 'folder': str(cwd or self.folder)}
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return Done(**json.loads(self.process.stdout.readline()))

    def succeed(self, *words: str | Path, cwd: Path | None = None) -> Done:
        """The same for a command that must end with 0.

        Raises:
            RuntimeError: It did not.
        """
        done = self(*words, cwd=cwd)
        if done.code:
            text = f'exit code {done.code} of: {" ".join(map(str, words))}\n{done.out}{done.err}'
            raise RuntimeError(text)
        return done


def environment() -> dict[str, str]:
    """One thread and no GPU: sums must not depend on what else the machine has or does."""
    dropped = ('MLFLOW', 'TREAD', 'FSDP_VERSION', 'COLUMNS')
    kept = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    fixed = {'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '', 'COLUMNS': '120', 'NO_COLOR': '1'}
    return {**kept, **fixed, 'PYTHONPATH': str(ROOT)}


def launch_ranks(folder: Path, ranks: int, words: Sequence[str]) -> None:
    """``composer -n RANKS train.py WORDS``, which must succeed.

    Raises:
        RuntimeError: It did not.
    """
    program = [str(Path(sys.executable).parent / 'composer'), '-n', str(ranks), str(ROOT / 'train.py')]
    done = subprocess.run([*program, *words], cwd=folder, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'exit code {done.returncode} of: {" ".join(words)}\n{done.stdout}{done.stderr}')


def with_recipes(folder: Path) -> Path:
    """A folder with a copy of ``yamls/``, so that a command reads as in the README and names no path of a machine."""
    shutil.copytree(ROOT / 'yamls', folder / 'yamls')
    return folder


def normalised(text: str, folder: Path) -> list[str]:
    """Lines of what a command wrote, without paths, times and speeds.

    Args:
        text: As written.
        folder: Where the command ran.
    """
    text = text.replace('\r', '\n')
    places = {str(folder.resolve()): '<folder>', str(folder): '<folder>', str(ROOT): '<root>'}
    places |= {sys.prefix: '<venv>', f'{Path.home()}/': '~/'}
    for place, name in places.items():
        text = text.replace(place, name)
    for pattern, name in _MOVING:
        text = re.sub(pattern, name, text)
    return [line.rstrip() for line in text.splitlines()]


def tensor_digest(path: Path) -> str:
    """SHA-256 over names, types, shapes and values of a safetensors file, whatever its header says."""
    digest = hashlib.sha256()
    for name, value in sorted(load_file(path).items()):
        digest.update(f'{name} {value.dtype} {value.shape}'.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def tensor_norms(path: Path) -> dict[str, float]:
    """Euclidean norm of each tensor: what may be compared where rounding differs."""
    return {name: float(np.linalg.norm(value.astype(np.float64))) for name, value in sorted(load_file(path).items())}


def picture_digest(folder: Path) -> str:
    """SHA-256 over names and pixels of all PNG files below a folder, whatever their compression."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob('*.png')):
        pixels = np.asarray(Image.open(path))
        digest.update(f'{path.relative_to(folder)} {pixels.shape}'.encode())
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def _serve(folder: str) -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), 'w')
    os.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        _command(['plan', str(ROOT / 'yamls' / 'digits.yaml')])  # for its imports
        import composer  # noqa: F401
        import mlflow  # noqa: F401
        import streaming  # noqa: F401
    gc.freeze()  # a child would copy each page of memory whose counts a collection touches
    for line in _lines(sys.stdin):
        request = json.loads(line)
        os.chdir(request['folder'])
        files = [Path(folder, f'.{name}-of-command') for name in ('out', 'err')]
        child = os.fork()
        if child == 0:
            answers.close()
            _redirect(files)
            _leave(_command(request['words']))
        _, status = os.waitpid(child, 0)
        out, err = (file.read_text(errors='replace') for file in files)
        for file in files:
            file.unlink()
        print(json.dumps({'code': os.waitstatus_to_exitcode(status), 'out': out, 'err': err}), file=answers, flush=True)


def _lines(stream: IO[str]) -> Iterator[str]:
    """Without reading ahead: a child shares the descriptor."""
    while line := stream.readline():
        yield line


def _redirect(files: Sequence[Path]) -> None:
    descriptors = [os.open(os.devnull, os.O_RDONLY)]
    descriptors += [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in files]
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)


def _command(words: list[str]) -> int:
    """The exit code of ``python -m tread_composer WORDS``, run here."""
    sys.argv[:] = ['tread_composer', *words]
    try:
        runpy.run_module('tread_composer', run_name='__main__', alter_sys=True)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def _leave(code: int) -> NoReturn:
    """End with the exit handlers, but without taking down all that was imported: that takes 2 s."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == '__main__':
    _serve(sys.argv[1])
