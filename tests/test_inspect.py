"""``python -m tread_composer inspect`` on a trained run: what the network is shown, what it leaves, what it refuses."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from tests.helpers import tiny_model
from tests.runs import run
from tread_composer.advisor import token_similarity
from tread_composer.advisor.inspection import network_call
from tread_composer.config import restore_config
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.columns import LABEL, LATENTS, NAME, columns, stored_shape
from tread_composer.data.digits import digits_manifest, load_digits_arrays
from tread_composer.objectives import DDPM, EDM, FlowMatching
from tread_composer.run.plan import make_plan
from tread_composer.weights.trained import load_trained


@pytest.mark.parametrize(
    ('objective', 'time'), [(FlowMatching(), 0.3), (EDM(), 0.6), (DDPM(learned_variance=False), 0.25)]
)
def test_the_network_sees_what_training_would_show_it(objective, time):
    model = tiny_model()
    model.objective = objective
    x, labels = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(3)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
    seen = []
    model.denoiser.register_forward_pre_hook(lambda _, given: seen.append([one.clone() for one in given]))
    network_call(model, time, x, labels, noise)()
    normal = torch.special.ndtr
    odds = math.log(time / (1 - time))
    quantile = {
        FlowMatching: normal(torch.tensor(odds)),
        EDM: normal(torch.tensor((odds - EDM().P_mean) / EDM().P_std)),
        DDPM: torch.tensor(time),
    }[type(objective)]
    objective(model.denoiser, x, labels, noise, quantile.expand(3))
    for ours, training in zip(*seen, strict=True):
        torch.testing.assert_close(ours, training, atol=1e-5, rtol=1e-5)
    assert objective.noise_level(time) > 0


@pytest.fixture(scope='module')
def trained(routed):
    return routed.folder


@pytest.fixture
def inspect(cli):
    return lambda path, out, *words, code=0: cli('inspect', path, '--out', out, '--device', 'cpu', *words, code=code)


def numbers(folder) -> dict:
    return json.loads((folder / 'inspection.json').read_text())


def test_the_command_from_its_words_to_its_files(trained, tmp_path, inspect):
    text = inspect(trained, tmp_path / 'a', '--samples', '6', '--times', '0.5', '0.9').out
    found = numbers(tmp_path / 'a')
    assert sorted(path.name for path in (tmp_path / 'a').iterdir()) == ['inspection.json', 'similarity.png']
    with Image.open(tmp_path / 'a' / 'similarity.png') as picture:
        assert picture.width > picture.height > 300
    ids = [0, 49, 99, 148, 198, 247]  # six at equal distances among 297
    images, labels = (torch.from_numpy(part[ids]) for part in load_digits_arrays('eval'))
    noise = KeyedRandom(0, 0, ids).normal('noise', 1, 8, 8)
    denoiser = load_trained(trained).model.denoiser
    t = torch.full((6,), 0.5)
    by_hand = token_similarity(denoiser, [lambda: denoiser((images + noise) / 2, t, labels)])
    assert np.allclose(found['times'][0]['mean'], by_hand, atol=2e-6)
    assert not np.allclose(found['times'][1]['mean'], by_hand, atol=1e-3)
    both = [one['mean'] for one in found['times']]
    assert np.allclose(found['mean'], np.mean(both, axis=0), atol=2e-6)
    protocol = found['protocol']
    assert (protocol['times'], protocol['noise_levels']) == ([0.5, 0.9], [1.0, pytest.approx(9.0)])
    assert protocol['weights_digest'] == load_trained(trained).digest and protocol['data'].endswith('eval split')
    (route,) = found['routes']
    assert (route['start'], route['end']) == (2, 4) == tuple(found['proposal']['span'])
    assert route['ends'] == pytest.approx(found['mean'][2][5], abs=1e-6)
    assert route['outputs_mean'] == pytest.approx(np.mean(found['mean'][2][3:6]), abs=1e-6)
    (own,) = [one for one in found['candidates'] if (one['start'], one['end']) == (2, 4)]
    config = restore_config(trained / 'config.yaml')
    assert own['ideal_step_ratio'] == pytest.approx(make_plan(config, 1)['ideal_step_ratio'])
    assert own['lowest_over_times'] == pytest.approx(min(one[2][5] for one in both), abs=1e-6)
    assert [one['rank'] for one in found['candidates']][:5] == [1, 2, 3, 4, 5] and found['num_candidates'] == 6
    assert f'similarity {route["ends"]:.3f}' in text and 'proposed, the run' in text
    assert 'Tread(start=2, end=-4, selection_rate=0.5)' in text


def test_neither_batch_size_nor_the_way_to_the_same_data_change_the_numbers(trained, digits, tmp_path, inspect):
    words = ('--samples', '7', '--times', '0.4')
    inspect(trained, tmp_path / 'a', *words)
    inspect(trained, tmp_path / 'b', *words, '--batch-size', '3', '--data', digits)
    inspect(trained, tmp_path / 'c', *words, '--weights', 'raw', '--data', digits / 'eval')
    a, b, c = (np.array(numbers(tmp_path / name)['mean']) for name in 'abc')
    assert np.abs(a - b).max() < 2e-6 < np.abs(a - c).max()
    assert numbers(tmp_path / 'b')['protocol']['data'].startswith(str(digits / 'eval'))


def write_data(folder, **changes):
    """Twelve samples of noise with a manifest that says so."""
    given = digits_manifest('train').model_dump() | {'num_samples': 12, 'source': 'noise'} | changes
    manifest = type(digits_manifest('train'))(**given)
    encodings = columns(manifest.kind, manifest.latent_shape)
    random = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns=encodings, hashes=['xxh64']) as writer:
        for index in range(12):
            latents = random.standard_normal(stored_shape(manifest.kind, manifest.latent_shape)).astype(np.float16)
            writer.write({LATENTS: latents, LABEL: index % 10, NAME: f'{index}'})
    manifest.save(folder)
    return folder


MOMENTS = {'kind': 'moments', 'autoencoder': 'my-vae', 'autoencoder_hash': 'sha256:0'}


def test_moments_and_a_decoder_of_maskdit(tmp_path, inspect):
    """A run without a route on moments of its own folder, without an evaluation split."""
    (tmp_path / 'data').mkdir()
    write_data(tmp_path / 'mine' / 'train', **MOMENTS)
    folder = run(
        tmp_path,
        'digits_maskdit.yaml',
        'algorithms.maskdit={mask_ratio: 0.5, decoder_depth: 1, decoder_hidden_size: 16, decoder_num_heads: 2}',
        f'data={{name: latents, local: {tmp_path / "mine"}, eval_split: null, num_workers: 0}}',
        'autoencoder={name: kl, path: nowhere, id: my-vae}',
        'global_train_batch_size=4',
        'max_duration=1ba',
    ).folder
    for name, size in (('a', '4'), ('b', '3')):
        words = ('--samples', '4', '--times', '0.1', '--weights', 'raw', '--batch-size', size)
        text = inspect(folder, tmp_path / name, *words).out
    a, b = (np.array(numbers(tmp_path / name)['mean']) for name in 'ab')
    assert np.abs(a - b).max() < 2e-6 and a.min() < 0.999
    assert 'route of the run: none' in text
    assert 'a run without algorithms.maskdit, for TREAD cannot stand beside it' in text
    shutil.rmtree(tmp_path / 'mine')
    assert '--data FOLDER' in inspect(folder, tmp_path / 'c', '--samples', '4', code=2).err


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--times', '0.5', '1.5'], '--times: 1.5 must be'),
        (['--times', 'nan'], '--times: nan must be'),
        (['--times', '0.5', '0.5'], '--times: 0.5 is given twice'),
        (['--samples', '298'], '--count: 298 is not between 1 and 297, the samples of the eval split of the digits'),
        (['--batch-size', '0'], '--batch-size: 0 must be at least 1'),
        (['--data', '{}'], 'holds no manifest.json, nor does a split in it (eval, train, val)'),
        (['--data', '{}/large'], 'latent_size: the run expects (8, 8), the data have (4, 4)'),
        (['--data', '{}/moments'], "autoencoder: the run expects 'pixels', the data have 'my-vae'"),
        (['--data', '{}/classes'], 'num_classes: the run expects 10, the data have 2'),
    ],
)
def test_refused(trained, other_data, tmp_path, inspect, words, message):
    refused = inspect(trained, tmp_path / 'out', *(word.format(other_data) for word in words), code=2).err
    assert message in refused and not (tmp_path / 'out').exists()


@pytest.fixture(scope='module')
def other_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('other')
    write_data(folder / 'large', latent_height=4, latent_width=4)
    write_data(folder / 'moments', **MOMENTS)
    write_data(folder / 'classes', num_classes=2, class_names=('a', 'b'))
    return folder


def test_a_place_that_cannot_be_written(trained, inspect):
    refused = inspect(trained, '/dev/null/x', '--samples', '1', '--times', '0.5', code=2).err
    assert "--out: '/dev/null/x' cannot be written" in refused
