"""The same few real images in every layout in which ImageNet is found."""

import functools
import hashlib
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

from tread_composer.conversion.sources.source import Source

CLASSES = ('n01440764', 'n02105855', 'n03995372')
ILSVRC_IDS = {'n02105855': 1, 'n03995372': 2, 'n01440764': 3}  # not the sorted order, as in the real devkit

Pictures = dict[str, bytes]
"""Image files by canonical name, ``<class>/<file>``."""


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Two, of 640 x 427 pixels."""
    return tuple(Image.fromarray(image) for image in load_sample_images().images)


def picture(seed: int) -> Image.Image:
    """A piece of a photograph, or a digit; size and mode depend on the seed."""
    draw = random.Random(seed)
    if seed % 7 == 6:
        digit = np.asarray(_digits()[seed % 1797] * 15, dtype=np.uint8)
        return Image.fromarray(digit).resize((48, 40), Image.Resampling.BICUBIC)
    photograph = photographs()[seed % 2]
    width, height = draw.randrange(40, 150), draw.randrange(40, 150)
    left, top = draw.randrange(photograph.width - width), draw.randrange(photograph.height - height)
    piece = photograph.crop((left, top, left + width, top + height))
    return piece.convert({3: 'L', 5: 'CMYK'}.get(seed % 7, 'RGB'))


@functools.cache
def _digits() -> np.ndarray:
    return np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)


def encoded(image: Image.Image, kind: str = 'PNG', **options: object) -> bytes:
    stream = io.BytesIO()
    image.copy().save(stream, kind, **options)  # an image remembers how it was saved last
    return stream.getvalue()


def pictures(train_per_class: int = 4, val_per_class: int = 2) -> dict[str, Pictures]:
    """Train and val under ImageNet's own names. One train image is a PNG that is called JPEG, as in ImageNet."""
    train = {
        f'{name}/{name}_{number * 37 + 5}.JPEG': encoded(picture(100 * label + number), 'JPEG', quality=90)
        for label, name in enumerate(CLASSES)
        for number in range(train_per_class)
    }
    train['n02105855/n02105855_2933.JPEG'] = encoded(picture(500))
    numbers = list(range(1, len(CLASSES) * val_per_class + 1))
    random.Random(0).shuffle(numbers)  # the validation images are not sorted by class
    val = {
        f'{CLASSES[position % 3]}/ILSVRC2012_val_{number:08d}.JPEG': encoded(picture(1000 + number), 'JPEG', quality=90)
        for position, number in enumerate(numbers)
    }
    return {'train': train, 'val': val}


def read_everything(sources: list[Source]) -> list[str]:
    """Hashes of all samples. Here, since a spawned process that calls it imports the whole module."""
    return [hashlib.sha256(source.read(p)).hexdigest() for source in sources for p in range(len(source))]


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


def write_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Any files by their name in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, content in _shuffled(dict(files)):
            archive.writestr(name, content)
    return path


def tiny_imagenet(splits: dict[str, Pictures]) -> dict[str, bytes]:
    """As Tiny-ImageNet lies in its zip: images inside of classes, a table for val, a test split without labels."""
    files = {'words.txt': b'', 'test/images/test_0.JPEG': b''}
    for name, content in splits['train'].items():
        folder, file = name.split('/')
        files |= {f'train/{folder}/images/{file}': content, f'train/{folder}/{folder}_boxes.txt': b''}
    rows = [name.split('/') for name in splits['val']]
    files |= {f'val/images/{file}': splits['val'][f'{folder}/{file}'] for folder, file in rows}
    files['val/val_annotations.txt'] = ''.join(f'{file}\t{folder}\t0\t0\t9\t9\n' for folder, file in rows).encode()
    return {f'tiny-imagenet-200/{name}': content for name, content in files.items()}


