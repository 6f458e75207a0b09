"""What a run needs of its machine, one function for each need: ``train`` asks before it writes, ``doctor`` prints.

Each returns a line that says what is there, or raises ``UserError`` with the cure.
"""

import os
import resource
import shutil
import socket
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from tread_composer.core.errors import UserError

__all__ = [
    'check_disk',
    'check_loopback',
    'check_open_files',
    'check_port',
    'check_shared_memory',
    'check_torch_build',
    'check_versions',
]

_MIB, _GB = 2**20, 1e9
_SHARED_MEMORY = Path('/dev/shm')
_SEGMENTS_BYTES = 8 * _MIB  # streaming's own segments: nine for each data set, the largest with 1 MiB
_OPEN_FILES = 1024  # a run with two data sets and eight loading workers holds about 400


def check_versions() -> str:
    """The installed packages against those that this package declares.

    Raises:
        UserError: One is absent, or of a version that is excluded.
    """
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
        raise UserError(f'{"; ".join(faults)}. Install as README.md says: make install, or pip with constraints/')
    return f'torch {torch.__version__}, Composer {metadata.version("mosaicml")}: as declared'


def check_torch_build(device: str | None = None) -> str:
    """Whether torch's build has kernels for the GPU at hand.

    Args:
        device: ``'gpu'`` if the run asks for one.

    Raises:
        UserError: No GPU is seen though one is asked for, or this build has no code for it.
    """
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


def check_shared_memory(batch_bytes: int = 0, num_workers: int = 0, prefetch: int = 2) -> str:
    """``/dev/shm``: streaming's segments and the batches of loading workers lie there.

    Where it is too small, the kernel ends the process with a bare bus error.

    Args:
        batch_bytes: Bytes of one device batch.
        num_workers: Loading workers of all ranks of this node.
        prefetch: Batches that each worker holds ready.

    Raises:
        UserError: It cannot be written to, or too little is free.
    """
    if not _SHARED_MEMORY.is_dir():
        return 'no /dev/shm on this system'
    if not os.access(_SHARED_MEMORY, os.W_OK):
        raise UserError('/dev/shm cannot be written to, and streaming keeps its state there; mount it writable')
    state = os.statvfs(_SHARED_MEMORY)
    free, needed = state.f_bavail * state.f_frsize, _SEGMENTS_BYTES + batch_bytes * num_workers * prefetch
    if free < needed:
        raise UserError(
            f'/dev/shm has {free / _MIB:,.1f} MiB free, and this run needs about {needed / _MIB:,.1f} MiB: start the '
            f'container with --shm-size={max(1, round(2 * needed / 2**30))}g, remount it larger, or take fewer workers '
            f'(data.num_workers)'
        )
    return f'/dev/shm has {free / _MIB:,.0f} MiB free, about {needed / _MIB:,.0f} MiB are needed'


def check_open_files() -> str:
    """The limit of open files.

    Raises:
        UserError: It is below 1,024.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= limit < _OPEN_FILES:
        raise UserError(f'a process may open {limit} files here; raise the limit: ulimit -n 65536')
    return f'{"unlimited" if limit < 0 else f"{limit:,}"} open files'


def check_disk(folder: str | Path, needed: float) -> str:
    """Free space where a run saves.

    Args:
        folder: It need not exist yet.
        needed: Bytes that the run will write there at the least.

    Raises:
        UserError: Too little is free.
    """
    place = Path(folder)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f'{folder}: {free / _GB:,.2f} GB are free, and the run writes at least {needed / _GB:,.2f} GB there (two '
            f'checkpoints at a time). Make room, or take another save_folder'
        )
    return f'{folder}: {free / _GB:,.1f} GB free, two checkpoints take {needed / _GB:,.2f} GB'


def check_loopback() -> str:
    """Whether this machine can talk to itself, as ranks do and MLflow's server does.

    Raises:
        UserError: It cannot.
    """
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


def check_port(port: int | None) -> str:
    """Whether the first rank can listen at ``MASTER_PORT``.

    Raises:
        UserError: Another program does.
    """
    if port is None:
        return 'MASTER_PORT is not set: the launcher chooses a free one'
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(('', port))
    except OSError as error:
        raise UserError(f'MASTER_PORT={port}: {error.strerror}. Take another (composer --master_port PORT)') from None
    return f'port {port} is free'
