"""Images in folders: one folder for each class, with or without train/ and val/ above; or images alone.

A zip and the official tars are looked at as the folders that they would unpack to; what is mixed or unclear is refused.
"""

import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tread_composer.conversion.sources.base import (
    SPLITS,
    Ignored,
    Images,
    Request,
    Source,
    check_splits,
    few,
    in_label_order,
    is_image,
    is_litter,
)
from tread_composer.conversion.sources.ground_truth import assign_classes
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.tiny_imagenet import ANNOTATIONS, annotated_classes, without_images_folder
from tread_composer.core.errors import UserError
from tread_composer.io.progress import Progress

__all__ = ['Branch', 'FolderSource', 'Listing', 'edm_labels', 'holds_images', 'open_folders']

_EDM = 'dataset.json'  # labels the images beside it, whose numbered folders are no classes
_LABEL_FILES = (_EDM, 'metadata.jsonl', 'metadata.csv', 'labels.csv', ANNOTATIONS)
"""Files with these names hold labels; beside those that nobody reads, folders say nothing certain."""

_LAYOUTS = 'class folders, train/ and val/ of class folders, or images alone'


@dataclass
class Branch(Images):
    """One split of a tree, whose paths there begin with ``prefix`` (empty, or with ``/`` at its end)."""

    prefix: str = ''
    form: str = '{name}'  # path below the prefix; of the name also {label} and {file}, around its first slash

    def label(self, classes: Sequence[str]) -> None:
        """Take the classes in label order, and each image's label, of the names of their classes."""
        self.class_names = in_label_order(classes)
        label_of = {name: label for label, name in enumerate(self.class_names)}
        self.labels = [label_of[name] for name in classes]


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
            try:
                self.label_files[path] = read()
            except OSError as error:
                raise UserError(f'{path}: cannot be read: {error}') from error

    def branches(self, request: Request) -> dict[str, Branch]:
        """The splits of the tree.

        Ground truth is needed, and allowed, for a split ``val`` without class folders beside a ``train`` with them, or
        alone (as Kaggle's ImageNet has it). What is not one of the layouts is refused with what there is.
        """
        root, paths = request.root, list(self.images)
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
            split_of = self._splits(tops, named, request.use_test)
            branches = {split: self._branch(root, f'{prefix}{top}/', tops[top]) for top, split in split_of.items()}
        else:
            branches = {'train': self._branch(root, prefix, paths)}
        unread = [path for path in self.label_files if not path.startswith(f'{prefix}test/')]
        if unread:
            raise UserError(
                f'{root}: {few(unread)} hold labels that this layout does not read, so those of the folders may be '
                f'wrong. Move them away if the folders are the classes; read are {_EDM} beside the images and '
                f'{ANNOTATIONS} beside images in no class folders'
            )
        _label_val(root, branches, request.ground_truth)
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

    def _branch(self, root: Path, prefix: str, paths: list[str]) -> Branch:
        names = [path[len(prefix) :] for path in paths]
        branch = Branch(names, [0] * len(names), (), self.ignored, [self.images[path] for path in paths], prefix)
        if self._labelled_by_file(root, branch):
            return branch
        if (shorter := without_images_folder(names)) is not None:
            branch.names, branch.form = shorter, '{label}/images/{file}'
            names = shorter
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

    def _labelled_by_file(self, root: Path, branch: Branch) -> bool:
        """Whether a file beside the images says their labels, which the branch has then."""
        names, prefix = branch.names, branch.prefix
        if (content := self.label_files.pop(prefix + _EDM, None)) is not None:
            place = f'{root}/{prefix}{_EDM}'
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


def edm_labels(file: str, names: Sequence[str], content: bytes) -> list[int] | None:
    """The label of each image, of ``{"labels": [["00000/img00000000.png", 6], ...]}``; None if the file has null."""
    try:
        rows = json.loads(content)['labels']
        labels = {} if rows is None else dict(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: not the labels of an EDM data set ({error!r}). Move it away, or repair it') from error
    if rows is None:
        return None
    for fault, wrong in (
        ('has no label for', set(names) - set(labels)),
        ('labels images that are missing', set(labels) - set(names)),
        ('the label is no whole number of', [name for name, label in labels.items() if type(label) is not int]),
        ('lists more than once', [name for name, count in Counter(name for name, _ in rows).items() if count > 1]),
    ):
        if wrong:
            raise UserError(f'{file}: {fault}: {few(wrong)} ({len(wrong):,} in all). Repair it, or get the data anew')
    return [labels[name] for name in names]


def _wrapper(paths: list[str]) -> str:
    """The folders that everything is in, as ``a/b/``, above those where splits or class folders begin."""
    above = [folder.split('/')[:-1] for folder in {path.rpartition('/')[0] for path in paths}]
    common = os.path.commonprefix(above)  # noqa: RUF071  (of lists: parts are compared, not letters)
    parts = itertools.takewhile(lambda part: part not in SPLITS, common)
    return ''.join(f'{part}/' for part in parts)


def _label_val(root: Path, branches: dict[str, Branch], ground_truth: Path | None) -> None:
    """Give ``val`` its labels where they come from elsewhere."""
    train, val = branches.get('train'), branches.get('val')
    if val is not None and not val.class_names and (ground_truth or (train and train.class_names)):
        if train and not train.class_names:
            raise UserError(f'{root}: ground_truth={ground_truth} is given, but train has no class folders')
        class_names, val.labels = assign_classes(ground_truth, val.names, train and train.class_names, root)
        val.in_classes(class_names)
        val.form = '{file}'
    elif ground_truth:
        raise UserError(
            f'ground_truth={ground_truth}: {root} has no use for it: it labels validation images that lie loose in '
            f'val/ or in the official tar. Leave it out'
        )


@dataclass(eq=False)
class FolderSource(Source):
    """Image ``i`` is a file below ``folder``, where ``form`` says (see ``Branch``)."""

    folder: str
    form: str

    def read(self, position: int) -> bytes:
        """The image file at that position; see ``Source.read``."""
        name = self.names[position]
        label, _, file = name.partition('/')
        path = Path(self.folder, self.form.format(name=name, label=label, file=file))
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f'{path}: was there when the source was opened and cannot be read now: {error}') from error


def open_folders(request: Request) -> dict[str, Source]:
    """The splits of a folder."""
    root = request.root
    listing = Listing(Progress(f'scanning {root}'))
    for parts, is_folder in _walk(root):
        if is_folder:
            listing.folders.add('/'.join(parts))
        else:
            listing.add(parts, root.joinpath(*parts).read_bytes)
    return {
        split: FolderSource.arranged(
            'class folders' if branch.class_names else 'flat folder',
            root,
            branch,
            inside=branch.prefix,
            folder=str(root / branch.prefix),
            form=branch.form,
        )
        for split, branch in listing.branches(request).items()
    }


def holds_images(root: Path) -> bool:
    """Whether there is an image anywhere below."""
    files = (parts for parts, is_folder in _walk(root) if not is_folder)
    return any(is_image(parts[-1]) and not is_litter(parts) for parts in files)


def _walk(root: Path, inside: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    """Parts of the path of everything below, and whether it is a folder. Links are followed: people link data sets."""
    folder = root.joinpath(*inside)
    try:
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
    except OSError as error:  # too many levels: a link to a folder that it is in
        raise UserError(f'{folder}: cannot be read: {error}') from error
