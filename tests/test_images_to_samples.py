"""The second door as a user walks through it: JPEGs, conversion, routed training, decoded samples."""

import re
import sys

import pytest
from PIL import Image

from tests.conversion.layouts import pictures, write_folders
from tests.conversion.worlds import SCRIPT, make_tiny, make_vae, manifest
from tests.runs import SMALL, YAMLS, checkpoint, launch, launch_here
from tread_composer.cli.convert import convert_main as convert

WORDS = (
    *SMALL,
    'data={name: latents, local: latents, num_workers: 0, kind: moments, mirror: true}',
    'autoencoder={name: kl, path: vae}',
    'global_train_batch_size=16',
    'global_eval_batch_size=8',
    'max_duration=3ba',
    'callbacks.sample_grid={interval: 100ba, samples_per_class: 2, num_steps: 2, sampler: euler}',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('door')
    write_folders(folder / 'images', pictures(train_per_class=16, val_per_class=4))
    make_vae(folder / 'vae')
    words = '--source images --out latents --autoencoder vae --resolution 16 --part-size 20'
    done = launch(folder, [sys.executable, SCRIPT, *words.split()])
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_they_train_with_a_route_and_learn_from_the_mirrors_too(folder):
    about = manifest(folder / 'latents' / 'train')
    assert (about['num_samples'], about['num_classes'], about['mirrored'], about['channels']) == (49, 3, True, 3)
    for name, mirror in (('mirrored', 'true'), ('plain', 'false')):
        own = (f'run_name={name}', f'data.mirror={mirror}')
        done = launch_here(folder, YAMLS / 'digits_tread.yaml', *WORDS, *own)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (folder / 'runs' / name / 'samples' / 'ba000003.png').stat().st_size > 1000
    weights, plain = (checkpoint(folder, name)['model'] for name in ('mirrored', 'plain'))
    assert not all(bool((plain[name] == weights[name]).all()) for name in plain)


def test_an_autoencoder_without_variance_trains_draws_and_decodes(folder, cli, monkeypatch):
    monkeypatch.chdir(folder)
    make_tiny(folder / 'tiny')
    words = '--source images --out tiny_latents --autoencoder tiny --resolution 16 --workers 0'
    assert convert(words.split()) == 0
    own = (
        'run_name=tiny', 'autoencoder={name: pretrained, path: tiny}', 'latent_scale=auto',
        'data={name: latents, local: tiny_latents, num_workers: 0, kind: samples}', 'max_duration=2ba',
    )  # fmt: skip
    done = launch_here(folder, YAMLS / 'digits_tread.yaml', *WORDS, *own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'std 1.000 for the network' in done.stdout + done.stderr
    saved = (folder / 'runs' / 'tiny' / 'config.yaml').read_text()
    assert 'auto' not in re.findall(r'latent_scale:\s*(\S+)', saved)[0]  # the numbers
    assert (folder / 'runs' / 'tiny' / 'samples' / 'ba000002.png').stat().st_size > 1000
    words = ['sample', 'runs/tiny', '--out', 'drawn', '--count', '3', '--steps', '2', '--format', 'png']
    cli(*words)
    images = [Image.open(path) for path in sorted((folder / 'drawn').rglob('*.png')) if path.parent.name != 'drawn']
    assert [image.size for image in images] == [(16, 16)] * 3
    # Another autoencoder of the same shapes does not decode what this one has made.
    make_tiny(folder / 'tiny', seed=1)
    assert 'not those that made the latents' in cli.refusal(*words, '--out', 'again')
