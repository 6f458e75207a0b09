"""docs/imagenet.md as its reader walks it: each command, in order, on a handful of photographs in ImageNet's tars.

Left out is the one that fetches Inception's weights; a network of a few averages stands in for Inception, and a random
autoencoder for the published one. Eight ranks are one here.
"""

import io
import json
import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from tests.conversion.layouts import pictures, write_ground_truths, write_ilsvrc
from tests.conversion.worlds import make_vae
from tests.guides import code_blocks, commands, shrunk, verb, walk
from tests.runs import ROOT

PAGE = 'imagenet.md'
STANDIN = 'tests.test_imagenet_guide:Averages'
# What the page says -> what a test can do. Each must be on the page.
SMALL = {
    '/data/imagenet': 'imagenet',
    'stabilityai/sd-vae-ft-ema': 'vae',
    '--resolution 256': '--resolution 16',
    'interval: 10000ba': 'interval: 1ba',
    'max_duration=100000ba': 'max_duration=3ba',
    '--count 50000': '--count 12',
    '--steps 40': '--steps 2',
    '--guidance-scale 1.25 1.5 2': '--guidance-scale 1.25 2',
}
CALLBACK = {
    'interval: 50000ba': 'interval: 2ba',
    'num_samples: 10000': 'num_samples: 12',
    'num_steps: 40': f'num_steps: 2\n    features: {STANDIN}\n    batch_size: 12',
}
NETWORK = (
    'data.channels=3', 'data.latent_size=8', 'data.num_classes=3', 'data.num_workers=0', 'autoencoder.path=vae',
    'model={preset: null, patch_size: 2, hidden_size: 16, depth: 8, num_heads: 2}', 'precision=fp32',
    'global_train_batch_size=16', 'global_eval_batch_size=8', 'device_train_microbatch_size=2', 'save_interval=4ba',
    'callbacks.sample_grid={interval: 100ba, samples_per_class: 1, num_steps: 2, classes: [0, 2]}',
)  # fmt: skip
DRAWN = ('--features', STANDIN, '--batch-size', '12')
MORE = {
    'plan': NETWORK,
    'convert_imagenet': ('--part-size', '20', '--workers', '0'),
    'train': (*NETWORK, 'max_duration=8ba'),
    'evaluate': DRAWN,
    'sweep': (*DRAWN, '--count', '12'),
}


class Averages:
    """Stands in for Inception, under its name: means of the quarters of an image."""

    name, resolution, num_logits, spatial = 'inception', None, 3, True

    def identity(self) -> dict[str, str]:
        return {'name': self.name, 'weights_hash': 'none', 'version': '1'}

    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pooled = torch.nn.functional.adaptive_avg_pool2d(images_B3RR.float() / 255, 2)
        return pooled.flatten(1), pooled.mean((2, 3)), pooled[:, 0].flatten(1)


def write_reference(path, splits):
    """As ADM publishes them: images, and the statistics of the network's features."""
    paths = sorted(splits['train'])
    images = [Image.open(io.BytesIO(splits['train'][name])).convert('RGB').resize((16, 16)) for name in paths]
    arrays = np.stack([np.asarray(image) for image in images])
    pooled, _, spatial = Averages()(torch.from_numpy(arrays).permute(0, 3, 1, 2))
    moments = {}
    for ending, features in (('', pooled.double()), ('_s', spatial.double())):
        moments |= {f'mu{ending}': features.mean(0).numpy(), f'sigma{ending}': torch.cov(features.T).numpy()}
    np.savez(path, arr_0=arrays, **moments)


def more_words(words):
    """What a test adds to a command; each training follows its quality by the page's callback."""
    more = MORE.get(verb(words), ())
    if verb(words) == 'train':
        callbacks = yaml.safe_load(shrunk(code_blocks(PAGE, 'yaml')[0], CALLBACK))['callbacks']
        more = (*more, *(f'callbacks.{name}={json.dumps(settings)}' for name, settings in callbacks.items()))
    settings = {word.partition('=')[0] for word in words if '=' in word}
    return [word for word in more if word.partition('=')[0] not in settings]  # those of the page win


@pytest.fixture(scope='module')
def walked(tmp_path_factory):
    """The folder after the walk, and what each command printed, in order."""
    folder = tmp_path_factory.mktemp('imagenet')
    splits = pictures(train_per_class=9, val_per_class=3)
    write_ilsvrc(folder / 'imagenet', splits)
    write_ground_truths(folder / 'imagenet', splits['val'])
    write_reference(folder / 'VIRTUAL_imagenet256_labeled.npz', splits)
    make_vae(folder / 'vae')
    (folder / 'yamls').symlink_to(ROOT / 'yamls')
    printed = {}
    for words in commands(PAGE, SMALL):
        if verb(words) != 'prefetch':
            printed[shlex.join(words)] = walk(folder, words, more_words(words))
    return folder, printed


def test_every_command_of_the_page_works_in_turn(walked):
    folder, printed = walked
    assert len(printed) == 15
    for run in ('dit_xl', 'dit_xl_tread', 'dit_xl_tread_f'):
        assert json.loads((folder / 'runs' / run / 'results.json').read_text())
