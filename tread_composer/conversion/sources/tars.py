"""Members of an uncompressed tar, or of a tar within a tar, as byte ranges: headers are read, data are not."""

import io
import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from tread_composer.conversion.sources.base import check_member, is_image, is_litter
from tread_composer.core.errors import UserError

__all__ = ['Archive', 'Member', 'role_of']

_COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ\0': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}


class Member(NamedTuple):
    """A regular file in a tar: parts of its name, and where its bytes are in the file on disk."""

    parts: tuple[str, ...]
    offset: int
    size: int


class Archive:
    """A tar on disk, opened for reading; a context manager.

    Raises:
        UserError: Cannot be opened, or is compressed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, 'rb', buffering=0)  # noqa: SIM115  (closed in __exit__)
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
        inner_name = '/'.join(outer.parts) if outer else ''
        place = Path(f'{self.path}: {inner_name}') if outer else self.path
        end = outer.offset + outer.size if outer else os.fstat(self._file.fileno()).st_size
        window = _Window(self._file.fileno(), outer.offset if outer else 0, end)
        try:
            with cast(Any, tarfile.open(fileobj=cast(IO[bytes], window), mode='r:')) as archive:
                while (info := archive.next()) is not None:
                    archive.members.clear()  # a million of them would fill gigabytes
                    parts = check_member(place, info.name)
                    _check_kind(place, info)
                    member = Member(parts, window.start + info.offset_data, info.size)
                    if info.size < 0 or member.offset + info.size > end:
                        raise UserError(f'{place}: ends within {info.name!r}: it is cut off. Get it anew')
                    if info.isreg() and parts:
                        yield member
                _check_end(place, window, archive.offset)
        except (OSError, ValueError, tarfile.TarError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'{place}: not a tar, or cut off: {error}. Get it anew') from error


class _Window(io.RawIOBase):
    """A part of a file as a file of its own, for ``tarfile``; reads say their offset, so several can be in use."""

    _MAX_READ = 2**20  # long names and extended headers; member data are never read through it

    def __init__(self, descriptor: int, start: int, end: int) -> None:
        self._descriptor, self.start, self._end, self._position = descriptor, start, end, start

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position - self.start

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET, 'tarfile seeks from the start only'
        if offset < 0:
            raise ValueError('a header with a negative size')
        self._position = self.start + offset
        return offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self._MAX_READ:
            raise ValueError(f'a header of {size} bytes')
        data = os.pread(self._descriptor, max(0, min(size, self._end - self._position)), self._position)
        self._position += len(data)
        return data


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


def _check_end(place: Path, window: _Window, offset: int) -> None:
    """After the last member a tar has at least one block of zeros, and nothing but zeros."""
    window.seek(offset)
    zeros = 0
    while block := window.read(2**20):
        if block.count(0) != len(block):
            raise UserError(
                f'{place}: there are other data at byte {offset + zeros:,} where a header or the end should be: it is '
                f'damaged or cut off, or several tars were joined. Get it anew, or pack it again'
            )
        zeros += len(block)
    if zeros < tarfile.BLOCKSIZE:
        raise UserError(f'{place}: lacks the mark at its end: it is cut off. Get it anew')


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
