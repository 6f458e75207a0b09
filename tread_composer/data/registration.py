"""One run at a time registers its data with streaming.

Each data set takes the first free number for its shared memory. streaming looks for it and takes it in two steps:
two runs that start at the same moment on one machine find the same one, and the later of them dies with
``FileExistsError``, or its ranks disagree about the number.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from filelock import FileLock
from streaming.base.world import World

__all__ = ['registering_alone']


@contextlib.contextmanager
def registering_alone() -> Iterator[None]:
    """No other run of this user on this machine builds a data set inside of this context. For all ranks together."""
    several = dist.is_available() and dist.is_initialized()
    with contextlib.ExitStack() as stack:
        if World.detect().is_local_leader:
            # The lock ends with its process, however that ends.
            name = f'tread_composer-{os.getuid()}-streaming.lock'
            stack.enter_context(FileLock(Path(tempfile.gettempdir()) / name))
        if several:
            dist.barrier()  # nobody looks for a number before the lock is held
        yield
        if several:
            dist.barrier()
