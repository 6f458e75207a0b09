"""Labels of images that lie in no class folder: ImageNet's validation images, EDM's and Tiny-ImageNet's tables."""

import io
import json
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from tread_composer.conversion.sources.source import few, in_label_order, is_image, refusing
from tread_composer.core.errors import UserError

__all__ = ['ANNOTATIONS', 'EDM', 'annotated_classes', 'assign_classes', 'edm_labels', 'missing_truth']

EDM = 'dataset.json'
"""``{"labels": [["00000/img00000000.png", 6], ...]}`` of the images beside it, in numbered folders."""
ANNOTATIONS = 'val_annotations.txt'
"""Lines of ``val_0.JPEG<TAB>n03444034<TAB>`` and a box: Tiny-ImageNet's classes of the images in ``images/``."""

_META, _TRUTH = 'meta.mat', 'ILSVRC2012_validation_ground_truth.txt'
_THREE_FORMS = (
    "(a) ILSVRC2012_devkit_t12.tar.gz or its unpacked folder, (b) Kaggle's LOC_val_solution.csv, "
    '(c) a text file with two columns: image name, and synset or number of the class in sorted order from 0'
)


def _check_rows(place: object, rows: Iterable[str], images: Iterable[str]) -> None:
    """Refuse a table whose rows do not name just these images, each once."""
    counts, images = Counter(rows), set(images)
    for fault, wrong in (
        ('lists more than once', [name for name, count in counts.items() if count > 1]),
        ('has no label for', images - counts.keys()),
        ('labels images that are missing', counts.keys() - images),
    ):
        if wrong:
            raise UserError(f'{place}: {fault}: {few(wrong)} ({len(wrong):,} in all). Repair it, or get the data anew')


def edm_labels(place: str, names: Sequence[str], content: bytes) -> list[int] | None:
    """The label of each image, by the ``EDM`` file at ``place``; None if that has null."""
    damage = (ValueError, KeyError, TypeError)
    with refusing(damage, f'{place}: not the labels of an EDM data set', '. Move it away, or repair it'):
        rows = json.loads(content)['labels']
        if rows is None:
            return None
        if not (isinstance(rows, list) and all(isinstance(row, list) and len(row) == 2 for row in rows)):
            raise ValueError('"labels" is no list of pairs')
        if not all(isinstance(name, str) for name, _ in rows):
            raise ValueError('"labels" is no list of pairs of a name and a number')
    _check_rows(place, (name for name, _ in rows), names)
    labels = dict(rows)
    if wrong := [name for name, label in labels.items() if type(label) is not int]:
        raise UserError(f'{place}: the label is no whole number of: {few(wrong)} ({len(wrong):,} in all). Repair it')
    return [labels[name] for name in names]


def annotated_classes(place: str, files: Sequence[str], content: bytes) -> list[str]:
    """The class of each file by the ``ANNOTATIONS`` at ``place``, which must name just these."""
    rows = [line.split('\t') for line in content.decode(errors='replace').splitlines() if line.strip()]
    if any(len(row) < 2 or not re.fullmatch(r'\S+', row[1]) for row in rows):
        raise UserError(f'{place}: not the table of Tiny-ImageNet (file, class and box, with tabs). Get it anew')
    _check_rows(place, (row[0] for row in rows), files)
    class_of = {row[0]: row[1] for row in rows}
    return [class_of[file] for file in files]


def missing_truth(location: Path) -> UserError:
    """The error for validation images without labels."""
    return UserError(
        f'{location}: the validation images lie in no class folders, so their classes must come from elsewhere. '
        f'Give ground_truth (--ground-truth), one of: {_THREE_FORMS}'
    )


