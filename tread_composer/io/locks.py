"""One process at a time: a lock that is gone as soon as its holder is, however that ends."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from tread_composer.core.errors import UserError

__all__ = ['locked', 'node_lock_path']

# What a file system answers that cannot lock.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextlib.contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """Hold the lock at ``path`` inside of the block.

    It is the kernel's (flock), so a holder that is killed lets go of it, and the file may lie around for ever. Forked
    workers, which may outlive their parent, do not inherit it. The file lies in a folder that exists and says who holds
    it; the holder may remove it. ``busy`` is what to refuse with meanwhile, its ``{holder}`` replaced; None: wait.

    Raises:
        UserError: Another process holds it, or this file system has no locks.
        OSError: The file cannot be opened.
    """
    # Without flock filelock would fall back to the mere existence of a file, which a killed holder leaves behind.
    lock = FileLock(path, timeout=-1 if busy is None else 0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout as error:
        holder = ''
        with contextlib.suppress(OSError):  # it has just let go
            holder = path.read_text(errors='replace')[:1000].strip()
        raise UserError(str(busy).replace('{holder}', holder or 'unknown')) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise UserError(f'{path}: this file system has no locks ({error}); choose another folder') from error
    try:
        with contextlib.suppress(OSError):  # a name for the eye: on a full disk the work itself will tell
            path.write_text(f'host {socket.gethostname()}, process {os.getpid()}\n')
        yield
    finally:
        lock.release()


def node_lock_path(name: str) -> Path:
    """Where a lock of this user lies that all processes of this node share and no other node does.

    Beside the shared memory, whatever TMPDIR says: jobs have temporary folders of their own, and those of nodes may lie
    on one shared disk. Systems without ``/dev/shm`` (macOS) have only the temporary folder. The name of the boot keeps
    nodes apart even there.
    """
    memory = Path('/dev/shm')
    folder = memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())
    try:
        boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    except OSError:  # not Linux
        boot = socket.gethostname()
    return folder / f'tread_composer-{os.getuid()}-{boot}-{name}.lock'
