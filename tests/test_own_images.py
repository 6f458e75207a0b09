"""docs/own_images.md as its reader walks it: each of its commands, in order, on a few dozen small pictures.

Left out are the two that fetch and use Inception's weights. A network that is small enough for a test stands in for the
recipe's, with few steps of sampling, and a random autoencoder for the published one; every other word is the page's.
"""

import re
import shlex
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conversion.worlds import make_vae, manifest
from tests.runs import ROOT, launch, launch_here
from tread_composer.config import restore_config

PAGE = (ROOT / 'docs' / 'own_images.md').read_text()
SMALL = (
    'precision=fp32', 'max_duration=3ba', 'global_train_batch_size=16', 'global_eval_batch_size=8',
    'device_train_microbatch_size=8', 'model.hidden_size=32', 'model.depth=6', 'model.num_heads=2',
    'callbacks.sample_grid.num_steps=2', 'scheduler.t_warmup=1ba',
)  # fmt: skip
QUICKLY = {'plan': SMALL, 'sample': ('--steps', '2')}
NEEDS_WEIGHTS = ('prefetch', 'evaluate')


def commands() -> list[list[str]]:
    blocks = re.findall(r'^```\n(.*?)^```', PAGE, re.DOTALL | re.MULTILINE)
    text = '\n'.join(blocks).replace('stabilityai/sd-vae-ft-ema', 'vae').replace('resolution 256', 'resolution 32')
    return [shlex.split(line) for line in text.splitlines() if line.startswith(('python', 'composer'))]


def paint(folder, count: int) -> None:
    random = np.random.default_rng(count)
    folder.mkdir(parents=True)
    for number in range(count):
        size = (66 + number % 5, 80, 3)
        noise = random.normal(120, 40, size).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(folder / f'{number:04d}.jpg')


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    """The folder after the walk, and what each command printed."""
    folder = tmp_path_factory.mktemp('own_images')
    paint(folder / 'photos' / 'cats', 60)
    paint(folder / 'photos' / 'dogs', 40)
    make_vae(folder / 'vae')
    (folder / 'yamls').symlink_to(ROOT / 'yamls')
    printed = {}
    for words in commands():
        program, *rest = words
        if program == 'composer':
            done = launch_here(folder, *rest[1:], *SMALL)
        elif rest[0] == '-m' and rest[2] in NEEDS_WEIGHTS:
            continue
        else:
            script = rest if rest[0] == '-m' else [str(ROOT / rest[0]), *rest[1:]]
            settings = next((more for verb, more in QUICKLY.items() if verb in rest), ())
            done = launch(folder, [sys.executable, *script, *settings])
        assert done.returncode == 0, f'{words}\n{done.stdout}{done.stderr}'
        printed[' '.join(words)] = done.stdout + done.stderr
    return folder, printed


def test_every_command_of_the_page_works_in_turn(walked):
    folder, printed = walked
    assert len(printed) == 7
    plan = next(text for words, text in printed.items() if ' plan ' in words)
    assert '3 x 64 x 64, 2 classes' in plan and 'without 50% of the tokens' in plan
    assert Image.open(folder / 'runs' / 'own_images' / 'samples' / 'latest.png').size[1] > 128
    assert Image.open(folder / 'samples' / 'grid.png').size[1] > 128
    assert len(list((folder / 'samples' / 'images').glob('*.png'))) == 64


def test_the_recipe_takes_everything_from_the_data(walked):
    folder, _ = walked
    for run, data, channels, side in (('own_images', 'photos', 3, 64), ('own_images256', 'photos256', 3, 16)):
        about = manifest(folder / 'data' / data / 'train')
        assert (about['channels'], about['latent_height'], about['num_classes']) == (channels, side, 2)
        config = restore_config(folder / 'runs' / run / 'config.yaml')
        # Each channel to mean 0 and standard deviation 1, in numbers that stay with the run.
        assert config.latent_scale == pytest.approx([1 / value for value in about['std']], rel=1e-4)
        assert config.latent_shift == pytest.approx(about['mean'], rel=1e-4)


def test_images_without_classes_take_the_same_recipe(tmp_path):
    paint(tmp_path / 'photos', 40)
    script = str(ROOT / 'streaming_data' / 'convert_imagenet.py')
    words = ['--source', 'photos', '--out', 'data/photos', '--pixels', '--resolution', '32', '--held-out', '8']
    done = launch(tmp_path, [sys.executable, script, *words])
    assert done.returncode == 0, done.stdout + done.stderr
    done = launch_here(tmp_path, ROOT / 'yamls' / 'own_images.yaml', *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / 'runs' / 'own_images' / 'samples' / 'latest.png').is_file()
