"""Which layout lies at a path. What is mixed or unclear is refused with what there is: a guess would cost days."""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from tread_composer.conversion.sources.base import Request, Source, few
from tread_composer.conversion.sources.ilsvrc import open_ilsvrc
from tread_composer.conversion.sources.numbered import PLACES, split_files
from tread_composer.conversion.sources.tars import holds_tars
from tread_composer.conversion.sources.tree import holds_images, open_folders
from tread_composer.conversion.sources.webdataset import open_webdataset
from tread_composer.conversion.sources.zips import open_zip
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import read_class_names

__all__ = ['open_sources']

_LAYOUTS = (
    'a folder of images, of class folders, or of train/ and val/ with class folders; a .zip of these; '
    'the official ILSVRC tars; webdataset .tar files; Hugging Face .parquet files'
)
# A compressed tar is refused when it is opened.
_SUFFIX = re.compile(r'\.(?:(zip|parquet|tar)|tgz|tar\.(?:gz|bz2|xz|zst))$', re.IGNORECASE)
_OFFICIAL = re.compile(r'ILSVRC\d+_img_(val|test)\b.*\.tar')


def open_sources(
    path: str | os.PathLike[str],
    *,
    scratch: Path,
    ground_truth: Path | None = None,
    class_names: Path | None = None,
) -> dict[str, Source]:
    """Find out what lies at ``path`` and list its images, by split; what is unclear is refused with what to do.

    The splits are ``'train'`` and ``'val'``, or the one that there is; ``'train'`` where nothing says which it is. A
    test split is left out, and the description says so.

    Args:
        path: A folder or file.
        scratch: Folder for a copy of the images of parquet files, which cannot be read at random.
        ground_truth: Classes of ImageNet's validation images where they lie in no class folders.
        class_names: Names of classes, for webdataset tars and parquet files, whose labels are numbers.
    """
    root = Path(path).absolute()  # sources are read in other processes, whose current folder may differ
    if not root.exists():
        raise UserError(f'{root}: no such file or folder. Expected {_LAYOUTS}')
    archives = _archives(root)
    kind = _kind(root, archives)
    official = _official(archives, with_truth=ground_truth is not None) if kind == '.tar' else {}
    has_numbers = kind == '.parquet' or (kind == '.tar' and not official)
    if class_names is not None and not has_numbers:
        raise UserError(f'class_names={class_names}: the classes of {root} are named by its folders. Leave it out')
    if ground_truth is not None and has_numbers:
        raise UserError(f'ground_truth={ground_truth}: {root} brings its own labels. Leave it out')
    request = Request(root, scratch, ground_truth, () if class_names is None else read_class_names(class_names))
    if kind == 'folders':
        sources = open_folders(request)
    elif kind == '.zip':
        sources = open_zip(request)
    elif official:
        sources = open_ilsvrc(request, official)
    elif kind == '.tar':
        sources = open_webdataset(request, *split_files(root, archives))
    else:
        from tread_composer.conversion.sources.parquet import open_parquet  # here: slow to import

        sources = open_parquet(request, *split_files(root, archives))
    _check_same_classes(root, sources)
    return sources


def _archives(root: Path) -> list[Path]:
    """Files that may hold images: ``root`` itself, or those in the folders where they usually lie."""
    folders = [root / place for place in PLACES if (root / place).is_dir()]
    files = [root] if root.is_file() else [file for folder in folders for file in sorted(folder.iterdir())]
    # ImageNet's ground truth and bounding boxes come as archives too; they hold no images
    return [
        file
        for file in files
        if _SUFFIX.search(file.name)
        and file.is_file()
        and (file == root or not (file.name.startswith('.') or re.search('devkit|bbox', file.name)))
    ]


def _kind(root: Path, archives: list[Path]) -> str:
    """``'folders'``, ``'.zip'``, ``'.parquet'`` or ``'.tar'``."""
    names = few([file.name for file in archives])
    kinds = {f'.{(_SUFFIX.findall(file.name)[0] or "tar").lower()}' for file in archives}
    if root.is_file() and not kinds:
        raise UserError(f'{root}: not a file of a known kind. Expected {_LAYOUTS}')
    if root.is_dir() and kinds and (len(kinds) > 1 or '.zip' in kinds or holds_images(root)):
        raise UserError(
            f'{root}: holds {names}: several kinds, a zip, or archives beside images. Give the file itself, or a '
            f'folder with one kind'
        )
    return kinds.pop() if kinds else 'folders'


def _official(tars: list[Path], with_truth: bool) -> dict[Path, str]:
    """The split of each tar of ILSVRC; empty where the tars are webdatasets."""
    splits = {tar: named[1] for tar in tars if (named := _OFFICIAL.fullmatch(tar.name))}
    splits |= {tar: 'train' for tar in tars if tar not in splits and holds_tars(tar)}
    # Beside those, or with a ground truth, images alone are those of the validation set.
    return {tar: splits.get(tar, 'val') for tar in tars} if splits or with_truth else {}


def _check_same_classes(root: Path, sources: Mapping[str, Source]) -> None:
    """With other classes the same label would mean something else in each split: an incomplete copy."""
    for split, source in sources.items():
        for counterpart, reference in sources.items():
            if missing := set(source.class_names) - set(reference.class_names):
                raise UserError(
                    f'{root}: {split} has {len(missing):,} classes that {counterpart} lacks: {few(missing)}. Complete '
                    f'the data, or give the folder of one split alone'
                )
