"""Data sets of independent conversions, joined: equal to one conversion of everything, or refused in words."""

import functools
import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conversion.small_sets import make_rows, write_split
from tests.conversion.worlds import digests, make_images, manifest, read, words
from tests.data.worlds import flip_last_byte
from tests.runs import ROOT, environment, needs_namespaces
from tests.warm import own_namespaces, start_program
from tread_composer.cli.convert import convert_main, merge_main, verify_main

CLASSES = ('ant', 'bee', 'cat', 'dog')


@pytest.fixture(scope='module')
def images(tmp_path_factory) -> list[Path]:
    """All images, and those of three machines: two classes of their own, and parts of the two others."""
    root = tmp_path_factory.mktemp('machines')
    everything = make_images(root / 'all', 40, classes=CLASSES)
    for number, path in enumerate(sorted(everything.glob('*/*'))):
        machine = 0 if path.parent.name in ('bee', 'dog') else 1 + number % 2
        place = root / str(machine) / path.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return [everything, *(root / str(machine) for machine in range(3))]


def data_of(split: Path) -> dict[str, object]:
    """Every file that is data or describes it, but for where the images come from."""
    files = {name: digest for name, digest in digests(split).items() if not name.endswith('part.json')}
    return {**files, 'manifest.json': {**manifest(split), 'source': ''}}


# Latents one by one: a convolution of other batches rounds otherwise.
@pytest.mark.parametrize(('encoder', 'batch_size'), [('pixels', 4), ('vae', 1)])
def test_merged_data_sets_are_one_conversion_of_everything(images, vae, tmp_path, encoder, batch_size, refused, capsys):
    network = vae if encoder == 'vae' else None
    whole, *parts = (tmp_path / f'{path.name}-out' for path in images)
    for path, out in zip(images, [whole, *parts], strict=True):
        assert convert_main(words(path, out, network, seed=3, batch_size=batch_size)) == 0
    arguments = [*map(str, reversed(parts)), '--out', str(tmp_path / 'out'), '--seed', '3', '--part-size', '10']
    capsys.readouterr()
    assert merge_main([*arguments, '--dry-run']) == 0 and not (tmp_path / 'out').exists()
    assert '--held-out' not in capsys.readouterr().out, 'no flag of this command'
    assert merge_main(arguments) == 0
    assert data_of(tmp_path / 'out' / 'train') == data_of(whole / 'train')
    assert verify_main([str(tmp_path / 'out')]) == 0
    capsys.readouterr()
    assert merge_main(arguments) == 0 and 'finished already' in capsys.readouterr().out
    # A data set that has become another one is not taken for the one of before.
    shutil.rmtree(parts[0])
    assert convert_main(words(images[1], parts[0], network, seed=4, batch_size=batch_size)) == 0
    refused(merge_main, arguments, 'indexes')


@needs_namespaces
def test_too_little_shared_memory_is_refused_with_a_flag_of_this_command(tmp_path):
    for machine in 'ab':
        write_split(tmp_path / machine / 'train', **named(machine))
    outputs = [tmp_path / 'stdout', tmp_path / 'stderr']
    before = functools.partial(own_namespaces, 'mount -t tmpfs -o size=4k tmpfs /dev/shm')
    words = ['streaming_data/merge.py', *(str(tmp_path / name) for name in 'ab'), '--out', str(tmp_path / 'out')]
    process = start_program([*words, '--workers', '1'], ROOT, environment(), outputs, before)
    process.join()
    text = outputs[1].read_text()
    assert process.exitcode == 2 and '/dev/shm has' in text and text.endswith('or lower --workers\n'), text


def named(machine: str, **facts: object) -> dict[str, object]:
    """A split whose samples have names that no other machine has."""
    rows = make_rows(samples=20)
    for row in rows:
        row['name'] = f'{machine}-{row["name"]}'
    return {'rows': rows, 'parts': 1, **facts}


