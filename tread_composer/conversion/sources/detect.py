"""Which layout lies at a path. What is mixed or unclear is refused with what there is: a guess would cost days."""

import os
import re
from pathlib import Path

from tread_composer.conversion.sources.base import Request, Source, few, read_class_names
from tread_composer.conversion.sources.ilsvrc import open_ilsvrc
from tread_composer.conversion.sources.numbered import PLACES, split_files
from tread_composer.conversion.sources.tars import role_of
from tread_composer.conversion.sources.tree import holds_images, open_folders
from tread_composer.conversion.sources.webdataset import open_webdataset
from tread_composer.conversion.sources.zips import open_zip
from tread_composer.core.errors import UserError

__all__ = ['open_sources']

_LAYOUTS = (
    'a folder of images, of class folders, or of train/ and val/ with class folders; a .zip of these; '
    'the official ILSVRC tars; webdataset .tar files; Hugging Face .parquet files'
)
_COMPRESSED_TAR = re.compile(r'.*\.(tgz|tar\.(gz|bz2|xz|zst))')
_OFFICIAL = re.compile(r'ILSVRC\d+_img_(train|val|test)\b.*\.tar')
_OF_ONE_CLASS = re.compile(r'n\d{8}\.tar')


def open_sources(
    path: str | os.PathLike[str],
    *,
    scratch: Path,
    ground_truth: Path | None = None,
    class_names: Path | None = None,
) -> dict[str, Source]:
    """Find out what lies at ``path`` and list its images.

    Args:
        path: A folder or file.
        scratch: Folder for a copy of the images of parquet files, which cannot be read at random; others need none.
        ground_truth: Classes of ImageNet's validation images where they lie in no class folders: the devkit (tar.gz or
            folder), Kaggle's ``LOC_val_solution.csv`` or a text of two columns.
        class_names: A text with one name a line, for webdataset tars and parquet files, whose labels are numbers.

    Returns:
        ``'train'`` and ``'val'``, or the one that there is; ``'train'`` where nothing says which it is. A test split is
        left out, and the description says so.

    Raises:
        UserError: Nothing known lies there, or it is incomplete, mixed, damaged or unsafe; says what to do.
    """
    root = Path(path).absolute()  # sources are read in other processes, whose current folder may differ
    if not root.exists():
        raise UserError(f'{root}: no such file or folder. Expected {_LAYOUTS}')
    kind, tars = _kind(root, with_truth=ground_truth is not None)
    names: tuple[str, ...] = ()
    if class_names is not None:
        if kind not in ('webdataset', '.parquet'):
            raise UserError(f'class_names={class_names}: the classes of {root} are named by its folders. Leave it out')
        names = read_class_names(class_names)
    if ground_truth is not None and kind in ('webdataset', '.parquet'):
        raise UserError(f'ground_truth={ground_truth}: {root} brings its own labels. Leave it out')
    request = Request(root, scratch, ground_truth, names)
    if kind == 'folders':
        return open_folders(request)
    if kind == '.zip':
        return open_zip(request)
    if kind == 'ILSVRC':
        return open_ilsvrc(request, *_official(root, tars))
    if kind == 'webdataset':
        return open_webdataset(request, *split_files(root, '.tar'))
    from tread_composer.conversion.sources.parquet import open_parquet  # here: slow to import

    return open_parquet(request, *split_files(root, '.parquet'))


def _kind(root: Path, with_truth: bool) -> tuple[str, dict[Path, str]]:
    """``'folders'``, ``'.zip'``, ``'.parquet'``, ``'webdataset'`` or ``'ILSVRC'``; and the role of each tar."""
    archives = _archives(root)
    shown = few([file.name if root.is_file() else str(file.relative_to(root)) for file in archives])
    if root.is_file() and not archives:
        raise UserError(f'{root}: not a file of a known kind. Expected {_LAYOUTS}')
    if root.is_dir() and holds_images(root):
        if archives:
            raise UserError(
                f'{root}: holds images, and also {shown}. Which is meant? Give the archive itself, or move it away'
            )
        return 'folders', {}
    kinds = {_suffix(file) for file in archives}
    if not kinds:
        return 'folders', {}  # which will say that there is nothing in it
    if len(kinds) > 1:
        raise UserError(f'{root}: holds files of several kinds: {shown}. Which is meant? Give a folder with one kind')
    (kind,) = kinds
    if kind == '.zip' and root.is_dir():
        raise UserError(f'{root}: holds {shown}. Give the zip file itself')
    return _kind_of_tars(root, archives, with_truth) if kind == '.tar' else (kind, {})


