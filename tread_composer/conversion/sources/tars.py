"""Members of an uncompressed tar, or of a tar within a tar, as byte ranges: headers are read, data are not."""

import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tread_composer.conversion.sources.base import check_member, is_image, is_litter
from tread_composer.core.errors import UserError

__all__ = ['Archive', 'Member', 'role_of']

_COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\0': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}


class Member(NamedTuple):
    """A regular file in a tar: parts of its name, and where its bytes are in the file on disk."""

    parts: tuple[str, ...]
    offset: int
    size: int


class _Headers(io.FileIO):
    """A file that ``tarfile`` reads headers from. Member data never pass through it, so a long read is damage."""

    def read(self, size: int | None = -1, /) -> Any:
        if size is None or not 0 <= size <= 2**20:
            raise ValueError(f'a header of {size} bytes')
        return super().read(size)


class Archive:
    """A tar on disk, opened for reading; a context manager.

    Raises:
        UserError: Cannot be opened, or is compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = _Headers(path)
        except OSError as error:
            raise UserError(f'{path}: cannot be read: {error}') from error
        start = self.read(0, 6)
        for magic, name in _COMPRESSED.items():
            if start.startswith(magic):
                self._file.close()
                raise UserError(
                    f'{path}: is compressed ({name}). Images in it cannot be read at random, and compressing JPEGs '
                    f'saves nothing: unpack it to a tar, for instance with gunzip, bunzip2, unxz or unzstd'
                )

    def __enter__(self) -> 'Archive':
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` of the file on disk."""
        return os.pread(self._file.fileno(), size, offset)

    def members(self, outer: Member | None = None) -> Iterator[Member]:
        """The regular files in the archive, or in the archive that is its member ``outer``; folders are left out.

        Raises:
            UserError: Not a tar; cut off; followed by other data; or it holds a link, a device, a sparse file or a name
                that leads out of it. ``tarfile`` itself takes a damaged header in the middle for the end.
        """
        place, start, end = self.path, 0, os.fstat(self._file.fileno()).st_size
        if outer is not None:
            place, start, end = Path(f'{self.path}: {"/".join(outer.parts)}'), outer.offset, outer.offset + outer.size
        try:
            self._file.seek(start)  # tarfile reads from there, and says offsets in the whole file
            with tarfile.open(fileobj=self._file, mode='r:') as archive:
                while (info := archive.next()) is not None and info.offset < end:
                    archive.members.clear()  # type: ignore[attr-defined]  # a million of them would fill gigabytes
                    parts = check_member(place, info.name)
                    _check_kind(place, info)
                    if info.size < 0 or info.offset_data + info.size > end:
                        raise UserError(f'{place}: ends within {info.name!r}: it is cut off. Get it anew')
                    if info.isreg() and parts:
                        yield Member(parts, info.offset_data, info.size)
                self._check_end(place, start, end if info else archive.offset, end)
        except (OSError, ValueError, tarfile.TarError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'{place}: not a tar, or cut off: {error}. Get it anew') from error

    def _check_end(self, place: Path, start: int, offset: int, end: int) -> None:
        """After the last member a tar has at least one block of zeros, and nothing but zeros."""
        for position in range(offset, end, 2**20):
            block = self.read(position, min(2**20, end - position))
            if block.count(0) != len(block):
                raise UserError(
                    f'{place}: there are other data at byte {position - start:,} where a header or the end should be: '
                    f'it is damaged or cut off, or several tars were joined. Get it anew, or pack it again'
                )
        if end - offset < tarfile.BLOCKSIZE:
            raise UserError(f'{place}: lacks the mark at its end: it is cut off. Get it anew')


def _check_kind(place: Path, info: tarfile.TarInfo) -> None:
    reason = None
    if info.issym() or info.islnk():
        reason = f'is a link (to {info.linkname!r})'
    elif info.issparse():
        reason = 'is stored as a sparse file'
    elif not (info.isreg() or info.isdir()):
        reason = 'is neither a file nor a folder'
    if reason:
        raise UserError(f'{place}: member {info.name!r} {reason}. Refused: pack again with tar --dereference')


def role_of(path: Path) -> str:
    """What a tar holds, by its first members: ``'tars'``, ``'labels'``, ``'folders'``, ``'images'``, ``'nothing'``."""
    role = 'nothing'
    with Archive(path) as archive:
        for member in itertools.islice(archive.members(), 64):
            name = member.parts[-1].lower()
            if is_litter(member.parts):
                continue
            if name.endswith('.tar'):
                return 'tars'
            if name.endswith(('.cls', '.json')):
                return 'labels'
            if is_image(name):
                role = 'folders' if len(member.parts) > 1 else 'images'
    return role
