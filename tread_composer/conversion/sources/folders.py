"""Images in folders or a zip: one folder for each class, with or without train/ and val/ above; or images alone.

A zip and the official tars are looked at as the folders that they would unpack to; what is mixed or unclear is refused.
"""

import functools
import itertools
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.labels import ANNOTATIONS, EDM, annotated_classes, assign_classes, edm_labels
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.source import (
    SPLITS,
    Ignored,
    Images,
    IndexedFiles,
    Source,
    arranged,
    check_splits,
    few,
    is_image,
    is_litter,
    member_parts,
    refusing,
    source_of_files,
)  # fmt: skip
from tread_composer.conversion.squares import UnreadableImage
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['Listing', 'holds_images', 'open_folders', 'open_zip']

_LABEL_FILES = (EDM, 'metadata.jsonl', 'metadata.csv', 'labels.csv', ANNOTATIONS)
"""Files with these names hold labels; beside those that nobody reads, folders say nothing certain."""

# Of a local header only the lengths of the two fields that end it are needed; the central directory has the rest.
_LOCAL_HEADER = struct.Struct('<4s22xHH')
_ENCRYPTED_FLAG = 0x1
_LAYOUTS = 'class folders, train/ and val/ of class folders, or images alone'


@dataclass
class Listing:
    """What a tree holds, by path: images with their places, folders, files with labels, and what else there is."""

    progress: Progress
    images: dict[str, tuple[int, ...]] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    label_files: dict[str, bytes] = field(default_factory=dict)
    ignored: Ignored = field(default_factory=Ignored)

    def add(self, parts: Sequence[str], read: Callable[[], bytes], place: tuple[int, ...] = ()) -> None:
        """Put a file where it belongs: its path's parts, its content, and the place that an image's source needs."""
        self.progress.add()
        path = '/'.join(parts)
        if is_litter(parts) or not (parts[-1] in _LABEL_FILES or is_image(parts[-1])):
            self.ignored.add(parts)
        elif path in self.images:
            raise UserError(f'{path} occurs more than once. Pack the archive again')
        elif is_image(parts[-1]):
            self.images[path] = place
        else:
            with refusing(OSError, f'{path}: cannot be read'):
                self.label_files[path] = read()

    def branches(self, root: Path, settings: ImageSettings) -> dict[str, Images]:
        """The splits of the tree.

        Ground truth is needed, and allowed, for a split ``val`` without class folders beside a ``train`` with them, or
        alone (as Kaggle's ImageNet has it). What is not one of the layouts is refused with what there is.
        """
        paths = list(self.images)
        if not paths:
            raise UserError(f'{root}: no image in it; {str(self.ignored) or "it is empty"}. Expected {_LAYOUTS}')
        prefix = _wrapper(paths)
        if prefix:
            self.ignored.notes.append(f'all images are inside {prefix}')
        tops: dict[str, list[str]] = {}  # paths by their first folder; those in no folder under the empty name
        for path in paths:
            top, slash, _ = path[len(prefix) :].partition('/')
            tops.setdefault(top if slash else '', []).append(path)
        named = sorted(set(tops) & set(SPLITS))
        if named:
            self._check_tops(root, prefix, tops, named)
            split_of = self._splits(tops, named, settings.use_test)
            branches = {split: self._branch(root, f'{prefix}{top}/', tops[top]) for top, split in split_of.items()}
        else:
            branches = {'train': self._branch(root, prefix, paths)}
        unread = [path for path in self.label_files if not path.startswith(f'{prefix}test/')]
        if unread:
            raise UserError(
                f'{root}: {few(unread)} hold labels that this layout does not read, so those of the folders may be '
                f'wrong. Move them away if the folders are the classes; read are {EDM} beside the images and '
                f'{ANNOTATIONS} beside images in no class folders'
            )
        _label_val(root, branches, settings.ground_truth)
        return branches

    def _check_tops(self, root: Path, prefix: str, tops: dict[str, list[str]], named: list[str]) -> None:
        """Whether everything is in the folder of a split, and no such folder is empty."""
        check_splits(root, named)
        strangers = [top or f'the image {tops[top][0]}' for top in tops if top not in SPLITS]
        if strangers:
            raise UserError(
                f'{root}: {few(named)} are taken as splits, but beside them are images of no split: {few(strangers)}. '
                f'Move them away; or, if {few(named)} are classes, rename these folders'
            )
        empty = [top for top in SPLITS if top != 'test' and f'{prefix}{top}' in self.folders and top not in tops]
        if empty:
            raise UserError(f'{root}: {few(empty)} holds no image. Complete the data, or remove the folder')

    def _splits(self, tops: dict[str, list[str]], named: list[str], use_test: bool) -> dict[str, str]:
        """The split of each folder; where there is no val, a test folder with classes as train has them is it."""
        splits = {top: SPLITS[top] for top in named}
        if splits.pop('test', None):
            depths = {top: {path.count('/') for path in tops[top]} for top in named}
            if use_test and 'val' not in splits.values() and depths['test'] == depths['train']:
                self.ignored.notes.append('test/ is the evaluation split, for lack of another')
                return {**splits, 'test': 'val'}
            self.ignored.notes.append(f'test/ ({len(tops["test"]):,} images) is not converted')
        return splits

    def _branch(self, root: Path, prefix: str, paths: list[str]) -> Images:
        names = [path[len(prefix) :] for path in paths]
        branch = Images(names, [0] * len(names), (), self.ignored, [self.images[path] for path in paths], prefix)
        if self._labelled_by_file(root, branch):
            return branch
        parts = [name.split('/') for name in names]
        if all(len(part) == 3 and part[1] == 'images' for part in parts):  # as Tiny-ImageNet has them
            branch.names = names = [f'{label}/{file}' for label, _, file in parts]
            branch.form = '{label}/images/{file}'
        depths = {name.count('/'): name for name in names}  # an example of each
        if depths.keys() == {0}:
            return branch
        if depths.keys() != {1}:
            examples = ', '.join(repr(prefix + depths[depth]) for depth in sorted(depths))
            raise UserError(
                f'{root}: images lie at different or unknown depths, such as {examples}. Expected {_LAYOUTS}'
            )
        branch.label([name.partition('/')[0] for name in names])
        inner = {path[len(prefix) :].partition('/')[0] for path in self.folders if path.startswith(prefix)}
        if empty := inner - {*branch.class_names, ''}:
            raise UserError(
                f'{root}: {len(empty):,} class folders hold no image: {few([prefix + name for name in empty])}. '
                f'Complete the data; a folder that is no class must be moved away'
            )
        return branch

    def _labelled_by_file(self, root: Path, branch: Images) -> bool:
        """Whether a file beside the images says their labels, which the branch has then."""
        names, prefix = branch.names, branch.prefix
        if (content := self.label_files.pop(prefix + EDM, None)) is not None:
            place = f'{root}/{prefix}{EDM}'
            if (labels := edm_labels(place, names, content)) is not None:
                branch.labels, branch.form = labels, '{file}'
                name_by_number(place, {'train': branch}, ())
            return True
        files = [name.removeprefix('images/') for name in names]
        if prefix + ANNOTATIONS not in self.label_files or any('/' in file for file in files):
            return False
        content = self.label_files.pop(prefix + ANNOTATIONS)
        branch.label(annotated_classes(f'{root}/{prefix}{ANNOTATIONS}', files, content))
        branch.names, branch.form = files, '{file}' if files == names else 'images/{file}'
        branch.in_classes(branch.class_names)
        return True


