"""What a rank has of its machine: device, cores, shared memory; and torch set up for it."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from tread_composer.core.errors import UserError

__all__ = ['available_cores', 'check_shared_memory', 'choose_device', 'machine_for']

_SHARED = Path('/dev/shm')  # through it worker processes hand over batches
_MIB = 2**20


def choose_device(name: str | None, local_rank: int) -> torch.device:
    """The rank's own GPU, or the CPU; ``name`` is ``'cuda'``, ``'cpu'`` or None for a GPU if there is one.

    Raises:
        UserError: More ranks than GPUs, or no GPU where one is asked for.
    """
    count = torch.cuda.device_count()
    if name == 'cpu' or (name is None and count == 0):
        return torch.device('cpu')
    if local_rank >= count:
        raise UserError(
            f'rank {local_rank} of this machine finds no GPU for itself, there are {count}: start as many ranks as '
            f'there are GPUs (composer -n {max(count, 1)} ...), or take --device cpu'
        )
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


@contextlib.contextmanager
def machine_for(device: torch.device, workers: int, ranks_here: int) -> Iterator[None]:
    """Set up torch so that fp32 means float32 and the encoder leaves cores to the decoders; restores it.

    Each of the ``ranks_here`` has so many decoding ``workers``.
    """
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    # By default cuDNN rounds the inputs of float32 convolutions to the 10 bits of TF32, on GPUs that have it.
    torch.backends.cudnn.allow_tf32 = False
    if device.type == 'cpu' and 'OMP_NUM_THREADS' not in os.environ:
        # One thread for each core that no worker keeps busy. With more, a convolution waits for the one thread that
        # shares its core with a decoder.
        torch.set_num_threads(max(1, available_cores() // ranks_here - workers))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.backends.cudnn.allow_tf32 = tf32


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def check_shared_memory(needed: int, remedy: str) -> str:
    """A line that says what is there; refuses less than ``needed`` bytes, with a ``remedy`` such as fewer workers.

    The kernel would end the process with a bare bus error. A container has 64 MiB unless asked for more.
    """
    if not _SHARED.is_dir():
        return 'no /dev/shm on this system'
    if not os.access(_SHARED, os.W_OK):
        raise UserError('/dev/shm cannot be written to, and the reader keeps its state there; mount it writable')
    state = os.statvfs(_SHARED)
    free = state.f_bavail * state.f_frsize
    if free < needed:
        raise UserError(
            f'/dev/shm has {free / _MIB:,.1f} MiB free, and about {needed / _MIB:,.1f} MiB are needed: start the '
            f'container with --shm-size={max(1, round(2 * needed / 2**30))}g, remount it larger, or {remedy}'
        )
    return f'/dev/shm has {free / _MIB:,.0f} MiB free, about {needed / _MIB:,.0f} MiB are needed'
