"""Files that are whole or absent, also after a crash: what every promise of going on with the same command rests on."""

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tread_composer.core.errors import UserError

__all__ = [
    'UNFINISHED', 'check_writable', 'file_hash', 'full_disk_in_words', 'read_json', 'to_disk', 'whole_file',
    'write_atomically', 'write_json',
]  # fmt: skip

UNFINISHED = '.unfinished-'
"""How the name of a file begins while it is being written. What a killed run left under such a name of its
checkpoints and files is removed when it starts again."""


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a name to write under; behind the block its content replaces ``path`` in one step, durably.

    After a crash the old file or the new one is there, never half. If the block raises, or the file cannot be written
    (``OSError``), nothing is left of it.
    """
    path = Path(path)
    handle, name = tempfile.mkstemp(prefix=f'{UNFINISHED}{path.name}.', dir=path.parent)
    os.close(handle)
    unfinished = Path(name)
    try:
        yield unfinished
        os.chmod(unfinished, 0o644)  # mkstemp hides it from the other users of a shared folder
        to_disk(unfinished)  # not only in the page cache
        os.replace(unfinished, path)
        to_disk(path.parent)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write ``content`` as a ``whole_file``; makes the folder if it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished:
        unfinished.write_bytes(content)


def write_json(path: Path, content: object) -> None:
    """Write as a ``whole_file``, into a folder that exists."""
    with whole_file(path) as unfinished:
        unfinished.write_text(f'{json.dumps(content, indent=1)}\n', encoding='utf-8')


def read_json(path: Path) -> Any:
    """The content of a JSON file; ``UserError`` if it cannot be read, or is not JSON, so something else wrote it."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f'{path}: cannot be read as JSON: {error}. Was it written by this program?') from error


def file_hash(path: Path) -> str:
    """``'sha256:...'`` of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return f'sha256:{digest.hexdigest()}'


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk: then a power cut does not lose them either."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def full_disk_in_words(place: Path) -> Iterator[None]:
    """A full or read-only disk is for the user to put right: a ``UserError`` in place of such an ``OSError``."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
            raise
        raise UserError(
            f'{place}: cannot be written ({error}). What is finished is kept: make room or give leave, then run the '
            f'same command again'
        ) from error


def check_writable(folder: str | Path) -> str:
    """A line if files can be made in a folder, or the folder itself, tried with one; ``UserError`` if they cannot."""
    place = Path(folder)
    try:
        while not place.exists():  # which needs leave to search the folder above
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f'{folder}: no file can be made in {place}: {error.strerror}. Choose a folder of yours'
        ) from None
    return f'{folder}: can be written to'
