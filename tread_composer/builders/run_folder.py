"""The folder of a run: what binds its checkpoints to a configuration, and what is written beside them."""

import contextlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from composer.utils import dist, is_compressed_pt, is_tar, maybe_create_object_store_from_uri, parse_uri

from tread_composer.builders.run_data import with_planned_numbers
from tread_composer.config import Component, Config
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.core.masking import without_secrets
from tread_composer.data.manifest import Manifest
from tread_composer.io.checkpoint_reader import check_harmless
from tread_composer.io.checkpoints import check_whole, checkpoints_in, newest_whole
from tread_composer.io.files import write_atomically
from tread_composer.io.locks import locked

__all__ = [
    'DATA_NAME', 'check_load_path', 'check_run_folder', 'decisive_settings', 'locked_run', 'part_folder', 'run_folder',
    'write_run_files',
]  # fmt: skip

_PACKAGES = (
    'torchvision', 'composer', 'streaming', 'mlflow', 'numpy', 'diffusers', 'torch_fidelity', 'tread_composer',
)  # fmt: skip
_DISTRIBUTIONS = {'composer': 'mosaicml', 'streaming': 'mosaicml-streaming'}  # where the names differ
# In a word of the command line, whose value is then left out.
_SECRET_WORDS = ('token', 'password', 'secret', 'key=')

DATA_NAME = 'data.json'
"""The manifest of the training data, in the run's folder: what samples a checkpoint needs no data."""

_DECISIVE = (
    'seed', 'global_train_batch_size', 'autoencoder', 'model', 'objective', 'latent_scale', 'latent_shift',
    'label_dropout', 'optimizer', 'scheduler', 'algorithms', 'precision',
)  # fmt: skip
"""Settings that a continued run may not change; data by what they are, not by where they lie. Not among them: what
must change with the machine (ranks, microbatch, sharding, compile, ``model.attention``) and what only looks on."""


def run_folder(config: Config) -> Path:
    """``save_folder`` with Composer's placeholder filled in."""
    return Path(config.save_folder.replace('{run_name}', config.run_name))


def part_folder(part: Component, folder: Path, run_name: str) -> Path:
    """Where a part with a ``default_folder`` writes: as its settings say, else there within the run's ``folder``."""
    setting = part.kwargs.get('folder')
    return folder / part.instance.default_folder if setting is None else Path(setting.replace('{run_name}', run_name))