def _archives(root: Path) -> list[Path]:
    """Files that may hold images: ``root`` itself, or those in the folders where they usually lie."""
    if root.is_file():
        return [root] if _suffix(root) else []
    folders = [root / place for place in PLACES if (root / place).is_dir()]
    files = [file for folder in folders for file in sorted(folder.iterdir()) if file.is_file()]
    # ImageNet's ground truth and bounding boxes come as archives too; they hold no images
    return [
        file
        for file in files
        if _suffix(file) and not file.name.startswith('.') and not re.search('devkit|bbox', file.name)
    ]


def _suffix(file: Path) -> str:
    """``'.zip'``, ``'.parquet'`` or ``'.tar'``, also of a compressed tar, which ``Archive`` refuses; else ``''``."""
    name = file.name.lower()
    if _COMPRESSED_TAR.fullmatch(name):
        return '.tar'
    return next((suffix for suffix in ('.zip', '.parquet', '.tar') if name.endswith(suffix)), '')


def _kind_of_tars(root: Path, tars: list[Path], with_truth: bool) -> tuple[str, dict[Path, str]]:
    roles = {tar: _role(tar) for tar in tars}
    for role, fault in (
        ('nothing', 'no image among its first members'),
        ('folders', 'a tar of folders of images. Unpack it, or pack the folders as a zip (zip -0 -r)'),
    ):
        if matching := [tar for tar in tars if roles[tar] == role]:
            raise UserError(f'{few([str(tar) for tar in matching])}: {fault}. Expected {_LAYOUTS}')
    if single := [tar for tar in tars if roles[tar] == 'images' and _OF_ONE_CLASS.fullmatch(tar.name)]:
        raise UserError(
            f'{root}: {few([tar.name for tar in single])}: tars of one class each, whose labels would be lost. Give '
            f'the tar that they come from (ILSVRC2012_img_train.tar), or unpack each into a folder of its name'
        )
    if with_truth or 'tars' in roles.values():  # then images alone are those of the validation set
        roles = {tar: 'val' if role == 'images' else role for tar, role in roles.items()}
    present = set(roles.values())
    if not present & {'tars', 'val', 'test'}:
        return 'webdataset', roles
    if present & {'labels', 'images'}:
        matching = ', '.join(f'{tar.name} ({role})' for tar, role in roles.items())
        raise UserError(
            f'{root}: ILSVRC tars beside others: {matching}. Give a folder with one kind, or the tar itself'
        )
    return 'ILSVRC', roles


def _role(tar: Path) -> str:
    official = _OFFICIAL.fullmatch(tar.name)
    return official[1] if official and official[1] != 'train' else role_of(tar)


def _official(root: Path, roles: dict[Path, str]) -> tuple[Path | None, Path | None, list[str]]:
    """The tar of the training images, that of the validation images, and what is left out."""
    chosen: dict[str, Path | None] = {}
    for role in ('tars', 'val'):
        matching = [tar for tar, tar_role in roles.items() if tar_role == role]
        if len(matching) > 1:
            raise UserError(
                f'{root}: {few([tar.name for tar in matching])}: one of each is expected. Give the tar itself'
            )
        chosen[role] = matching[0] if matching else None
    if not any(chosen.values()):
        raise UserError(f'{root}: only a test set, which has no labels; the tar of train or val is missing')
    notes = [f'{tar.name} is not converted' for tar, role in roles.items() if role == 'test']
    return chosen['tars'], chosen['val'], notes