def _wrapper(paths: list[str]) -> str:
    """The folders that everything is in, as ``a/b/``, above those where splits or class folders begin."""
    above = [folder.split('/')[:-1] for folder in {path.rpartition('/')[0] for path in paths}]
    common = os.path.commonprefix(above)  # noqa: RUF071  (of lists: parts are compared, not letters)
    parts = itertools.takewhile(lambda part: part not in SPLITS, common)
    return ''.join(f'{part}/' for part in parts)


def _label_val(root: Path, branches: dict[str, Images], ground_truth: str | None) -> None:
    """Give ``val`` its labels where they come from elsewhere."""
    train, val = branches.get('train'), branches.get('val')
    if val is not None and not val.class_names and (ground_truth is not None or (train and train.class_names)):
        if train and not train.class_names:
            raise UserError(f'{root}: ground_truth={ground_truth} is given, but train has no class folders')
        class_names, val.labels = assign_classes(ground_truth, val.names, train and train.class_names, root)
        val.in_classes(class_names)
        val.form = '{file}'
    elif ground_truth is not None:
        raise UserError(
            f'ground_truth={ground_truth}: {root} has no use for it: it labels validation images that lie loose in '
            f'val/ or in the official tar. Leave it out'
        )


def open_folders(root: Path, settings: ImageSettings) -> dict[str, Source]:
    """The splits of a folder."""
    listing = Listing(Progress(f'scanning {root}'))
    for parts, is_folder in _walk(root):
        if is_folder:
            listing.folders.add('/'.join(parts))
        else:
            listing.add(parts, root.joinpath(*parts).read_bytes)
    return {split: source_of_files(root, branch) for split, branch in listing.branches(root, settings).items()}


