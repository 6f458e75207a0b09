"""What a run ran on: versions, commit, machine. Written beside every run so that a number can be traced."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from composer.utils import dist

from tread_composer.core.masking import without_secrets

__all__ = ['environment']

_PACKAGES = (
    'torchvision', 'composer', 'streaming', 'mlflow', 'numpy', 'diffusers', 'torch_fidelity', 'tread_composer',
)  # fmt: skip
_DISTRIBUTIONS = {'composer': 'mosaicml', 'streaming': 'mosaicml-streaming'}  # where the names differ
# In a word of the command line, whose value is then left out.
_SECRET_WORDS = ('token', 'password', 'secret', 'key=')


def environment() -> dict[str, Any]:
    """The software and the machine, ready for JSON. A package that is not installed has the version None.

    Environment variables are left out, and so are the values of command-line arguments that look like credentials.
    """
    return {
        'python': platform.python_version(),
        'platform': platform.platform(),
        'packages': {'torch': torch.__version__, **{name: _version(name) for name in _PACKAGES}},
        'code': _code(Path(__file__).resolve().parent),
        'command': [without_secrets(_without_secret(word)) for word in sys.argv],
        'cpu': _cpu(),
        'cpu_count': os.cpu_count(),
        'torch_threads': torch.get_num_threads(),
        'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        'cuda': torch.version.cuda,  # type: ignore[attr-defined]
        'world_size': dist.get_world_size(),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(_DISTRIBUTIONS.get(package, package))
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(['git', '-C', str(folder), *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _code(folder: Path) -> dict[str, Any]:
    """Commit and whether the files differ from it; None where the package does not lie in its own repository."""
    # An installed package may lie in a virtual environment inside of someone else's repository: ask for tracked files.
    if not _git(folder, 'ls-files', '--', '.'):
        return {'commit': None, 'dirty': None}
    status = _git(folder, 'status', '--porcelain')
    return {'commit': _git(folder, 'rev-parse', 'HEAD'), 'dirty': None if status is None else bool(status)}


def _cpu() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    # ARM's has no such line.
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.machine()


def _without_secret(word: str) -> str:
    if not any(secret in word.lower() for secret in _SECRET_WORDS):
        return word
    return word.partition('=')[0] + '=***' if '=' in word else '***'
