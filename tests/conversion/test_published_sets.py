"""Data sets in the form in which their authors publish them, or in which one program writes them."""

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conversion import layouts
from tests.conversion.layouts import write_tree, write_zip
from tread_composer.conversion.squares import read_image

EDM_FILES = {f'0000{number // 2}/img{number}.png': bytes([number]) for number in range(5)}
EDM_LABELS = dict(zip(EDM_FILES, [2, 0, 1, 1, 2], strict=True))


def _edm(kind: str, root: Path, labels: Any, prefix: str = '') -> Path:
    content = labels if isinstance(labels, bytes) else json.dumps({'labels': labels}).encode()
    files = {f'{prefix}{name}': content for name, content in {**EDM_FILES, 'dataset.json': content}.items()}
    return write_tree(root / 'in', files) if kind == 'folder' else write_zip(root / 'in.zip', files)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('prefix', ['', 'train/'])
def test_labels_of_edm_are_those_of_its_file_and_not_its_numbered_folders(kind, prefix, tmp_path, opened):
    source = opened(_edm(kind, tmp_path, list(EDM_LABELS.items()), prefix))['train']
    assert source.class_names == ('0', '1', '2')
    found = {source.names[place]: (source.labels[place], source.read(place)) for place in range(5)}
    assert found == {f'{label}/{name}': (label, EDM_FILES[name]) for name, label in EDM_LABELS.items()}


def test_an_edm_data_set_without_labels_has_no_classes(tmp_path, opened):
    source = opened(_edm('zip', tmp_path, None))['train']
    assert source.class_names == () and list(source.names) == list(EDM_FILES)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        (b'{}', 'not the labels of an EDM data set'),
        (b'no json', 'not the labels of an EDM data set'),
        (json.dumps({'labels': EDM_LABELS}).encode(), 'not the labels of an EDM data set: .* no list of pairs'),
        ([*EDM_LABELS.items(), (7, 1)], 'not the labels of an EDM data set: .* no list of pairs'),
        (list(EDM_LABELS.items())[1:], r'has no label for: 00000/img0\.png \(1 in all\)'),
        ([*EDM_LABELS.items(), ('00009/x.png', 1)], r'images that are missing: 00009/x\.png'),
        ([*EDM_LABELS.items(), ('00000/img0.png', 2)], 'lists more than once: 00000/img0'),
        (
            [*list(EDM_LABELS.items())[1:], ('00000/img0.png', [1.0, 0.0])],
            r'the label is no whole number of: 00000/img0\.png \(1 in all\)',
        ),
        ([(name, label + 1) for name, label in EDM_LABELS.items()], 'no training image, such as 0'),
    ],
)
def test_labels_of_edm_that_are_damaged_or_incomplete_are_refused(kind, labels, message, tmp_path, opened):
    opened.refuses(message, _edm(kind, tmp_path, labels))


def test_tables_of_tiny_imagenet_that_do_not_fit_are_refused(tmp_path, splits, opened):
    place = 'tiny-imagenet-200/val/val_annotations.txt'
    files = layouts.tiny_imagenet(splits)
    rows = files[place].splitlines(keepends=True)
    for number, (table, message) in enumerate(
        [
            (b''.join(rows[1:]), r'has no label for: ILSVRC2012_val_\d+\.JPEG \(1 in all\)'),
            (b''.join([*rows, b'val_9.JPEG\tn01440764\n']), r'images that are missing: val_9\.JPEG'),
            (b''.join([*rows, rows[0]]), 'lists more than once'),
            (b'val_0.JPEG n01440764', 'not the table of Tiny-ImageNet'),
        ]
    ):
        opened.refuses(message, write_tree(tmp_path / str(number), {**files, place: table}))


def test_numbered_folders_of_img2dataset_are_no_classes(tmp_path, splits, opened):
    images = splits['train']
    source = opened(layouts.write_img2dataset(tmp_path / 'plain', images))['train']
    assert source.class_names == () and source.description.startswith('img2dataset folders at ')
    assert sorted(source.read(position) for position in range(len(source))) == sorted(images.values())
    assert source.names[0] == '00000/000000000.jpg'
    root = layouts.write_img2dataset(tmp_path / 'labelled', images, labels=True)
    source = opened(root, class_names=layouts.write_class_names(tmp_path / 'names.txt'))['train']
    read = [(source.class_names[source.labels[row]], source.read(row)) for row in range(len(source))]
    assert sorted(read) == sorted((name.partition('/')[0], content) for name, content in images.items())
    (root / '00001' / '000019998.jpg').write_bytes(b'x')
    opened.refuses('1 images have no label in the tables', root)
    half = layouts.write_img2dataset(tmp_path / 'half', images)
    (half / '00001.parquet').unlink()
    (half / '00001_stats.json').rename(half / '00002_stats.json')
    opened.refuses('00001, 00002 without its folder, or without the NNNNN_stats.json', half)
    tars = layouts.write_webdataset(tmp_path / 'tars', {'train': images}, labels=None, name='{number:05d}.tar')
    for file in (tmp_path / 'plain').iterdir():  # the tables of the tars, which look alike
        if file.is_file():
            file.rename(tars / file.name)
    assert opened(tars)['train'].description.startswith('webdataset tars at ')


@pytest.mark.parametrize('fine', [False, True])
def test_the_python_files_of_cifar_are_read_in_place(fine, tmp_path, opened):
    pixels = np.random.default_rng(0).integers(0, 256, (46, 3, 32, 32), np.uint8)
    root = layouts.write_cifar(tmp_path, pixels, fine)
    (root / 'cifar-10-python.tar.gz').write_bytes(b'as torchvision leaves it')
    sources = opened(root)
    assert {split: len(source) for split, source in sources.items()} == {'train': 40, 'val': 6}
    wanted = {'train': list(pixels[:40]), 'val': list(pixels[40:])}
    for split, source in sources.items():
        assert source.class_names == ('cat', 'dog', 'frog')
        for position, name in enumerate(source.names):
            batch, row = re.fullmatch(r'\w+/(?:data_batch_(\d)|train|test|test_batch)-(\d+)', name).groups()
            pixels_of = wanted[split][8 * (int(batch or 1) - 1) + int(row)]
            np.testing.assert_array_equal(read_image(source.read(position), 32).values, pixels_of)
            assert source.labels[position] == int(row) % 3
    if fine:
        assert opened(root, label_column='coarse_labels')['train'].class_names == ('pet', 'wild')
        opened.refuses(r"has no 'labels', only \[.*'fine_labels'", root, label_column='labels')
    (meta,) = root.glob('cifar-*/*meta')
    meta.write_bytes(pickle.dumps({f'{"fine_" * fine}label_names'.encode(): ['cat', 'dog', 'frog']}))
    opened.refuses('meta: not the names of classes as the published files have them', root)


def test_a_pickle_of_cifar_that_would_run_something_is_refused(tmp_path, opened):
    root = layouts.write_cifar(tmp_path, np.zeros((46, 3, 32, 32), np.uint8))
    (root / 'cifar-10-batches-py' / 'data_batch_3').write_bytes(b'cposix\nsystem\n(U\x04exittR.')
    opened.refuses(r'data_batch_3: cannot be read: it names posix\.system', root)
    (root / 'cifar-10-batches-py' / 'data_batch_3').write_bytes(pickle.dumps({'data': None, 'labels': []}))
    opened.refuses('data_batch_3: not a file of CIFAR', root)  # written by Python 3: keys that are texts
    (root / 'cifar-10-batches-py' / 'data_batch_3').unlink()
    opened.refuses(r'data_batch_3: cannot be read: .*No such file', root)
