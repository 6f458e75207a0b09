"""The place that a conversion writes to: whose it is, the lock, what was asked for before, room, uploading.

``OUT/.lock`` stands for one conversion at a time, ``OUT/conversion.json`` for what all of its data were made with,
``OUT/.conversion`` for scratch. With a URL as ``--out`` all of this lies in ``--work``.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.data.checks import fetch_descriptions
from tread_composer.data.manifest import MANIFEST_NAME
from tread_composer.io.files import UNFINISHED, read_json, write_json
from tread_composer.io.locks import locked

__all__ = ['RECORD', 'Output', 'check_remote', 'read_record', 'refuse_if_too_large', 'size_in_words', 'upload']

RECORD, _LOCK, _SCRATCH = 'conversion.json', '.lock', '.conversion'


class Output:
    """The local folder of a conversion, and in it ``scratch`` with what is removed at the end."""

    def __init__(self, settings: Settings) -> None:
        self.folder = settings.state
        self.scratch, self.record_path = self.folder / _SCRATCH, self.folder / RECORD

    def check(self) -> None:
        """Refuse a file in its place, or a folder that holds something else; writes nothing."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f'{self.folder} is a file; --out and --work are folders')
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        # A kill between writing and renaming the record leaves it under the writer's name.
        unfinished = f'{UNFINISHED}{RECORD}'
        foreign = sorted(name for name in names if name not in (_LOCK, _SCRATCH) and not name.startswith(unfinished))
        if foreign and RECORD not in names:
            raise UserError(
                f'{self.folder} holds {", ".join(foreign[:5])}, which no conversion of this tool wrote; choose a '
                f'folder that is empty or does not exist yet'
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, with its scratch; refused as by ``check``, or while another conversion is at work.

        What is refused before ``record`` leaves the folder as it was.
        """
        self.check()
        made = [path for path in (*reversed(self.folder.parents), self.folder) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f'{self.folder} is being written by another conversion ({{holder}}); wait for it, or stop it'
        with locked(self.folder / _LOCK, busy):
            try:
                self.check()  # somebody may have been here in between
                self.scratch.mkdir(exist_ok=True)
                yield
            finally:
                with contextlib.suppress(OSError):  # holds something that is needed to go on
                    self.scratch.rmdir()
                if not self.record_path.exists():  # refused before anything was decided
                    shutil.rmtree(self.scratch, ignore_errors=True)
                    (self.folder / _LOCK).unlink(missing_ok=True)
                    for path in reversed(made):
                        with contextlib.suppress(OSError):  # no longer empty: then it is not ours alone
                            path.rmdir()

    def settle(self, content: dict[str, Any], splits: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """What is to be recorded: what all splits and each of them are made with, and splits that were recorded before.

        ``ResumeError`` lists in what the record differs.
        """
        saved = read_record(self.folder) or {'content': content, 'splits': {}}
        common = {name: split for name, split in splits.items() if name in saved['splits']}
        if saved['content'] != content or any(saved['splits'][name] != split for name, split in common.items()):
            raise ResumeError.from_differences(
                f'{self.folder}',
                {**saved['content'], **{name: saved['splits'][name] for name in common}},
                {**content, **common},
                'Continue with the same settings and the same source, or choose another --out.',
            )
        return {'content': content, 'splits': {**saved['splits'], **splits}}


def read_record(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What ``settle`` gave for the data set in this folder; None where no conversion has left it."""
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or any(not isinstance(record.get(key), dict) for key in ('content', 'splits')):
        raise UserError(f'{path}: no conversion of this tool wrote it; choose another folder, or move the file away')
    return record


def upload(path: Path, target: str, *, keep: bool) -> None:
    """Bring a file into a folder elsewhere by streaming's uploaders, or refuse; here it stays only if ``keep``."""
    from streaming.base.storage.upload import CloudUploader

    try:
        CloudUploader.get((str(path.parent), target), keep_local=keep, exist_ok=True).upload_file(path.name)
    except Exception as error:  # each of the clouds has its own
        raise UserError(
            f'{target}/{path.name}: upload failed: {type(error).__name__}: {error}. Finished parts are kept: run '
            f'the same command again when it works'
        ) from error


def check_remote(remote: str, splits: Iterable[str], record: dict[str, Any], is_written: bool) -> None:
    """Refuse to write over finished splits, those with a manifest, of somebody else; find out if one may write at all.

    Else a wrong address would show after the first part. What is written, the record, is of use there.
    """
    for split in splits:
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.suppress(UserError):  # it is not there, or nothing can be reached, which shows below
                fetch_descriptions(f'{remote}/{split}', folder)
            if (Path(folder) / MANIFEST_NAME).exists():
                url = f'{remote}/{split}/{MANIFEST_NAME}'
                raise UserError(f'{url} is there already, and --work does not know of it; choose another --out')
    if is_written:
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / RECORD, record)
            upload(Path(folder) / RECORD, remote, keep=True)


def refuse_if_too_large(
    folder: Path, needed: float, content: str, remedy: str = 'make room, or choose another place'
) -> int:
    """Free bytes where ``folder`` is or will be; fewer than ``needed`` are refused."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f'{folder}: {content} need {size_in_words(needed)}, and {size_in_words(free)} are free there; {remedy}'
        )
    return free


def size_in_words(count: float) -> str:
    """Bytes as people say them (powers of 1000, as disks are sold)."""
    for unit in ('B', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.0f} {unit}' if unit == 'B' else f'{count:.2f} {unit}'
        count /= 1000
    return f'{count:.2f} TB'
