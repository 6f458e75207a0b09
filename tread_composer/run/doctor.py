"""``python -m tread_composer doctor [x.yaml]``: would a run fail on this machine? The questions that ``train`` asks.

Each check returns a line that says what is there, or raises ``UserError`` with what is wrong and the cure.
"""

import functools
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib import metadata

import torch
from packaging.requirements import Requirement

from tread_composer.builders.memory import kept_copies
from tread_composer.builders.model import check_fit
from tread_composer.builders.run_data import num_workers, planned_manifest
from tread_composer.builders.run_folder import check_load_path, check_run_folder, run_folder
from tread_composer.config import Config, check_files, check_machine
from tread_composer.config.registry import resolve
from tread_composer.core.errors import UserError
from tread_composer.io.device import check_shared_memory
from tread_composer.io.files import check_writable
from tread_composer.metrics.inception import check_weights, find_weights
from tread_composer.run.plan import data_state, make_plan

__all__ = ['check_run_machine', 'examine']

_MIB, _GB = 2**20, 1e9
_SEGMENTS_BYTES = 8 * _MIB  # streaming's own segments: nine for each data set, the largest with 1 MiB
_PREFETCH = 2  # batches that a worker holds ready: torch's default
_OPEN_FILES = 1024  # a run with two data sets and eight loading workers holds about 400
_CHECKPOINTS_AT_ONCE = 2  # the new one is whole before the old one goes


def examine(config: Config | None, world_size: int = 1) -> Iterator[tuple[str, str, bool]]:
    """Every check in turn: its name, what is there or the cure, and whether a run would get past it.

    Without a ``config`` the machine alone is examined; ``world_size`` is the number of ranks on it.
    """
    for name, check in _checks(config, world_size).items():
        try:
            yield name, check(), True
        except UserError as error:
            yield name, str(error), False


def check_run_machine(config: Config, world_size: int) -> None:
    """What ``train`` asks of the machine before it writes anything; ``UserError``, with its cure, for the first."""
    checks = _checks(config, world_size)
    stores = (name for name in checks if name.startswith('loggers.'))
    for name in ('run folder', 'checkpoint', 'shared memory', 'open files', 'data folder', 'free disk', *stores):
        if name in checks:
            checks[name]()


def _checks(config: Config | None, world_size: int) -> dict[str, Callable[[], str]]:
    machine: dict[str, Callable[[], str]] = {
        'versions': _versions,
        'torch and GPU': lambda: _torch_build(None if config is None else config.device),
        'shared memory': lambda: _shared_memory(config, world_size),
        'open files': _open_files,
        'loopback': _loopback,
        'rendezvous': _port,
        'Inception': _inception,
    }
    if config is None:
        return machine
    checks = machine | {'device and precision': lambda: check_machine(config) or 'fit together'}
    checks['data'] = lambda: _data(config)
    is_made = config.data.name == 'digits' and not os.path.exists(config.data.local)
    if is_made or getattr(config.data, 'remote', None) is not None:
        checks['data folder'] = lambda: check_writable(config.data.local)
    if config.save_folder is not None and '://' not in config.save_folder:
        checks['run folder'] = lambda: _run_folder(config)
        checks['free disk'] = lambda: _free_disk(config)
    elif config.load_path is not None:
        checks['checkpoint'] = lambda: check_load_path(config) or f'{config.load_path}: can be loaded'
    for name, logger in config.loggers.items():
        check_store = getattr(resolve('logger', logger.name), 'check_store', None)
        if check_store is not None:
            checks[f'loggers.{name}'] = functools.partial(check_store, **logger.kwargs)
    return checks


def _inception() -> str:
    """Absent weights are no fault here: only runs that measure FID need them, and `data` says so for those."""
    try:
        path = find_weights()
    except UserError:
        return 'weights are not here; only FID and its like need them (python -m tread_composer prefetch)'
    check_weights(path)
    return f'{path}: the published weights'


def _data(config: Config) -> str:
    check_files(config)
    state, problem = data_state(config)
    if problem is not None:
        raise problem
    check_fit(config)
    return state


