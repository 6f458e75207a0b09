"""Moments of a (tiny, random) AutoencoderKL: the example of streaming_data/README.md, then training on its output."""

import json
import re
import shutil

import pytest
import torch

from tests.conversion.worlds import make_vae
from tests.runs import ROOT, SMALL, YAMLS, checkpoint, launch_here
from tests.warm import inside
from tread_composer.builders.model import build_model
from tread_composer.cli.convert import verify_main as verify
from tread_composer.config import load_config
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import LatentFacts


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('latents')
    for seed, name in enumerate(('autoencoder', 'another')):
        make_vae(folder / 'path' / 'to' / name, seed=seed)
    (code,) = re.findall(r'```python\n(.*?)```', (ROOT / 'streaming_data' / 'README.md').read_text(), re.DOTALL)
    with inside(folder):
        exec(code, {})
    return folder


WORDS = (
    *SMALL,
    'data={name: latents, local: data/mine, num_workers: 0, kind: moments, channels: 3}',
    'autoencoder={name: kl, path: path/to/autoencoder, id: my-vae}',
    'global_train_batch_size=8',
    'callbacks.sample_grid={interval: 100ba, samples_per_class: 2, num_steps: 2, sampler: euler}',
)


def run(folder, name, *overrides):
    return launch_here(folder, YAMLS / 'digits_tread.yaml', *WORDS, f'run_name={name}', *overrides)


def test_what_the_example_writes_has_no_fault_trains_with_a_route_and_decodes(folder, capsys):
    assert verify([str(folder / 'data' / 'mine')]) == 0, capsys.readouterr().out
    for name, words in (('small', ['device_train_microbatch_size=4']), ('whole', [])):
        done = run(folder, name, 'max_duration=3ba', *words)
        assert done.returncode == 0, done.stdout + done.stderr
        assert (folder / 'runs' / name / 'samples' / 'ba000003.png').exists()
    weights = [checkpoint(folder, name)['model'] for name in ('small', 'whole')]
    for name in weights[0]:  # another microbatch size: the same posterior samples, sums in another order
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('data.channels=4', 'channels: the run expects 4, the data have 3'),
        ('data.kind=samples', "kind: the run expects 'samples', the data have 'moments'"),
        ('autoencoder.id=other', "autoencoder: the run expects 'other', the data have 'my-vae'"),
        ('autoencoder.path=path/to/another', 'its weights are not those that made the latents'),
        ('data.mirror=true', 'holds no mirrored latents'),
    ],
)
def test_data_that_contradict_the_configuration_are_refused(folder, override, message):
    done = run(folder, 'wrong', override)
    assert done.returncode == 2 and done.stderr.count(message) == 1, done.stdout + done.stderr
    assert 'Traceback' not in done.stderr and not (folder / 'runs' / 'wrong').exists()


def rewritten(folder, tmp_path, splits, **changes):
    """Data whose manifests say something else."""
    shutil.copytree(folder / 'data' / 'mine', tmp_path / 'mine')
    for split in splits:
        path = tmp_path / 'mine' / split / 'manifest.json'
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps(manifest | {key: change(manifest) for key, change in changes.items()}))
    return f'data.local={tmp_path}/mine'


def test_splits_that_mean_other_things_are_refused(folder, tmp_path):
    local = rewritten(folder, tmp_path, ['val'], class_names=lambda manifest: manifest['class_names'][::-1])
    done = run(folder, 'wrong', local)
    assert done.returncode == 2 and re.search(r"class_names: train has \['.*'\] as class 0, val has", done.stderr)
    assert not (folder / 'runs' / 'wrong').exists()


def test_a_label_that_is_no_class_ends_the_run_in_words(folder, tmp_path):
    """It would be the null label: a class that is trained as none."""
    names = {'class_names': lambda manifest: manifest['class_names'][:-1]}
    fewer = {'num_classes': lambda manifest: manifest['num_classes'] - 1, **names}
    done = run(folder, 'label', rewritten(folder, tmp_path, ['train', 'val'], **fewer), 'max_duration=6ba')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert re.search(r'sample \d+ .* has the label (\d+), and manifest.json says num_classes=\1 ', done.stderr)


def test_a_missing_shard_is_refused_before_the_first_step(folder):
    shard = folder / 'data' / 'mine' / 'train' / 'shard.00000.mds'
    hidden = shard.rename(shard.with_suffix('.hidden'))
    try:
        done = run(folder, 'lost')
    finally:
        hidden.rename(shard)
    assert done.returncode == 2 and 'shard.00000.mds' in done.stderr and not (folder / 'runs' / 'lost').exists()


def test_a_remote_is_enough(folder, tmp_path):
    remote = folder / 'data' / 'mine'
    (tmp_path / 'path').symlink_to(folder / 'path')
    done = run(
        tmp_path, 'a', f'data.remote={remote}', 'data.local=cache', 'data.validate_hash=xxh64', 'max_duration=3ba'
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / 'cache' / 'train').iterdir()} >= {'manifest.json', 'shard.00000.mds'}
    wrong = run(tmp_path, 'b', f'data.remote={remote}', 'data.local=other', 'data.validate_hash=sha1')
    # The setting reaches the reader: the index knows no sha1, so the fetched shards cannot be checked.
    assert wrong.returncode != 0 and 'Hash algorithm `sha1`' in wrong.stderr, wrong.stdout + wrong.stderr


def test_each_model_of_a_configuration_holds_its_weights_against_its_own_data(folder):
    vae = folder / 'path' / 'to' / 'autoencoder'
    words = [f'autoencoder={{name: kl, path: {vae}}}', 'data={name: latents, local: somewhere}', 'callbacks=null']
    config = load_config(YAMLS / 'digits.yaml', words)
    sizes = {'channels': 3, 'latent_height': 8, 'latent_width': 8, 'num_classes': 0, 'class_names': ()}
    sizes |= {'autoencoder': str(vae), 'mean': (0.0,) * 3, 'std': (1.0,) * 3}
    latents = torch.zeros(1, 3, 8, 8)
    assert build_model(config, LatentFacts(**sizes)).autoencoder.decode(latents).shape == (1, 3, 16, 16)
    second = build_model(config, LatentFacts(**sizes, autoencoder_hash='sha256:0'))
    with pytest.raises(UserError, match=r'not those that made the latents .*sha256:0'):
        second.autoencoder.decode(latents)