def holds_images(root: Path) -> bool:
    """Whether there is an image anywhere below."""
    files = (parts for parts, is_folder in _walk(root) if not is_folder)
    return any(is_image(parts[-1]) and not is_litter(parts) for parts in files)


def _walk(root: Path, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Parts of the path of everything below, and whether it is a folder. Links are followed: people link data sets."""
    folder = root.joinpath(*inside)
    with refusing(OSError, f'{folder}: cannot be read'):  # too many levels: a link to a folder that it is in
        with os.scandir(folder) as scan:
            entries = list(scan)
        for entry in entries:
            parts = (*inside, entry.name)
            is_folder = entry.is_dir() and not is_litter(parts)  # a hidden folder counts as one file
            if not entry.is_dir() and not entry.is_file() and is_image(entry.name) and not is_litter(parts):
                raise UserError(f'{entry.path}: a link to nothing, or no file at all. Repair or remove it')
            yield parts, is_folder
            if is_folder:
                yield from _walk(root, parts)


def open_zip(path: Path, settings: ImageSettings) -> dict[str, Source]:
    """The splits of a zip.

    A place is the offset of a member's local header, its compressed size, checksum, and whether it is deflated:
    Python's own reader would hold an object of about a kilobyte for each member in every worker process.
    """
    listing = Listing(Progress(f'scanning {path}'))
    # NotImplementedError is zipfile's word for a compression or a version that it does not know.
    damage = (OSError, ValueError, struct.error, zlib.error, zipfile.BadZipFile, NotImplementedError)
    remedy = '. Was it copied completely?'
    with refusing(damage, f'{path}: not a zip that can be read', remedy), zipfile.ZipFile(path) as archive:
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
    load = functools.partial(_load_member, IndexedFiles([path]))
    return {split: arranged('zip', path, images, load) for split, images in listing.branches(path, settings).items()}


def _load_member(files: IndexedFiles, name: str, offset: int, size: int, checksum: int, is_deflated: bool) -> bytes:
    signature, *lengths = _LOCAL_HEADER.unpack(files.read(name, 0, offset, _LOCAL_HEADER.size))
    if signature != b'PK\3\4':
        raise UnreadableImage('damaged in the archive: no header where the directory says')
    data = files.read(name, 0, offset + _LOCAL_HEADER.size + sum(lengths), size)
    try:
        data = zlib.decompress(data, -zlib.MAX_WBITS) if is_deflated else data
    except zlib.error as error:
        raise UnreadableImage(f'damaged in the archive: {error}') from error
    if zlib.crc32(data) != checksum:
        raise UnreadableImage('damaged in the archive: its checksum differs from the directory')
    return data