@pytest.mark.parametrize(
    ('first', 'second', 'message'),
    [
        (named('a'), named('a'), 'is in {0}/train and in {1}/train: names tell samples apart'),
        (named('a'), named('b', autoencoder_hash='sha256:1'), "autoencoder_hash: 'sha256:0' in {0}, 'sha256:1' in {1}"),
        (named('a'), named('b', resolution=16), 'resolution: 8 in {0}, 16 in {1}'),
        (named('a'), named('b', class_names=(), num_classes=0), '{1}: has no classes'),
        (named('a', class_names=('b', 'a', 'd', 'c')), named('b'), '{0}: its classes are not in the order of their'),
        (named('a', class_names=('a', 'a', 'd', 'c')), named('b'), '{0}: several classes are called a'),
    ],
)
def test_data_sets_that_contradict_each_other_are_refused(tmp_path, refused, first, second, message):
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder, settings in zip(folders, (first, second), strict=True):
        write_split(folder / 'train', **settings)
    refused(merge_main, [*map(str, folders), '--out', str(tmp_path / 'out')], message.format(*folders))
    assert not (tmp_path / 'out').exists()


def test_an_order_of_classes_of_their_own_is_given_in_a_file(tmp_path, refused):
    folders = [tmp_path / 'first', tmp_path / 'second']
    write_split(folders[0] / 'train', **named('a', class_names=('zebra', 'ant', 'bee', 'cat')))
    write_split(folders[1] / 'train', **named('b', class_names=('dog', 'cat', 'eel', 'zebra')))
    names = tmp_path / 'names.txt'
    arguments = [*map(str, folders), '--out', str(tmp_path / 'out'), '--class-names', str(names)]
    names.write_text('zebra\nant\nbee\ncat\ndog\n')
    refused(merge_main, arguments, 'lacks 1 classes of the data sets: eel')
    names.write_text('zebra\nant\nbee\ncat\ndog\neel\n')
    assert merge_main(arguments) == 0
    rows = read(tmp_path / 'out' / 'train')
    label_of = dict(zip(rows['name'], rows['label'], strict=True))
    order = names.read_text().split()
    for machine, folder in zip('ab', folders, strict=True):
        before = read(folder / 'train')
        classes = manifest(folder / 'train')['class_names']
        for name, label in zip(before['name'], before['label'], strict=True):
            assert order[label_of[name]] == classes[label], (machine, name)


def test_a_damaged_or_unfinished_data_set_is_refused(tmp_path, refused):
    folders = [tmp_path / 'first', tmp_path / 'second']
    for folder, machine in zip(folders, 'ab', strict=True):
        write_split(folder / 'train', **named(machine))
    arguments = [*map(str, folders), '--out', str(tmp_path / 'out')]
    shard = next((folders[1] / 'train').rglob('*.mds'))
    flip_last_byte(shard)
    refused(merge_main, arguments, f'{shard}: its xxh64 is not the one of the index')
    flip_last_byte(shard)  # as it was
    (folders[1] / 'conversion.json').write_text(json.dumps({'content': {}, 'splits': {'train': {}, 'val': {}}}))
    refused(merge_main, arguments, f'{folders[1]}: val not finished')
    os.rename(folders[1] / 'train' / 'manifest.json', tmp_path / 'manifest.json')
    refused(merge_main, arguments, f'{folders[1]}: train, val not finished')
    arguments[1] = str(folders[0] / 'train')
    refused(
        merge_main, arguments, f'{folders[0]}/train: is one split; give the folder of the whole data set, {folders[0]}'
    )
    arguments[1] = str(tmp_path / 'nowhere')
    refused(merge_main, arguments, f'{tmp_path}/nowhere: no such folder')
    arguments[1] = 's3://bucket/set'
    refused(merge_main, arguments, 's3://bucket/set is a URL; copy that data set to this machine')
    arguments[1] = str(folders[0])
    refused(merge_main, arguments, 'give two data sets or more, each once')
    assert not (tmp_path / 'out').exists()
