"""The same few real images in every layout in which ImageNet is found."""

import functools
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits, load_sample_images

CLASSES = ('n01440764', 'n02105855', 'n03995372')
ILSVRC_IDS = {'n02105855': 1, 'n03995372': 2, 'n01440764': 3}  # not the sorted order, as in the real devkit

Pictures = dict[str, bytes]
"""Image files by canonical name, ``<class>/<file>``."""


@functools.cache
def _photographs() -> tuple[Image.Image, ...]:
    return tuple(Image.fromarray(image) for image in load_sample_images().images)


def picture(seed: int) -> Image.Image:
    """A piece of a photograph, or a digit; size and mode depend on the seed."""
    draw = random.Random(seed)
    if seed % 7 == 6:
        digit = np.asarray(_digits()[seed % 1797] * 15, dtype=np.uint8)
        return Image.fromarray(digit).resize((48, 40), Image.Resampling.BICUBIC)
    photograph = _photographs()[seed % 2]
    width, height = draw.randrange(40, 150), draw.randrange(40, 150)
    left, top = draw.randrange(photograph.width - width), draw.randrange(photograph.height - height)
    piece = photograph.crop((left, top, left + width, top + height))
    return piece.convert({3: 'L', 5: 'CMYK'}.get(seed % 7, 'RGB'))


@functools.cache
def _digits() -> np.ndarray:
    return np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)


def encoded(image: Image.Image, kind: str = 'JPEG') -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **({'quality': 90} if kind == 'JPEG' else {}))
    return stream.getvalue()


def pictures(train_per_class: int = 4, val_per_class: int = 2) -> dict[str, Pictures]:
    """Train and val under ImageNet's own names. One train image is a PNG that is called JPEG, as in ImageNet."""
    train = {
        f'{name}/{name}_{number * 37 + 5}.JPEG': encoded(picture(100 * label + number))
        for label, name in enumerate(CLASSES)
        for number in range(train_per_class)
    }
    train['n02105855/n02105855_2933.JPEG'] = encoded(picture(500), 'PNG')
    numbers = list(range(1, len(CLASSES) * val_per_class + 1))
    random.Random(0).shuffle(numbers)  # the validation images are not sorted by class
    val = {
        f'{CLASSES[position % 3]}/ILSVRC2012_val_{number:08d}.JPEG': encoded(picture(1000 + number))
        for position, number in enumerate(numbers)
    }
    return {'train': train, 'val': val}


def without(images: Pictures, name: str) -> Pictures:
    """All but one class."""
    return {path: content for path, content in images.items() if not path.startswith(name)}