def assign_classes(
    ground_truth: str | None, files: Sequence[str], train_classes: tuple[str, ...] | None, location: Path
) -> tuple[tuple[str, ...], list[int]]:
    """Class names, and the label of each file, given the classes of the training images if there are any.

    Ground truth must exist, for just these images, and its numbers must be those of the classes.
    """
    if ground_truth is None:
        raise missing_truth(location)
    truth = _read_ground_truth(Path(ground_truth))
    stems = [_stem(file) for file in files]
    _check_rows(f'ground_truth={ground_truth}', truth.keys(), stems)
    classes = [truth[stem] for stem in stems]
    class_names = in_label_order(classes)
    label_of = {name: label for label, name in enumerate(class_names)}
    training = set(train_classes or ())
    if all(name.isdecimal() for name in class_names) and not training.issuperset(class_names):
        if train_classes is None or class_names != tuple(str(number) for number in range(len(train_classes))):
            raise UserError(
                f'ground_truth={ground_truth}: numbers of {len(class_names):,} classes, such as {class_names[0]}, for '
                f'{len(training):,} classes of training images; 0 to n - 1 must all occur, in the order of the '
                f'sorted names. Give synsets, or a source that holds train too'
            )
        class_names = train_classes
    return class_names, [label_of[name] for name in classes]


def _read_ground_truth(path: Path) -> dict[str, str]:
    """Class (synset, or a number) of each image, by the image's name without extension."""
    damage = (OSError, EOFError, UnicodeDecodeError, tarfile.TarError, zlib.error)
    with refusing(damage, f'ground_truth={path}: cannot be read', f'. Expected {_THREE_FORMS}'):
        if path.is_dir() or path.name.lower().endswith(('.tar.gz', '.tgz', '.tar')):
            return _devkit(path)
        text = path.read_text(encoding='utf-8-sig')
    is_kaggle = text.startswith('ImageId,PredictionString')
    truth: dict[str, str] = {}
    for number, line in enumerate(text.splitlines()[is_kaggle:], start=1 + is_kaggle):
        name, *words = line.replace(',', ' ').split() or ['']
        # Kaggle: an image may show several objects, each as "synset x y x y"; the image has one class.
        classes = set(words[::5]) if is_kaggle else set(words)
        if len(classes) != 1 or not (is_kaggle or len(words) == 1):
            raise UserError(f'ground_truth={path}: line {number}: {line!r} is not two columns. Expected {_THREE_FORMS}')
        stem = _stem(name.rpartition('/')[2])
        if stem in truth:
            raise UserError(f'ground_truth={path}: line {number}: {stem} occurs more than once')
        truth[stem] = classes.pop()
    return truth


def _stem(name: str) -> str:
    return name.rpartition('.')[0] if is_image(name) else name


def _devkit(path: Path) -> dict[str, str]:
    """Line i is the ILSVRC id of image i. These ids are not positions in the sorted synsets: meta.mat maps them."""
    meta, truth = _devkit_files(path)
    from scipy.io import loadmat  # here: slow to import, and only this form needs it

    # A damaged .mat file fails in as many ways as it has fields.
    with refusing(Exception, f'ground_truth={path}: {_META} or {_TRUTH} is damaged'):
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)['synsets'])
        synset_of = {int(row['ILSVRC2012_ID']): str(row['WNID']) for row in synsets}
        ids = [int(line) for line in truth.decode('ascii').split()]
        return {f'ILSVRC2012_val_{image:08d}': synset_of[number] for image, number in enumerate(ids, start=1)}


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    contents: dict[str, bytes] = {}
    if path.is_dir():
        files = [folder / name for folder in (path, path / 'data') for name in (_META, _TRUTH)]
        contents = {file.name: file.read_bytes() for file in files if file.is_file()}
    else:
        with tarfile.open(path) as archive:  # read into memory; nothing is extracted
            for member in archive:
                name = member.name.rpartition('/')[2]
                content = archive.extractfile(member) if name in (_META, _TRUTH) and member.isreg() else None
                if content is not None:
                    contents[name] = content.read()
    if len(contents) != 2:
        raise UserError(f'ground_truth={path}: {_META} and {_TRUTH} are not both in it. Expected {_THREE_FORMS}')
    return contents[_META], contents[_TRUTH]
