"""Files that are whole or absent, also after a crash: the small steps that the conversion's promises rest on."""

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tread_composer.errors import UserError

__all__ = ['full_disk_in_words', 'read_json', 'replace', 'to_disk', 'write_json']


def write_json(path: Path, content: object) -> None:
    """Write atomically and durably: after a crash the old file or the new one is there, never half."""
    handle, temporary = tempfile.mkstemp(prefix=f'.{path.name}.', dir=path.parent)
    try:
        with os.fdopen(handle, 'w', encoding='utf-8') as file:
            file.write(json.dumps(content, indent=1) + '\n')
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read; data are often shared
        replace(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """A file that ``write_json`` wrote.

    Raises:
        UserError: It is not one, so somebody else has been at work.
    """
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f'{path}: not written by the conversion ({error}); move {path.parent} away') from error


def replace(temporary: Path, path: Path) -> None:
    """Put a finished file in its place, on the disk and not only in the page cache."""
    to_disk(temporary)
    os.replace(temporary, path)
    to_disk(path.parent)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_in_words(place: Path) -> Iterator[None]:
    """A full or read-only disk is for the user to put right, not a fault of the program.

    Raises:
        UserError: In place of such an OSError.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise UserError(
            f'{place}: cannot be written ({error}). What is finished is kept: make room or give leave, then run the '
            f'same command again'
        ) from error
