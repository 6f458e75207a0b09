"""docs/own_images.md as its reader walks it: each of its commands, in order, on a few dozen small pictures.

Left out are the two that fetch and use Inception's weights. A network that is small enough for a test stands in for the
recipe's, with few steps of sampling, and a random autoencoder for the published one; every other word is the page's.
"""

import shlex

import pytest
from PIL import Image

from tests.conversion.worlds import make_images, make_vae, manifest
from tests.guides import commands, verb, walk
from tests.runs import ROOT
from tread_composer.config import restore_config

SMALL = (
    'precision=fp32', 'max_duration=3ba', 'global_train_batch_size=16', 'global_eval_batch_size=8',
    'device_train_microbatch_size=8', 'model.hidden_size=32', 'model.depth=6', 'model.num_heads=2',
    'callbacks.sample_grid.num_steps=2', 'scheduler.t_warmup=1ba',
)  # fmt: skip
MORE = {'plan': SMALL, 'train': SMALL, 'sample': ('--steps', '2')}
SMALLER = {
    'stabilityai/sd-vae-ft-ema': 'vae', '--resolution 256': '--resolution 32', '--held-out 64': '--held-out 16',
    '--count 64': '--count 8',
}  # fmt: skip
NEEDS_WEIGHTS = ('prefetch', 'evaluate')


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    """The folder after the walk, and what each command printed."""
    folder = tmp_path_factory.mktemp('own_images')
    make_images(folder / 'photos', 40, size=66, classes=('cats', 'dogs'))
    make_vae(folder / 'vae')
    (folder / 'yamls').symlink_to(ROOT / 'yamls')
    printed = {}
    for words in commands('own_images.md', SMALLER):
        if verb(words) not in NEEDS_WEIGHTS:
            printed[shlex.join(words)] = walk(folder, words, MORE.get(verb(words), ()))
    return folder, printed


def test_every_command_of_the_page_works_in_turn(walked):
    folder, printed = walked
    assert len(printed) == 7
    plan = next(text for words, text in printed.items() if ' plan ' in words)
    assert '3 x 64 x 64, 2 classes' in plan and 'without 50% of the tokens' in plan
    assert Image.open(folder / 'runs' / 'own_images' / 'samples' / 'latest.png').size[1] > 128
    assert Image.open(folder / 'samples' / 'grid.png').size[1] > 128
    assert len(list((folder / 'samples' / 'images').glob('*.png'))) == 8


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
    make_images(tmp_path / 'photos', 40, classes=())
    words = ('--source', 'photos', '--out', 'data/photos', '--pixels', '--resolution', '32', '--held-out', '8')
    walk(tmp_path, ('python', 'convert_imagenet.py', *words))
    walk(tmp_path, ('python', 'train.py', str(ROOT / 'yamls' / 'own_images.yaml'), *SMALL))
    assert (tmp_path / 'runs' / 'own_images' / 'samples' / 'latest.png').is_file()
