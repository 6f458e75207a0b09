"""Moments of a (tiny, random) AutoencoderKL: the example of streaming_data/README.md, then training on its output."""

import json
import re
import shutil

import pytest
import torch

from tests.conversion.worlds import make_vae
from tests.runs import ROOT, SMALL, checkpoint, launch_here
from tests.warm import inside
from tread_composer.cli.convert import verify_main as verify


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


def run(folder, *overrides):
    return launch_here(folder, ROOT / 'yamls' / 'digits_tread.yaml', *WORDS, *overrides)


def test_what_the_example_writes_has_no_fault(folder, capsys):
    assert verify([str(folder / 'data' / 'mine')]) == 0, capsys.readouterr().out


def test_moments_train_with_a_route_and_decode(folder):
    done = run(folder, 'max_duration=6ba', 'device_train_microbatch_size=4')
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / 'runs' / 'digits_tread' / 'samples' / 'ba000006.png').exists()
    again = run(folder, 'max_duration=6ba', 'run_name=again', 'save_folder=runs/again')
    assert again.returncode == 0, again.stdout + again.stderr
    weights = [checkpoint(folder, name)['model'] for name in ('digits_tread', 'again')]
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
    done = run(folder, override, 'run_name=wrong', 'save_folder=runs/wrong')
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
    done = run(folder, local, 'run_name=wrong', 'save_folder=runs/wrong')
    assert done.returncode == 2 and re.search(r"class_names: train has \['.*'\] as class 0, val has", done.stderr)
    assert not (folder / 'runs' / 'wrong').exists()


def test_a_label_that_is_no_class_ends_the_run_in_words(folder, tmp_path):
    """It would be the null label: a class that is trained as none."""
    fewer = {
        'num_classes': lambda manifest: manifest['num_classes'] - 1,
        'class_names': lambda manifest: manifest['class_names'][:-1],
    }
    local = rewritten(folder, tmp_path, ['train', 'val'], **fewer)
    done = run(folder, local, 'run_name=label', 'save_folder=runs/label', 'max_duration=6ba')
    assert done.returncode == 2 and 'Traceback' not in done.stderr, done.stderr
    assert re.search(r'sample \d+ .* has the label (\d+), and manifest.json says num_classes=\1 ', done.stderr)


def test_a_missing_shard_is_refused_before_the_first_step(folder):
    shard = folder / 'data' / 'mine' / 'train' / 'shard.00000.mds'
    hidden = shard.rename(shard.with_suffix('.hidden'))
    try:
        done = run(folder, 'run_name=lost', 'save_folder=runs/lost')
    finally:
        hidden.rename(shard)
    assert done.returncode == 2 and 'shard.00000.mds' in done.stderr and not (folder / 'runs' / 'lost').exists()


def test_a_remote_is_enough(folder, tmp_path):
    remote = folder / 'data' / 'mine'
    (tmp_path / 'path').symlink_to(folder / 'path')
    done = run(tmp_path, f'data.remote={remote}', 'data.local=cache', 'data.validate_hash=xxh64', 'max_duration=3ba')
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / 'cache' / 'train').iterdir()} >= {'manifest.json', 'shard.00000.mds'}
    wrong = run(tmp_path, f'data.remote={remote}', 'data.local=other', 'data.validate_hash=sha1', 'run_name=b')
    # The setting reaches the reader: the index knows no sha1, so the fetched shards cannot be checked.
    assert wrong.returncode != 0 and 'Hash algorithm `sha1`' in wrong.stderr, wrong.stdout + wrong.stderr
