"""The second door as a user walks through it: JPEGs, conversion, verification, routed training, decoded samples."""

import sys

import pytest

from tests.conversion.layouts import pictures, write_folders
from tests.conversion.worlds import make_vae, manifest
from tests.runs import ROOT, SMALL, checkpoint, launch, launch_here
from tread_composer.conversion.draw import main as inspect
from tread_composer.conversion.verify import main as verify

WORDS = (
    *SMALL,
    'data={name: latents, local: latents, num_workers: 0, kind: moments, mirror: true}',
    'autoencoder={name: kl, path: vae}',
    'global_train_batch_size=16',
    'global_eval_batch_size=8',
    'max_duration=6ba',
    'callbacks.sample_grid={interval: 100ba, samples_per_class: 2, num_steps: 2, sampler: euler}',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('door')
    write_folders(folder / 'images', pictures(train_per_class=16, val_per_class=4))
    make_vae(folder / 'vae')
    script = [sys.executable, str(ROOT / 'streaming_data' / 'convert_imagenet.py')]
    words = ['--source', 'images', '--out', 'latents', '--vae', 'vae', '--resolution', '16', '--part-size', '20']
    done = launch(folder, [*script, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_converted_images_have_no_fault_and_can_be_looked_at(folder, capsys):
    assert verify([str(folder / 'latents')]) == 0, capsys.readouterr().out
    words = ['--autoencoder', str(folder / 'vae'), '--count', '6', '--mirrored', '--out', str(folder / 'look.png')]
    assert inspect([str(folder / 'latents'), *words]) == 0
    assert (folder / 'look.png').stat().st_size > 1000


def test_they_train_with_a_route_from_disk_and_from_memory_alike(folder):
    about = manifest(folder / 'latents' / 'train')
    assert (about['num_samples'], about['num_classes'], about['mirrored'], about['channels']) == (49, 3, True, 3)
    weights = []
    for name, memory in (('disk', 'false'), ('memory', 'true')):
        own = (f'run_name={name}', f'save_folder=runs/{name}', f'data.in_memory={memory}')
        done = launch_here(folder, ROOT / 'yamls' / 'digits_tread.yaml', *WORDS, *own)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (folder / 'runs' / name / 'samples' / 'ba000006.png').stat().st_size > 1000
        weights.append(checkpoint(folder, name)['model'])
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])
    # without the mirrors the same run learns from other numbers
    own = ('run_name=plain', 'save_folder=runs/plain', 'data.mirror=false', 'callbacks.sample_grid=null')
    done = launch_here(folder, ROOT / 'yamls' / 'digits_tread.yaml', *WORDS, *own)
    assert done.returncode == 0, done.stdout + done.stderr
    plain = checkpoint(folder, 'plain')['model']
    assert not all(bool((plain[name] == weights[0][name]).all()) for name in plain)
