"""From the paths of a tree (a folder's or a zip's) to splits and classes; what is mixed or unclear is refused."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tread_composer.conversion.sources.base import (
    SPLITS,
    Ignored,
    check_same_classes,
    few,
    in_label_order,
    is_image,
    is_litter,
)
from tread_composer.conversion.sources.ground_truth import assign_classes
from tread_composer.conversion.sources.numbered import classes_of_numbers
from tread_composer.core.errors import UserError

__all__ = ['Branch', 'Listing', 'holds_labels', 'lay_out']

_EDM = 'dataset.json'
_LABEL_FILES = (_EDM, 'metadata.jsonl', 'metadata.csv', 'labels.csv', 'val_annotations.txt')
"""Files with these names hold labels; only EDM's are read, beside the others folders say nothing certain."""

_LAYOUTS = 'class folders, train/ and val/ of class folders, or images alone'


@dataclass
class Listing:
    """What a tree holds: paths of images and of folders, separated by ``/``, without litter; content of label files."""

    images: list[str] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    label_files: dict[str, bytes] = field(default_factory=dict)
    ignored: Ignored = field(default_factory=Ignored)

    def add(self, parts: Sequence[str], is_folder: bool) -> None:
        """Put one path where it belongs."""
        if is_folder and not is_litter(parts):
            self.folders.add('/'.join(parts))
        elif not is_folder and is_image(parts[-1]) and not is_litter(parts):
            self.images.append('/'.join(parts))
        elif not is_folder:
            self.ignored.add(parts)


def holds_labels(parts: Sequence[str]) -> bool:
    """Whether a path is that of a label file, whose content belongs into ``Listing.label_files``."""
    return parts[-1] in _LABEL_FILES and not is_litter(parts)


@dataclass
class Branch:
    """One split: images by class, and where they are.

    Attributes:
        prefix: Beginning of its paths in the tree; ends with ``/`` or is empty.
        class_names: In label order; empty without classes.
        names: Canonical names.
        labels: One for each name.
        bare: The class in a name is no folder of the tree: labels come from elsewhere.
    """

    prefix: str
    class_names: tuple[str, ...]
    names: list[str]
    labels: list[int]
    bare: bool = False

    def path(self, name: str) -> str:
        """Where the image of that name is in the tree."""
        return self.prefix + (name.partition('/')[2] if self.bare else name)


def lay_out(root: Path, listing: Listing, ground_truth: Path | None) -> dict[str, Branch]:
    """The splits of a tree.

    Args:
        root: The folder or archive, for messages.
        listing: Its content.
        ground_truth: Needed, and allowed, for a split ``val`` without class folders beside a ``train`` with them, or
            alone (as Kaggle's ImageNet has it).

    Raises:
        UserError: Not one of the layouts; says what was found and what to do.
    """
    images = listing.images
    if not images:
        raise UserError(f'{root}: no image in it; {str(listing.ignored) or "it is empty"}. Expected {_LAYOUTS}')
    prefix = _wrapper(images)
    if prefix:
        listing.ignored.notes.append(f'all images are inside {prefix}')
    tops = _by_top(images, prefix)
    named = sorted(set(tops) & set(SPLITS))
    if not named:
        branches = {'train': _branch(root, prefix, images, listing)}
    else:
        _check_splits(root, prefix, tops, named, listing)
        branches = {
            SPLITS[top]: _branch(root, f'{prefix}{top}/', tops[top], listing) for top in named if SPLITS[top] != 'test'
        }
        for path in [path for path in listing.label_files if path.startswith(f'{prefix}test/')]:
            del listing.label_files[path]  # of images that are not converted
    if listing.label_files:
        raise UserError(
            f'{root}: {few(listing.label_files)} hold labels that this layout does not read, so those of the folders '
            f'may be wrong. Move them away if the folders are the classes; read is {_EDM} of EDM, beside the images'
        )
    _join(root, branches, ground_truth)
    return branches


def _wrapper(images: list[str]) -> str:
    """The folders that everything is in, as ``a/b/``, down to where splits or class folders begin."""
    prefix = ''
    while True:
        top, _, remainder = images[0][len(prefix) :].partition('/')
        longer = f'{prefix}{top}/'
        # two folders below the present place, and one below the new: class folders can only begin there
        if top in SPLITS or '/' not in remainder:
            return prefix
        if not all(path.startswith(longer) and '/' in path[len(longer) :] for path in images):
            return prefix
        prefix = longer


def _by_top(images: list[str], prefix: str) -> dict[str, list[str]]:
    """Paths by their first folder below ``prefix``; those in no folder under the empty name."""
    tops: dict[str, list[str]] = {}
    for path in images:
        top, slash, _ = path[len(prefix) :].partition('/')
        tops.setdefault(top if slash else '', []).append(path)
    return tops