def write_img2dataset(root: Path, images: Pictures, labels: bool = False) -> Path:
    """Folders of images with captions; a table of all addresses, one of which failed, and what came of them."""
    for bucket, folder in enumerate(('00000', '00001')):
        rows = list(images.items())[bucket::2]
        keys = [f'{folder}{row:04d}' for row in range(len(rows))]
        for key, (_, content) in zip(keys, rows, strict=True):
            write_tree(root / folder, {f'{key}.jpg': content, f'{key}.txt': b'a cat', f'{key}.json': b'{}'})
        columns: dict[str, list] = {'key': [*keys, f'{folder}9999'], 'url': ['x'] * (len(keys) + 1)}
        if labels:
            columns['label'] = [*(CLASSES.index(name.partition('/')[0]) for name, _ in rows), None]
        pyarrow.parquet.write_table(pyarrow.table(columns), root / f'{folder}.parquet')
        (root / f'{folder}_stats.json').write_text('{}')
    return root


def python_2_pickle(value: Any) -> bytes:
    """As Python 2 wrote texts, lists, dicts and arrays of bytes: protocol 2, its texts being bytes today."""

    def opcodes(value: Any) -> bytes:
        if isinstance(value, dict):
            return b'}(' + b''.join(opcodes(item) for pair in value.items() for item in pair) + b'u'
        if isinstance(value, list):
            return b'](' + b''.join(map(opcodes, value)) + b'e'
        if isinstance(value, int):
            return b'J' + value.to_bytes(4, 'little', signed=True)
        if isinstance(value, bytes):
            return b'T' + len(value).to_bytes(4, 'little') + value
        rows, columns = (opcodes(size) for size in value.shape)
        kind = b'cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb'
        array = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR'
        return array + b'(K\x01' + rows + columns + b'\x86' + kind + b'\x89' + opcodes(value.tobytes()) + b'tb'

    return b'\x80\x02' + opcodes(value) + b'.'


def write_cifar(root: Path, pixels: np.ndarray, fine: bool = False) -> Path:
    """The Python files of CIFAR-10, or of CIFAR-100; ``pixels`` are uint8 ``[N, 3, 32, 32]``, a tenth for testing."""
    rows = pixels.reshape(len(pixels), -1)
    names = ['train'] * 1 if fine else [f'data_batch_{number}' for number in range(1, 6)]
    parts = zip([*names, 'test' if fine else 'test_batch'], [*np.split(rows[:-6], len(names)), rows[-6:]], strict=True)
    contents = {}
    for name, data in parts:
        labels = [row % 3 for row in range(len(data))]
        kinds: dict[bytes, Any] = {b'fine_labels': labels, b'coarse_labels': [label // 2 for label in labels]}
        contents[name] = python_2_pickle({b'data': data, **(kinds if fine else {b'labels': labels})})
    classes: dict[bytes, Any] = {b'label_names': [b'cat', b'dog', b'frog']}
    if fine:
        classes = {b'fine_label_names': [b'cat', b'dog', b'frog'], b'coarse_label_names': [b'pet', b'wild']}
    contents['meta' if fine else 'batches.meta'] = python_2_pickle(classes)
    return write_tree(root / ('cifar-100-python' if fine else 'cifar-10-batches-py'), contents).parent


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
    arrow: bool = False,
) -> Path:
    """As Hugging Face's library writes them: a struct of bytes and path, and class names in the schema's metadata.

    ``arrow``: as its ``save_to_disk`` does, with what ``map`` leaves beside.
    """
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
            if not arrow:
                pyarrow.parquet.write_table(table, path, row_group_size=3)
                continue
            (root / stem).mkdir(exist_ok=True)
            for name in (f'data-{number:05d}-of-{files:05d}', f'cache-{number}'):
                with pyarrow.ipc.new_stream(root / stem / f'{name}.arrow', schema) as stream:
                    stream.write_table(table, max_chunksize=3)
        if arrow:
            listed = [{'filename': f'data-{number:05d}-of-{files:05d}.arrow'} for number in range(files)]
            (root / stem / 'state.json').write_text(json.dumps({'_data_files': listed}))
            (root / 'dataset_dict.json').write_text(json.dumps({'splits': ['train', 'validation', 'extra']}))
    return root
