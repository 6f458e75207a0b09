"""A zip of class folders, with or without train/ and val/ above; or of images alone."""

import functools
import stat
import struct
import zipfile
import zlib

from tread_composer.conversion.images import UnreadableImage
from tread_composer.conversion.sources.base import IndexedFiles, RangeSource, Request, Source, member_parts
from tread_composer.conversion.sources.tree import Listing
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['ZipSource', 'open_zip']

# Of a local header only the lengths of the two fields that end it are needed; the central directory has the rest.
_LOCAL_HEADER = struct.Struct('<4s22xHH')
_ENCRYPTED_FLAG = 0x1


class ZipSource(RangeSource):
    """A place is the offset of a member's local header, its compressed size, checksum, and whether it is deflated.

    Python's own reader would hold an object of about a kilobyte for each member in every worker process.
    """

    def read(self, position: int) -> bytes:
        """The image file at that position; see ``Source.read``."""
        offset, size, checksum, is_deflated = self.places[position].tolist()
        signature, *lengths = _LOCAL_HEADER.unpack(self.files.read(0, offset, _LOCAL_HEADER.size))
        if signature != b'PK\3\4':
            raise UnreadableImage('damaged in the archive: no header where the directory says')
        data = self.files.read(0, offset + _LOCAL_HEADER.size + sum(lengths), size)
        try:
            data = zlib.decompress(data, -zlib.MAX_WBITS) if is_deflated else data
        except zlib.error as error:
            raise UnreadableImage(f'damaged in the archive: {error}') from error
        if zlib.crc32(data) != checksum:
            raise UnreadableImage('damaged in the archive: its checksum differs from the directory')
        return data


def open_zip(request: Request) -> dict[str, Source]:
    """The splits of a zip."""
    path = request.root
    listing = Listing(Progress(f'scanning {path}'))
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                parts = member_parts(path, info.orig_filename)
                if info.is_dir() or not parts:
                    listing.folders.add('/'.join(parts))
                    continue
                is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
                is_plain = is_deflated or info.compress_type == zipfile.ZIP_STORED
                if not is_plain or info.flag_bits & _ENCRYPTED_FLAG or stat.S_ISLNK(info.external_attr >> 16):
                    raise UserError(
                        f'{path}: member {info.filename!r} is a link, encrypted, or compressed by another method than '
                        f'deflate. Pack again from plain files: zip -0 -r'
                    )
                place = (info.header_offset, info.compress_size, info.CRC, is_deflated)
                listing.add(parts, functools.partial(archive.read, info), place)
    except UserError:
        raise
    # NotImplementedError is zipfile's word for a compression or a version that it does not know.
    except (OSError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise UserError(f'{path}: not a zip that can be read ({error}). Was it copied completely?') from error
    return {
        split: ZipSource.arranged('zip', path, branch, inside=branch.prefix, files=IndexedFiles([path]))
        for split, branch in listing.branches(request).items()
    }
