"""Which layout lies at a path. What is mixed or unclear is refused with what there is: a guess would cost days."""

import re
from collections.abc import Mapping
from pathlib import Path

from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.cifar import cifar_folder, open_cifar
from tread_composer.conversion.sources.folders import holds_images, open_folders, open_zip
from tread_composer.conversion.sources.numbered import PLACES, is_table, numbered_folders, open_img2dataset, split_files
from tread_composer.conversion.sources.source import Source, few
from tread_composer.conversion.sources.tars import holds_tars, open_ilsvrc, open_webdataset
from tread_composer.core.errors import UserError

__all__ = ['open_sources']

_LAYOUTS = (
    'a folder of images, of class folders, or of train/ and val/ with class folders; a .zip of these; '
    'the official ILSVRC tars; webdataset .tar files; Hugging Face .parquet files, or .arrow files as save_to_disk '
    'writes them; what img2dataset writes; the Python files of CIFAR'
)
# A compressed tar is refused when it is opened.
_SUFFIX = re.compile(r'\.(?:(zip|parquet|arrow|tar)|tgz|tar\.(?:gz|bz2|xz|zst))$', re.IGNORECASE)
_OFFICIAL = re.compile(r'ILSVRC\d+_img_(val|test)\b.*\.tar')


def open_sources(settings: ImageSettings, scratch: Path) -> dict[str, Source]:
    """Find out what lies at the source and list its images, by split; what is unclear is refused with what to do.

    The splits are ``'train'`` and ``'val'``, or the one that there is; ``'train'`` where nothing says which it is. What
    becomes of a test split, the description says. ``scratch`` is for a copy of images that cannot be read at random.
    """
    # Absolute: sources are read in other processes, whose current folder may differ.
    root = Path(settings.source).absolute()
    if not root.exists():
        raise UserError(f'{root}: no such file or folder. Expected {_LAYOUTS}')
    archives = _archives(root)
    if not archives and (inner := _configuration(root)) is not None:
        root, archives = inner, _archives(inner)
    kind = _kind(root, archives)
    official = _official(archives, with_truth=settings.ground_truth is not None) if kind == '.tar' else {}
    _check_options(root, settings, kind, is_official=bool(official))
    if kind == 'folders':
        sources = open_folders(root, settings)
    elif kind == 'cifar':
        sources = open_cifar(cifar_folder(root) or root, settings)
    elif kind == 'img2dataset':
        sources = open_img2dataset(root, settings)
    elif kind == '.zip':
        sources = open_zip(root, settings)
    elif official:
        sources = open_ilsvrc(root, settings, official)
    elif kind == '.tar':
        sources = open_webdataset(root, settings, *split_files(root, archives, settings.use_test))
    else:
        from tread_composer.conversion.sources.parquet import open_tables, saved_files  # here: slow to import

        archives, notes = saved_files(root, archives)
        splits, unread = split_files(root, archives, settings.use_test)
        sources = open_tables(root, settings, scratch, splits, [*notes, *unread])
    _check_same_classes(root, sources)
    return sources


def _check_options(root: Path, settings: ImageSettings, kind: str, is_official: bool) -> None:
    """Refuse what this kind has no use for."""
    columns = (settings.image_column, settings.label_column)
    is_table = kind in ('.parquet', '.arrow')
    has_numbers = is_table or kind == 'img2dataset' or (kind == '.tar' and not is_official)
    if settings.class_names is not None and not has_numbers:
        raise UserError(f'class_names={settings.class_names}: the folders of {root} name its classes. Leave it out')
    if settings.ground_truth is not None and has_numbers:
        raise UserError(f'ground_truth={settings.ground_truth}: {root} brings its own labels. Leave it out')
    if any(columns) and not is_table and (kind != 'cifar' or columns[0]):
        raise UserError(
            f'image_column={columns[0]}, label_column={columns[1]}: only tables (.parquet, .arrow) and CIFAR-100 have '
            f'such, and {root} is none. Leave them out'
        )
    _ = settings.given_names  # refused before minutes of listing


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
        and (file == root or not (file.name.startswith('.') or re.search('devkit|bbox', file.name) or is_table(file)))
    ]


def _kind(root: Path, archives: list[Path]) -> str:
    """``'folders'``, ``'cifar'``, ``'img2dataset'``, ``'.zip'``, ``'.parquet'``, ``'.arrow'`` or ``'.tar'``."""
    if cifar_folder(root) is not None:
        return 'cifar'  # torchvision leaves the archive beside the folder
    names = few([file.name for file in archives])
    kinds = {f'.{(_SUFFIX.findall(file.name)[0] or "tar").lower()}' for file in archives}
    if root.is_file() and not kinds:
        raise UserError(f'{root}: not a file of a known kind. Expected {_LAYOUTS}')
    if root.is_dir() and kinds and (len(kinds) > 1 or '.zip' in kinds or holds_images(root)):
        raise UserError(
            f'{root}: holds {names}: several kinds, a zip, or archives beside images. Give the file itself, or a '
            f'folder with one kind'
        )
    if kinds:
        return kinds.pop()
    return 'img2dataset' if numbered_folders(root) else 'folders'


def _configuration(root: Path) -> Path | None:
    """The one folder of ``root`` with parquet files, as data sets on the hub have one for each configuration."""
    if not root.is_dir() or cifar_folder(root) is not None or holds_images(root):
        return None
    folders = [folder for folder in sorted(root.iterdir()) if folder.is_dir() and not folder.name.startswith('.')]
    tables = [folder for folder in folders if any(file.suffix == '.parquet' for file in _archives(folder))]
    if len(tables) > 1:
        raise UserError(
            f'{root}: parquet files of {len(tables)} configurations: {few([folder.name for folder in tables])}. Give '
            f'the folder of one'
        )
    return tables[0] if tables else None


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
                    f'the data, or give the folder of one split alone (--splits train leaves a test split out)'
                )
