"""The Python files of CIFAR-10 and CIFAR-100 as their authors publish them and torchvision fetches them.

A file is a pickle of ``data`` (uint8, a row of 3 x 32 x 32 for each image) and lists of labels. The bytes of ``data``
lie in it as they are, so images are read from there at random.
"""

import functools
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.numbered import name_by_number
from tread_composer.conversion.sources.source import Images, IndexedFiles, Source, arranged, refusing
from tread_composer.core.errors import UserError

__all__ = ['cifar_folder', 'load_plain', 'open_cifar']

# What numpy itself writes for an array. A pickle is a program, and may name nothing else here.
_NAMES = {
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('numpy._core.multiarray', '_reconstruct'),  # pickle protocols 2 to 4
    ('numpy._core.numeric', '_frombuffer'),  # protocol 5
}
_SIDE = 32
_BYTES = 3 * _SIDE * _SIDE
_FORMS = {  # by the folder's name: names of classes, files of the splits, which labels
    'cifar-10-batches-py': (
        'batches.meta',
        {'train': [f'data_batch_{number}' for number in range(1, 6)], 'test': ['test_batch']},
        'labels',
    ),
    'cifar-100-python': ('meta', {'train': ['train'], 'test': ['test']}, 'fine_labels'),
}


def cifar_folder(root: Path) -> Path | None:
    """Where such files lie: ``root``, or the one folder of their name in it, as torchvision leaves it."""
    places = [root / name for name, (meta, files, _) in _FORMS.items() if (root / name / meta).is_file()]
    is_here = any((root / meta).is_file() and (root / files['test'][0]).is_file() for meta, files, _ in _FORMS.values())
    if is_here:
        return root
    return places[0] if len(places) == 1 else None


def open_cifar(folder: Path, settings: ImageSettings) -> dict[str, Source]:
    """Both splits: the test images, all labelled, are the evaluation split."""
    form = 'cifar-10-batches-py' if (folder / 'batches.meta').is_file() else 'cifar-100-python'
    meta, files, label = _FORMS[form]
    label = settings.label_column or label
    paths = {'train': files['train'], **({'val': files['test']} if settings.use_test else {})}
    splits = {split: _images([folder / name for name in names], label) for split, names in paths.items()}
    names_key = f'{label.removesuffix("s")}_names'
    names = _entry(folder / meta, _content(folder / meta), names_key)
    damage = (AttributeError, UnicodeDecodeError)
    with refusing(
        damage, f'{folder / meta}: not the names of classes as the published files have them', '. Get it anew'
    ):
        class_names = tuple(text.decode() for text in names)
    name_by_number(folder, splits, class_names)
    splits['train'].ignored.notes.append(f'classes: {names_key}')
    loads = {
        split: functools.partial(_load, IndexedFiles(folder / name for name in names)) for split, names in paths.items()
    }
    return {split: arranged(form, folder, images, loads[split]) for split, images in splits.items()}


def _load(files: IndexedFiles, *place: Any) -> bytes:
    """A row of pixels as a PPM file."""
    planes = np.frombuffer(files.read(*place), np.uint8).reshape(3, _SIDE, _SIDE)
    return f'P6 {_SIDE} {_SIDE} 255\n'.encode() + planes.transpose(1, 2, 0).tobytes()


def _entry(path: Path, content: dict, key: str) -> list:
    if not isinstance(content.get(key.encode()), list):
        columns = sorted(name.decode(errors='replace') for name in content)
        raise UserError(f'{path}: has no {key!r}, only {columns}. Choose another --label-column')
    return content[key.encode()]


def _content(path: Path) -> dict:
    with refusing((OSError, ValueError), f'{path}: cannot be read', '. Get it anew'):
        content = load_plain(path.read_bytes())
    if not isinstance(content, dict) or not all(isinstance(name, bytes) for name in content):
        raise UserError(f'{path}: not a file of CIFAR. Get it anew')
    return content


def _images(paths: list[Path], label: str) -> Images:
    images = Images()
    for number, path in enumerate(paths):
        content = _content(path)
        data, labels = content.get(b'data'), _entry(path, content, label)
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), _BYTES):
            raise UserError(f'{path}: not the pixels of {len(labels):,} images of CIFAR. Get it anew')
        start = path.read_bytes().find(data.tobytes())
        if start < 0 or any(type(value) is not int for value in labels):
            raise UserError(f'{path}: not written as the published files are. Get it anew')
        images.names += [f'{path.name}-{row:05d}' for row in range(len(labels))]
        images.labels += labels
        images.places += [(number, start + row * _BYTES, _BYTES) for row in range(len(labels))]
    return images


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace('numpy.core.', 'numpy._core.')  # as it was called before numpy 2
        if (module, name) not in _NAMES:
            raise ValueError(f'it names {module}.{name}, which an array has no need of')
        return super().find_class(module, name)


def load_plain(data: bytes) -> Any:
    """What was pickled; texts of Python 2 are bytes. ``ValueError`` if it is damaged or names anything but arrays."""
    try:
        return _Unpickler(io.BytesIO(data), encoding='bytes').load()
    except Exception as error:  # a damaged pickle can fail in any way
        raise ValueError(str(error) or repr(error)) from error