def _versions() -> str:
    """The installed packages against those that this package declares."""
    faults = []
    for text in metadata.requires('tread_composer') or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({'extra': ''}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            faults.append(f'{requirement.name} is not installed ({requirement.specifier or "any version"} is needed)')
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            faults.append(f'{requirement.name} is {version}, {requirement.specifier} is needed')
    if faults:
        raise UserError(f'{"; ".join(faults)}. Install as docs/install.md says: make install, or pip with constraints/')
    return f'torch {torch.__version__}, Composer {metadata.version("mosaicml")}: as declared'


def _torch_build(device: str | None = None) -> str:
    """Whether torch's build has kernels for the GPU at hand; ``device`` is ``'gpu'`` if the run asks for one."""
    if not torch.cuda.is_available():
        if device == 'gpu':
            built = f'it was built for CUDA {torch.version.cuda}' if torch.version.cuda else 'it was built without CUDA'
            raise UserError(
                f'device: gpu, but torch sees none ({built}). Check nvidia-smi, the driver, CUDA_VISIBLE_DEVICES, and '
                f'in a container --gpus all; or take device=cpu'
            )
        return 'no GPU: runs on the CPU'
    names = set()
    architectures = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        names.add(f'{torch.cuda.get_device_name(index)} (sm_{major}{minor})')
        # Code of a lower minor number of the same generation runs, and PTX (compute_..) is compiled at the first use.
        runs = any(name.startswith(('sm_', 'compute_')) and _covers(name, major, minor) for name in architectures)
        if not runs:
            raise UserError(
                f'{torch.cuda.get_device_name(index)} is sm_{major}{minor}, and torch {torch.__version__} has code for '
                f'{", ".join(architectures)}: install a build for this card (make install TORCH=newest)'
            )
    return f'{torch.cuda.device_count()} x {", ".join(sorted(names))}, CUDA {torch.version.cuda}'


def _covers(architecture: str, major: int, minor: int) -> bool:
    kind, _, digits = architecture.partition('_')
    digits = digits.rstrip('af')
    built = (int(digits[:-1]), int(digits[-1]))
    return built <= (major, minor) if kind == 'compute' else built[0] == major and built[1] <= minor


def _shared_memory(config: Config | None, world_size: int) -> str:
    """Streaming's segments and the batches of loading workers."""
    needed = _SEGMENTS_BYTES
    if config is not None:  # each rank has an equal share of the batch, and as many workers
        batch_bytes = config.global_train_batch_size // world_size * _sample_bytes(config)
        needed += batch_bytes * num_workers(config) * world_size * _PREFETCH
    return check_shared_memory(needed, 'take fewer workers (data.num_workers)')


def _sample_bytes(config: Config) -> int:
    try:
        manifest = planned_manifest(config)
    except UserError:  # `data` says so
        manifest = None
    if manifest is None:
        return 0
    values = manifest.channels * manifest.latent_height * manifest.latent_width
    return values * torch.float32.itemsize * (2 if manifest.kind == 'moments' else 1)


def _open_files() -> str:
    """The limit of open files, which is to be 1,024 at least."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < _OPEN_FILES:
        raise UserError(f'a process may open {limit} files here; raise the limit: ulimit -n 65536')
    return f'{"unlimited" if limit < 0 else f"{limit:,}"} open files'


def _run_folder(config: Config) -> str:
    check_run_folder(config)
    check_load_path(config)
    return check_writable(run_folder(config))


def _free_disk(config: Config) -> str:
    """Room for two checkpoints: weights, moments and averages in float32, without what the gradients take."""
    folder, needed = run_folder(config), 0
    try:
        weights = 4 * make_plan(config, 1, memory=False)['parameters']
        needed = _CHECKPOINTS_AT_ONCE * weights * (1 + sum(kept_copies(config)))
    except UserError:  # the data are not here yet, and their shape is not said
        pass
    place = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f'{folder}: {free / _GB:,.2f} GB are free, and the run writes at least {needed / _GB:,.2f} GB there (two '
            f'checkpoints at a time). Make room, or take another save_folder'
        )
    return f'{folder}: {free / _GB:,.1f} GB free, two checkpoints take {needed / _GB:,.2f} GB'


def _loopback() -> str:
    """Whether this machine can talk to itself, as ranks do and MLflow's server does."""
    try:
        with socket.socket() as listener:
            listener.bind(('127.0.0.1', 0))
            listener.listen()
            socket.create_connection(listener.getsockname(), timeout=5).close()
    except OSError as error:
        raise UserError(
            f'127.0.0.1 does not answer ({error}): bring the loopback interface up (ip link set lo up)'
        ) from None
    return 'loopback works'


def _port() -> str:
    """Whether the first rank can listen at ``MASTER_PORT``."""
    port = os.environ.get('MASTER_PORT')
    if port is None:
        return 'MASTER_PORT is not set: the launcher chooses a free one'
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(('', int(port)))
    except OSError as error:
        raise UserError(f'MASTER_PORT={port}: {error.strerror}. Take another (composer --master_port PORT)') from None
    return f'port {port} is free'
