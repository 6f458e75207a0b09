"""Each layout of the same images, converted: the same shards, byte for byte."""

import json

import pytest

from tests.conversion.layouts import pictures
from tests.conversion.test_sources import build
from tread_composer.cli.convert import convert_main as main

SPLITS = pictures(train_per_class=3, val_per_class=2)


def convert(folder, name):
    built = build(name, folder, SPLITS)
    words = ['--source', str(built.pop('path')), '--out', str(folder / 'out'), '--pixels', '--resolution', '16']
    for option, value in built.items():
        words += ['--' + option.replace('_', '-'), str(value)]
    assert main([*words, '--workers', '0', '--part-size', '4']) == 0
    return folder / 'out'


def shards(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob('*.mds'))}


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    return convert(tmp_path_factory.mktemp('folders'), 'folders')


@pytest.mark.parametrize('name', ['ILSVRC devkit', 'zip deflated, wrapped', 'webdataset', 'parquet'])
def test_the_same_images_give_the_same_shards(name, folders, tmp_path):
    out = convert(tmp_path, name)
    assert shards(out) == shards(folders) and len(shards(out)) == 5
    for split in ('train', 'val'):
        here, there = (json.loads((one / split / 'manifest.json').read_text()) for one in (out, folders))
        assert here.pop('source') != there.pop('source')  # it says where the images came from
        assert here == there
