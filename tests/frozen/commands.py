"""Commands of the public command line, and what they leave as comparable values.

Everything reads documented results alone: what is printed, images, exported files, MLflow.
"""

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file

from tests.runs import COMPOSER, ROOT, launch

# What differs from run to run or from machine to machine, and what stands for it.
_MOVING = (
    (r'\d{4}[-/]\d\d[-/]\d\d \d\d:\d\d:\d\d', '<date>'),
    (r'\b\d+:\d\d:\d\d\b', '<duration>'),
    (r'\bin \d+(\.\d+)? s\b', 'in <seconds> s'),
    (r'\b[\d,]+(\.\d+)? (images|batches)/s', r'<rate> \2/s'),
    (r'\b0x[0-9a-f]{6,}', '<address>'),
)


class Commands:
    """Runs commands in a folder with a copy of ``yamls/``, so that they read as in the README and name no path.

    Args:
        folder: An empty one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / 'yamls', folder / 'yamls')

    def __call__(self, *words: str | Path, ranks: int = 1) -> subprocess.CompletedProcess:
        """``python -m tread_composer WORDS``, to the end; ``train`` on several ranks by the launcher."""
        program = [sys.executable, '-m', 'tread_composer']
        if ranks > 1:
            assert words[0] == 'train'
            program, words = [COMPOSER, '-n', str(ranks), str(ROOT / 'train.py')], words[1:]
        return launch(self.folder, [*program, *map(str, words)], COLUMNS='120', NO_COLOR='1')

    def succeed(self, *words: str | Path, ranks: int = 1) -> str:
        """The same for a command that must end with 0; returns what it wrote to stdout."""
        done = self(*words, ranks=ranks)
        assert done.returncode == 0, f'{words}: exit code {done.returncode}\n{done.stdout}{done.stderr}'
        return done.stdout

    def normalised(self, text: str) -> list[str]:
        """Lines of what a command wrote, without paths, times and speeds."""
        text = text.replace('\r', '\n')
        places = {str(self.folder.resolve()): '<folder>', str(self.folder): '<folder>', str(ROOT): '<root>'}
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