def _shuffled(images: Pictures) -> list[tuple[str, bytes]]:
    """No layout may depend on the order in which it stores its images."""
    rows = list(images.items())
    random.Random(1).shuffle(rows)
    return rows


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    """Any files by their path below ``root``."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_folders(root: Path, splits: dict[str, Pictures]) -> Path:
    """``train/n01440764/*.JPEG`` and ``val/...``."""
    for split, images in splits.items():
        write_tree(root / split, images)
    return root


def write_flat(root: Path, images: Pictures) -> Path:
    """Images alone."""
    return write_tree(root, {name.rpartition('/')[2]: content for name, content in images.items()})


def write_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Any files by their name in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in _shuffled(dict(files)):
            archive.writestr(name, content)
    return path


def zip_of_splits(path: Path, splits: dict[str, Pictures], prefix: str = '', **options: int) -> Path:
    """``<prefix>train/n01440764/*.JPEG`` and so on in one zip."""
    return write_zip(
        path, {f'{prefix}{split}/{n}': c for split, own in splits.items() for n, c in own.items()}, **options
    )


def write_tar(path: Path, files: Mapping[str, bytes], layout: int = tarfile.GNU_FORMAT) -> Path:
    """Any files by their name in the archive, in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_bytes(files, layout))
    return path


def tar_bytes(files: Mapping[str, bytes], layout: int = tarfile.GNU_FORMAT) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w', format=layout) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def write_ilsvrc(root: Path, splits: dict[str, Pictures]) -> Path:
    """``ILSVRC2012_img_train.tar`` of one tar a class, and ``ILSVRC2012_img_val.tar``."""
    by_class = {
        name: tar_bytes({n.partition('/')[2]: c for n, c in _shuffled(splits['train']) if n.startswith(name)})
        for name in reversed(CLASSES)
    }
    write_tar(root / 'ILSVRC2012_img_train.tar', {f'{name}.tar': content for name, content in by_class.items()})
    if 'val' in splits:
        flat = {name.rpartition('/')[2]: content for name, content in _shuffled(splits['val'])}
        write_tar(root / 'ILSVRC2012_img_val.tar', flat)
    return root


def write_ground_truths(root: Path, val: Pictures) -> dict[str, Path]:
    """The forms of ground truth: ``devkit`` (tar.gz), ``devkit folder``, ``kaggle``, ``synsets``, ``numbers``."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [name.split('/')[::-1] for name in sorted(val, key=lambda name: name.rpartition('/')[2])]
    fields = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('words', 'O'), ('num_children', 'O')]
    everything = {**ILSVRC_IDS, 'n00001740': 4}  # the real table also holds the classes above
    synsets = np.array([[(number, name, 'a thing', 0)] for name, number in everything.items()], dtype=fields)
    stream = io.BytesIO()
    savemat(stream, {'synsets': synsets})
    ids = ''.join(f'{ILSVRC_IDS[synset]}\n' for _, synset in rows).encode()
    folder = 'ILSVRC2012_devkit_t12/data'
    files = {f'{folder}/meta.mat': stream.getvalue(), f'{folder}/ILSVRC2012_validation_ground_truth.txt': ids}
    write_tree(root, files)
    with tarfile.open(root / 'ILSVRC2012_devkit_t12.tar.gz', 'w:gz') as archive:
        archive.add(root / 'ILSVRC2012_devkit_t12', 'ILSVRC2012_devkit_t12')
    lines = [f'{file.removesuffix(".JPEG")},{synset} 85 1 499 272 {synset} 1 2 3 4 \n' for file, synset in rows]
    texts = {
        'LOC_val_solution.csv': 'ImageId,PredictionString\n' + ''.join(reversed(lines)),
        'synsets.txt': ''.join(f'{file} {synset}\n' for file, synset in rows),
        'numbers.txt': ''.join(f'{file.removesuffix(".JPEG")} {CLASSES.index(synset)}\n' for file, synset in rows),
    }
    write_tree(root, {name: text.encode() for name, text in texts.items()})
    return {
        'devkit': root / 'ILSVRC2012_devkit_t12.tar.gz',
        'devkit folder': root / 'ILSVRC2012_devkit_t12',
        'kaggle': root / 'LOC_val_solution.csv',
        'synsets': root / 'synsets.txt',
        'numbers': root / 'numbers.txt',
    }


def write_class_names(path: Path) -> Path:
    """What gives webdataset's numbers their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(''.join(f'{name}\n' for name in CLASSES))
    return path


def write_webdataset(
    root: Path,
    splits: dict[str, Pictures],
    *,
    labels: str | None = 'cls',
    tars: int = 2,
    name: str = 'in1k-{split}-{number:04d}.tar',
) -> Path:
    """Keys are the file names; labels in ``.cls``, beside facts of another kind, in ``.json``, or nowhere."""
    for split, images in splits.items():
        for number in range(tars):
            files = {}
            for path, content in _shuffled(images)[number::tars]:
                folder, _, file = path.partition('/')
                files[file] = content
                key, label = file.partition('.')[0], CLASSES.index(folder)
                if labels == 'cls':
                    files |= {f'{key}.cls': str(label).encode(), f'{key}.json': b'{"width": 3}'}
                elif labels == 'json':
                    files[f'{key}.json'] = json.dumps({'label': label, 'width': 3}).encode()
            write_tar(root / name.format(split={'val': 'validation'}.get(split, split), number=number), files)
    return root


def write_parquet(
    root: Path,
    splits: dict[str, Pictures],
    *,
    labels: bool = True,
    names: bool = True,
    paths: bool = True,
    files: int = 2,
) -> Path:
    """As Hugging Face's library writes them: a struct of bytes and path, and class names in the schema's metadata."""
    root.mkdir(parents=True, exist_ok=True)
    image = pyarrow.struct([('bytes', pyarrow.binary()), ('path', pyarrow.string())])
    schema = pyarrow.schema([('image', image), *([('label', pyarrow.int64())] if labels else [])])
    features: dict[str, Any] = {'image': {'_type': 'Image'}}
    if labels:
        features['label'] = (
            {'names': list(CLASSES), '_type': 'ClassLabel'} if names else {'dtype': 'int64', '_type': 'Value'}
        )
    schema = schema.with_metadata({'huggingface': json.dumps({'info': {'features': features}})})
    for split, images in splits.items():
        rows = [
            {
                'image': {'bytes': content, 'path': path.rpartition('/')[2] if paths else None},
                'label': CLASSES.index(path.partition('/')[0]),
            }
            for path, content in _shuffled(images)
        ]
        stem = {'val': 'validation'}.get(split, split)
        for number in range(files):
            table = pyarrow.Table.from_pylist(rows[number::files], schema=schema)
            path = root / f'{stem}-{number:05d}-of-{files:05d}.parquet'
            pyarrow.parquet.write_table(table, path, row_group_size=3)
    return root
