"""Whole files or none: a reader, or a resumed run, never sees half of one."""

import os
import tempfile
from pathlib import Path

from tread_composer.tensor_file import UNFINISHED

__all__ = ['write_atomically']


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write ``content`` to ``path``, replacing what is there in one step; makes the folder if it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'{UNFINISHED}{path.name}.')
    try:
        with os.fdopen(handle, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the new name
        os.chmod(temporary, 0o644)  # mkstemp makes it private, which hides it from the other users of a shared folder
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