def decisive_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what is trained, of a configuration as ``Config.to_dict`` has it: what a checkpoint is bound to."""
    keys = ('name', 'train_split', 'shuffle_seed', 'num_canonical_nodes', 'mirror')
    model = dict(tree.get('model') or {})
    model.pop('attention', None)  # the same function, computed otherwise
    # Newer than the first checkpoints: at the value that they had without it, it is left out.
    if model.get('name', 'dit') == 'dit' and model.get('qk_norm') is False:
        del model['qk_norm']
    data = {key: tree['data'].get(key) for key in keys}
    return {**{key: tree.get(key) for key in _DECISIVE}, 'model': model, 'data': data}


def check_run_folder(config: Config) -> None:
    """Refuse a run folder that another configuration has begun: its checkpoints would be continued or overwritten.

    The ``ResumeError`` lists each difference of the decisive settings.
    """
    if config.save_folder is None:
        return
    path = run_folder(config) / 'config.yaml'
    # Without a checkpoint there is nothing to continue and nothing to lose: that run died before it could save.
    if not path.exists() or not checkpoints_in(path.parent):
        return
    config = with_planned_numbers(config)
    if config.scaled_by_data:
        return  # the data are not described here yet; compared once they are
    try:
        saved = decisive_settings(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(
            f'{path}: no configuration of a run, or a damaged one ({reason}); it says what the checkpoints beside it '
            f'are of. Put a copy of it back (MLflow keeps one with the run), or take another run_name'
        ) from None
    current = decisive_settings(config.to_dict())
    if saved != current:
        remedy = 'To continue that run, give its settings; to start another, give it a name of its own: run_name=...'
        raise ResumeError.from_differences(str(path), saved, current, remedy)


def check_load_path(config: Config) -> None:
    """Refuse a checkpoint that is damaged, not one of a run, or could run code, before anything is written.

    The run's own newest one if it goes on from that; ``load_path`` otherwise, unless it is not here (a URI).
    """
    if config.autoresume:
        newest, _ = newest_whole(run_folder(config))
        if newest is not None:
            check_harmless(newest)
            return
    text = config.load_path
    if text is None:
        return
    if is_tar(text):
        raise UserError(f'load_path: {text}: archives are not unpacked; unpack it, and give the checkpoint within')
    if '://' in text:
        _check_remote(text)
    if '://' in text or '{' in text or is_compressed_pt(text):
        return
    try:
        check_harmless(check_whole(Path(text)))
    except UserError as error:
        remedy = 'Give a checkpoint of a run, for example runs/<run_name>/latest-rank0.pt'
        raise UserError(f'load_path: {error}\n{remedy}') from None
    # Which reader is used depends on the settings, not on what lies there.
    kind = 'sharded' if Path(text).is_dir() else 'full'
    expected = getattr(config.fsdp, 'state_dict_type', 'full')
    if kind != expected:
        raise UserError(
            f'load_path: {text} is a {kind} checkpoint, and this run reads {expected} ones; '
            f'set parallelism_config.fsdp.state_dict_type={kind}'
        )


def _check_remote(address: str) -> None:
    """Ask the object store for a checkpoint's size: a wrong address or password is found before anything is made."""
    try:
        store = maybe_create_object_store_from_uri(address)
        if store is not None and not address.endswith('/'):  # a sharded one is a folder, and has no size
            store.get_object_size(parse_uri(address)[2])
    except Exception as error:  # each kind of store has errors of its own
        reason = ' '.join(str(error).split()) or type(error).__name__
        raise UserError(
            f'load_path: {address}: cannot be read: {reason}. Check the address and the credentials'
        ) from None


@contextlib.contextmanager
def locked_run(config: Config) -> Iterator[None]:
    """Let no other process train in the run's folder while the block runs: two would write over each other's files.

    The lock dies with its process. It holds between nodes where their file system has locks across them (NFS 3 with its
    lock daemon and NFS 4 do, Lustre with ``-o flock``). A folder at an address (``s3://``) has none. ``UserError`` if
    another process trains there, the folder cannot be made, or its file system has no locks.
    """
    if config.save_folder is None or '://' in config.save_folder:
        yield
        return
    folder = run_folder(config)
    absent = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f'save_folder: {config.save_folder!r} cannot be made: {error}') from None
    busy = (
        f'{folder}: another process trains this run now ({{holder}}). Wait for its end, or give this run a name of its '
        f'own: run_name=...'
    )
    with locked(folder / '.lock', busy):
        try:
            yield
        except UserError:
            # Refused before anything was written: nothing stays behind.
            if absent and os.listdir(folder) == ['.lock']:
                (folder / '.lock').unlink()
                with contextlib.suppress(OSError):  # another run was begun beside it
                    for path in absent:
                        path.rmdir()
            raise


def write_run_files(config: Config, manifest: Manifest) -> None:
    """Write ``config.yaml``, ``data.json`` (the manifest) and ``environment.json`` into the run's folder, on rank 0."""
    if config.save_folder is None or dist.get_global_rank() != 0:
        return
    folder = run_folder(config)
    write_atomically(folder / 'config.yaml', config.to_yaml().encode())
    write_atomically(folder / DATA_NAME, f'{manifest.model_dump_json(indent=2)}\n'.encode())
    write_atomically(folder / 'environment.json', json.dumps(environment(), indent=2).encode())


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
