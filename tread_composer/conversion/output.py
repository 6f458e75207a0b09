"""The place that a conversion writes to: whose it is, the lock, what was asked for before, uploading.

``OUT/.lock`` stands for one conversion at a time, ``OUT/conversion.json`` for what all of its data were made with,
``OUT/.conversion`` for scratch. With a URL as ``--out`` all of this lies in ``--work``.
"""

import contextlib
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tread_composer.conversion.settings import Settings
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.data.manifest import MANIFEST_NAME
from tread_composer.io.files import UNFINISHED, read_json, write_json
from tread_composer.io.locks import locked

__all__ = ['Output', 'Uploader', 'scratch_of']

_RECORD, _LOCK, _SCRATCH = 'conversion.json', '.lock', '.conversion'


def scratch_of(folder: Path) -> Path:
    """Where a conversion to ``folder`` keeps what is removed at its end."""
    return folder / _SCRATCH


class Output:
    """An output folder under lock, as a context manager; a refusal leaves it as it was found.

    Args:
        settings: Of the conversion.

    Raises:
        UserError: On entering: the folder holds something else, or another conversion is at work.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.folder = settings.state
        self._record_path = self.folder / _RECORD
        self._lock = contextlib.ExitStack()
        self._made: list[Path] = []  # folders that were not there before, outermost first
        self._made_scratch = self._began = False
        self._pending: dict[str, Any] | None = None  # a record that is still to be written

    def check(self) -> None:
        """Whether this can be used at all; writes nothing.

        Raises:
            UserError: A file is in the way, or the folder holds something else.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f'{self.folder} is a file; --out and --work are folders')
        names = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else set()
        # A kill between writing and renaming the record leaves it under the writer's name.
        unfinished = f'{UNFINISHED}{_RECORD}'
        foreign = sorted(name for name in names if name not in (_LOCK, _SCRATCH) and not name.startswith(unfinished))
        if foreign and _RECORD not in names:
            raise UserError(
                f'{self.folder} holds {", ".join(foreign[:5])}, which no conversion of this tool wrote; choose a '
                f'folder that is empty or does not exist yet'
            )

    def __enter__(self) -> 'Output':
        self.check()
        self._made = [path for path in (*reversed(self.folder.parents), self.folder) if not path.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        busy = f'{self.folder} is being written by another conversion ({{holder}}); wait for it, or stop it'
        self._lock.enter_context(locked(self.folder / _LOCK, busy))
        try:
            self.check()  # somebody may have been here in between
            self._made_scratch = not scratch_of(self.folder).exists()
            scratch_of(self.folder).mkdir(exist_ok=True)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._made_scratch and not self._began:  # refused, or there was nothing to do
            shutil.rmtree(scratch_of(self.folder), ignore_errors=True)
        if not self._record_path.exists():  # refused before anything was decided
            shutil.rmtree(scratch_of(self.folder), ignore_errors=True)
            (self.folder / _LOCK).unlink(missing_ok=True)
            for path in reversed(self._made):
                with contextlib.suppress(OSError):  # no longer empty: then it is not ours alone
                    path.rmdir()
        self._lock.close()

    def settle(self, content: dict[str, Any], splits: dict[str, dict[str, Any]]) -> None:
        """Record what the data are made with, or compare it with the record.

        Args:
            content: What holds for all splits.
            splits: What holds for each one that is wanted now. Others that were recorded before stay.

        Raises:
            ResumeError: The record says something else; lists the differences.
        """
        saved = read_json(self._record_path) if self._record_path.exists() else {'content': content, 'splits': {}}
        current = {'content': content, 'splits': {**saved['splits'], **splits}}
        if saved['content'] != content or any(
            saved['splits'].get(name, split) != split for name, split in splits.items()
        ):
            unchanged = {name: split for name, split in splits.items() if name in saved['splits']}
            raise ResumeError.from_differences(
                f'{self.folder}',
                {**saved['content'], **{name: saved['splits'][name] for name in unchanged}},
                {**content, **unchanged},
                'Continue with the same settings and the same source, or choose another --out.',
            )
        self._pending = current if current != saved or not self._record_path.exists() else None

    def record(self) -> None:
        """Write what ``settle`` found. From now on the folder is this conversion's."""
        self._began = True
        if self._pending is not None:
            write_json(self._record_path, self._pending)


class Uploader:
    """Brings files of a split to where they are wanted, by streaming's uploaders.

    Args:
        remote: URL or folder of the whole data set.
    """

    def __init__(self, remote: str) -> None:
        self._remote = remote

    def move(self, path: Path, name: str) -> None:
        """Upload a file and remove it here.

        Args:
            path: The file.
            name: Its path within the data set; the last part is the file's own name.

        Raises:
            UserError: It could not be uploaded.
        """
        self._send(path, name, keep=False)

    def copy(self, path: Path, name: str) -> None:
        """The same, but the file stays."""
        self._send(path, name, keep=True)

    def refuse_foreign(self, split: str) -> None:
        """Do not write over a finished data set that somebody else made.

        Raises:
            UserError: There is a manifest already.
        """
        from streaming.base.storage.download import CloudDownloader

        url = f'{self._remote}/{split}/{MANIFEST_NAME}'
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / MANIFEST_NAME
            try:
                CloudDownloader.get(url).download(url, str(target), 60)
            except Exception:
                # Each of the clouds says "not there" in its own way. Should it be out of reach, uploading will tell.
                return
        raise UserError(f'{url} is there already, and --work does not know of it; choose another --out')

    def _send(self, path: Path, name: str, keep: bool) -> None:
        from streaming.base.storage.upload import CloudUploader

        target = f'{self._remote}/{name}'.rpartition('/')[0]
        try:
            uploader = CloudUploader.get((str(path.parent), target), keep_local=keep, exist_ok=True)
            uploader.upload_file(path.name)
        except Exception as error:  # each of the clouds has its own
            raise UserError(
                f'{target}/{path.name}: upload failed: {type(error).__name__}: {error}. Finished parts are kept: run '
                f'the same command again when it works'
            ) from error