def _check_splits(root: Path, prefix: str, tops: dict[str, list[str]], named: list[str], listing: Listing) -> None:
    others = [top or f'the image {tops[top][0]}' for top in tops if top not in SPLITS]
    if others:
        raise UserError(
            f'{root}: {few(named)} are taken as splits, but beside them are images of no split: {few(others)}. '
            f'Move them away; or, if {few(named)} are classes, rename these folders'
        )
    expected = [top for top, split in SPLITS.items() if split != 'test']
    empty = [top for top in expected if f'{prefix}{top}' in listing.folders and top not in tops]
    if empty:
        raise UserError(f'{root}: {few(empty)} holds no image. Complete the data, or remove the folder')
    meant = [SPLITS[top] for top in named]
    if len(set(meant)) < len(meant):
        raise UserError(f'{root}: {few(named)}: two folders for one split. Rename or move one of them')
    if set(meant) == {'test'}:
        raise UserError(f'{root}: only a test split, which is never converted; train/ or val/ are missing')
    if 'test' in meant:
        listing.ignored.notes.append(f'test/ ({len(tops["test"]):,} images) is not converted')


def _branch(root: Path, prefix: str, paths: list[str], listing: Listing) -> Branch:
    names = [path[len(prefix) :] for path in paths]
    if (content := listing.label_files.pop(f'{prefix}{_EDM}', None)) is not None:
        return _labelled_branch(f'{root}/{prefix}{_EDM}', prefix, names, content)
    depths = {name.count('/'): name for name in names}  # an example of each
    if depths.keys() == {0}:
        return Branch(prefix, (), names, [0] * len(names))
    if depths.keys() != {1}:
        examples = ', '.join(repr(prefix + depths[depth]) for depth in sorted(depths))
        raise UserError(f'{root}: images lie at different or unknown depths, such as {examples}. Expected {_LAYOUTS}')
    class_of = [name.partition('/')[0] for name in names]
    class_names = in_label_order(class_of)
    start = len(prefix)
    folders = {path[start:].partition('/')[0] for path in listing.folders if path.startswith(prefix)}
    empty = folders - set(class_names) - {''}
    if empty:
        raise UserError(
            f'{root}: {len(empty):,} class folders hold no image: {few(sorted(prefix + name for name in empty))}. '
            f'Complete the data; a folder that is no class must be moved away'
        )
    label_of = {name: label for label, name in enumerate(class_names)}
    return Branch(prefix, class_names, names, [label_of[name] for name in class_of])


def _labelled_branch(file: str, prefix: str, names: list[str], content: bytes) -> Branch:
    """EDM's layout: numbered folders that are no classes, and ``{"labels": [["00000/img00000000.png", 6], ...]}``."""
    try:
        rows = json.loads(content)['labels']
        labels = {} if rows is None else dict(rows)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{file}: not the labels of an EDM data set ({error!r}). Move it away, or repair it') from error
    if rows is None:
        return Branch(prefix, (), names, [0] * len(names))
    for fault, missing in (
        ('has no label for', set(names) - set(labels)),
        ('labels images that are missing', set(labels) - set(names)),
    ):
        if missing:
            raise UserError(f'{file}: {fault}: {few(missing)} ({len(missing):,} in all). Both must be complete')
    numbers = [labels[name] for name in names]
    wrong = [name for name, number in zip(names, numbers, strict=True) if type(number) is not int]
    if wrong or len(labels) != len(rows):
        fault = f'the label of {wrong[0]} is {labels[wrong[0]]!r:.60}' if wrong else 'an image is listed twice'
        raise UserError(f'{file}: {fault}; each image needs one whole number')
    class_names, _ = classes_of_numbers(Path(file), {'train': numbers}, ())
    return Branch(prefix, class_names, [f'{label}/{name}' for label, name in zip(numbers, names, strict=True)],
                  numbers, bare=True)  # fmt: skip


def _join(root: Path, branches: dict[str, Branch], ground_truth: Path | None) -> None:
    """Check that the splits belong together, and give ``val`` its labels where they come from elsewhere."""
    train, val = branches.get('train'), branches.get('val')
    if val is not None and not val.class_names and (ground_truth or (train and train.class_names)):
        classes = train.class_names if train else None
        if train and not classes:
            raise UserError(f'{root}: ground_truth={ground_truth} is given, but train has no class folders')
        class_names, labels = assign_classes(ground_truth, val.names, classes, root)
        names = [f'{class_names[label]}/{name}' for label, name in zip(labels, val.names, strict=True)]
        branches['val'] = val = Branch(val.prefix, class_names, names, labels, bare=True)
    elif ground_truth:
        raise UserError(
            f'ground_truth={ground_truth}: {root} has no use for it: it labels validation images that lie loose in '
            f'val/ or in the official tar. Leave it out'
        )
    if train and val:
        if val.class_names and not train.class_names:
            raise UserError(f'{root}: val has class folders, train has none. Give one split alone')
        check_same_classes(root, {'train': train.class_names, 'val': val.class_names})
