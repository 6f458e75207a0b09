"""Members of an uncompressed tar, or of a tar within a tar, as byte ranges: headers are read, data are not."""

import itertools
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tread_composer.conversion.sources.base import member_parts
from tread_composer.core.errors import UserError

__all__ = ['Archive', 'Member', 'holds_tars']


class Member(NamedTuple):
    """A regular file in a tar: parts of its name, and where its bytes are in the file on disk."""

    parts: tuple[str, ...]
    offset: int
    size: int


class Archive:
    """A tar on disk, opened for reading; a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, 'rb', buffering=0)  # noqa: SIM115  (closed by leaving the archive)
        except OSError as error:
            raise UserError(f'{path}: cannot be read: {error}') from error

    def __enter__(self) -> 'Archive':
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes from ``offset`` of the file on disk."""
        return os.pread(self._file.fileno(), size, offset)

    def members(self, outer: Member | None = None) -> Iterator[Member]:
        """The regular files in the archive, or in the archive that is its member ``outer``; folders are left out.

        Refused is what is no tar, compressed, cut off or followed by other data, and a link, a device, a sparse file or
        a name that leads out of it.
        """
        place, start, end = self.path, 0, os.fstat(self._file.fileno()).st_size
        if outer is not None:
            place, start, end = Path(f'{self.path}: {"/".join(outer.parts)}'), outer.offset, outer.offset + outer.size
        try:
            self._file.seek(start)  # tarfile reads from there, and says offsets in the whole file
            with tarfile.open(fileobj=self._file, mode='r:') as archive:
                while (info := archive.next()) is not None and info.offset < end:
                    archive.members.clear()  # type: ignore[attr-defined]  # a million of them would fill gigabytes
                    parts = member_parts(place, info.name)
                    if info.issparse() or not (info.isreg() or info.isdir()):
                        raise UserError(
                            f'{place}: member {info.name!r} is a link, a device or a sparse file. Refused: pack again '
                            f'with tar --dereference'
                        )
                    if info.offset_data + info.size > end:
                        raise UserError(f'{place}: ends within {info.name!r}: it is cut off. Get it anew')
                    if info.isreg() and parts:
                        yield Member(parts, info.offset_data, info.size)
                self._check_end(place, end if info else archive.offset, end)
        except (OSError, ValueError, tarfile.TarError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f'{place}: not a tar, cut off, or compressed: {error}. Get it anew, or unpack it to a tar (images in a '
                f'compressed one cannot be read at random)'
            ) from error

    def _check_end(self, place: Path, offset: int, end: int) -> None:
        # A tar ends with zeros, at least a block of them; tarfile itself takes a damaged header for the end.
        mark = self.read(offset, min(end - offset, 2**20))
        if len(mark) < tarfile.BLOCKSIZE or any(mark):
            raise UserError(
                f'{place}: no header and no end at byte {offset:,}: it is damaged or cut off, or several tars were '
                f'joined. Get it anew, or pack it again'
            )


def holds_tars(path: Path) -> bool:
    """Whether a tar holds others, as ImageNet's training set does."""
    with Archive(path) as archive:
        return any(member.parts[-1].endswith('.tar') for member in itertools.islice(archive.members(), 64))
