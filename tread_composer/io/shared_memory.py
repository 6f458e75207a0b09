"""Room in ``/dev/shm``, through which worker processes hand over batches."""

import os
from pathlib import Path

from tread_composer.core.errors import UserError

__all__ = ['check_shared_memory']

_FOLDER = Path('/dev/shm')
_MIB = 2**20


def check_shared_memory(needed: int, remedy: str) -> str:
    """A line that says what is there; refuses less than ``needed`` bytes, with a ``remedy`` such as fewer workers.

    The kernel would end the process with a bare bus error. A container has 64 MiB unless asked for more.
    """
    if not _FOLDER.is_dir():
        return 'no /dev/shm on this system'
    if not os.access(_FOLDER, os.W_OK):
        raise UserError('/dev/shm cannot be written to, and the reader keeps its state there; mount it writable')
    state = os.statvfs(_FOLDER)
    free = state.f_bavail * state.f_frsize
    if free < needed:
        raise UserError(
            f'/dev/shm has {free / _MIB:,.1f} MiB free, and about {needed / _MIB:,.1f} MiB are needed: start the '
            f'container with --shm-size={max(1, round(2 * needed / 2**30))}g, remount it larger, or {remedy}'
        )
    return f'/dev/shm has {free / _MIB:,.0f} MiB free, about {needed / _MIB:,.0f} MiB are needed'
