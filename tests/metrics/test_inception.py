"""torch-fidelity's own Inception, from a file in its format with weights of ours: there are no published ones here."""

import hashlib
import io
import pickle

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from tests.metrics.small import as_batch, extract, grey_images, random_images, write_folder
from tread_composer.core.errors import UserError
from tread_composer.metrics.features import open_extractor
from tread_composer.metrics.inception import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    InceptionFeatures,
    check_weights,
    describe_weights,
    find_weights,
    hub_path,
)
from tread_composer.metrics.metric import Comparison, build_metrics, measure
from tread_composer.metrics.references import open_reference


@pytest.fixture(autouse=True)
def no_weights_here(monkeypatch, tmp_path):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """A file of random weights, and its hash."""
    path = tmp_path_factory.mktemp('inception') / 'weights.pth'
    shapes = inception_shapes()
    generator = torch.Generator().manual_seed(0)

    def drawn(name, value):
        if value.dtype != torch.float32 or name.endswith('running_var'):
            return torch.ones_like(value)
        fan_in = value[0].numel() if value.dim() > 1 else 100
        return torch.randn(value.shape, generator=generator) * (2 / fan_in) ** 0.5

    torch.save({name: drawn(name, value) for name, value in shapes.items()}, path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def inception_shapes():
    """What torch-fidelity expects in the file, found out by giving it an empty one."""
    found = {}

    class Probe(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            found.update(self.state_dict())

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with torch.device('meta'):
        Probe('probe', ['2048'], empty)
    return {name: torch.empty(value.shape, dtype=value.dtype) for name, value in found.items()}


@pytest.fixture(scope='module')
def extractor(weights):
    path, sha256 = weights
    before = torch.get_rng_state().tolist()
    made = open_extractor('inception', inception=path, inception_sha256=sha256)
    assert torch.get_rng_state().tolist() == before
    return made


def test_the_whole_path_with_the_real_network(extractor, weights, tmp_path):
    images = random_images(12, 16)
    threads = torch.get_num_threads()
    samples = extract(as_batch(images).split(6), extractor)
    assert samples.features_ND.shape == (12, 2048)
    assert samples.logits_NK.shape == (12, 1008)
    assert samples.features_ND.std() > 0
    reference = open_reference(write_folder(tmp_path / 'same', images))
    reference.check(extractor, 16)
    found = reference.features(extractor, tmp_path / 'cache', batch_size=5)
    assert torch.allclose(found.features_ND, samples.features_ND, rtol=1e-4, atol=1e-5)
    figures = measure(build_metrics(['kid', 'is', 'prc'], {'kid_subset_size': 6}), samples, Comparison(features=found))
    values = {figure.quantity.name: figure.value for figure in figures}
    assert values['precision'] == values['recall'] == 1.0
    assert 1 <= values['inception_score'] < 12
    assert extractor.identity()['weights_hash'] == f'sha256:{weights[1]}'
    assert extractor.identity()['version'].startswith('torch-fidelity 0.4')
    assert torch.get_num_threads() == threads


def test_spatial_features_are_adms(weights, extractor):
    """Against the network walked by hand to `mixed_6/conv` of TensorFlow: convolution, norm, ReLU of 192 channels."""
    path, sha256 = weights
    images = as_batch(random_images(2, 16))
    with_places = open_extractor('inception', inception=path, inception_sha256=sha256, spatial=True)
    features, logits, spatial = with_places(images)
    plain_features, plain_logits = extractor(images)
    assert torch.equal(features, plain_features) and torch.equal(logits, plain_logits)
    network = FeatureExtractorInceptionV3('by_hand', ['2048'], str(path))
    blocks = ('Conv2d_1a_3x3', 'Conv2d_2a_3x3', 'Conv2d_2b_3x3', 'MaxPool_1', 'Conv2d_3b_1x1', 'Conv2d_4a_3x3',
              'MaxPool_2', 'Mixed_5b', 'Mixed_5c', 'Mixed_5d', 'Mixed_6a', 'Mixed_6b', 'Mixed_6c')  # fmt: skip
    with torch.no_grad():
        x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
        x = (x - 128) / 128
        for name in blocks:
            x = network.get_submodule(name)(x)
        branch = network.Mixed_6d.branch1x1
        x = branch.bn(branch.conv(x)).clamp(min=0)
    assert x.shape == (2, 192, 17, 17) and (x == 0).any()
    by_hand = [[float(x[i, channel, row, column]) for row in range(17) for column in range(17) for channel in range(7)]
               for i in range(2)]  # fmt: skip
    assert spatial.shape == (2, 2023) and spatial.std() > 0
    torch.testing.assert_close(spatial, torch.tensor(by_hand), rtol=1e-5, atol=1e-6)
    kept = extract(images.split(1), with_places).spatial_NS  # in the order of the images' digests
    assert sorted(kept.sum(1).tolist()) == pytest.approx(sorted(spatial.sum(1).tolist()), rel=1e-5)


def test_training_settings_do_not_reach_the_features(extractor):
    images = as_batch(random_images(1, 16))
    plain, _ = extractor(images)
    torch.set_float32_matmul_precision('medium')
    try:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            inside, _ = extractor(images)
        assert torch.get_float32_matmul_precision() == 'medium'
    finally:
        torch.set_float32_matmul_precision('highest')
    assert torch.equal(plain, inside)


def test_other_weights_than_the_published_ones_are_refused(weights):
    path, sha256 = weights
    with pytest.raises(UserError, match=f'has the hash {sha256}, expected {INCEPTION_SHA256}'):
        InceptionFeatures.open(path)
    with pytest.raises(UserError, match='expected 00'):
        check_weights(path, '00' * 32)
    assert check_weights(path, f'sha256:{sha256.upper()}') == path.read_bytes()


class Evil:
    def __reduce__(self):
        return eval, ('open("executed", "w").close()',)


def test_nothing_in_the_file_is_run_and_weights_of_another_network_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, saved = tmp_path / 'evil.pth', []
    for state in ({'weight': Evil()}, {'weight': torch.zeros(3)}):
        torch.save(state, path)
        saved.append(path.read_bytes())
    for content in (pickle.dumps(Evil()), b'not a file of torch', b'', *saved):
        path.write_bytes(content)
        with pytest.raises(UserError, match="no weights of torch-fidelity's Inception"):
            InceptionFeatures.open(path, inception_sha256=hashlib.sha256(content).hexdigest())
    assert not (tmp_path / 'executed').exists()


def test_where_the_weights_are_looked_for(tmp_path):
    with pytest.raises(UserError, match='are not here') as error:
        find_weights()
    assert str(hub_path()) in str(error.value)
    named = tmp_path / 'named.pth'
    hub_path().parent.mkdir(parents=True)
    for path in (hub_path(), named):
        path.write_bytes(b'weights')
    assert (find_weights(), find_weights(named)) == (hub_path(), named)
    with pytest.raises(UserError, match='is no file'):
        find_weights(tmp_path / 'nowhere.pth')


def test_what_to_fetch():
    text = describe_weights()
    for fact in (INCEPTION_FILE, '95,628,359', INCEPTION_SHA256, str(hub_path()), 'not there'):
        assert fact in text
    assert INCEPTION_SHA256.startswith(INCEPTION_FILE.removesuffix('.pth').rpartition('-')[2])


def test_the_digits_need_none(weights):
    with pytest.raises(UserError, match='need no weights'):
        open_extractor('digits', inception=weights[0])
    extractor = open_extractor('digits')
    assert extractor(as_batch(grey_images(3)))[0].shape == (3, 128)
    assert extractor.identity() == open_extractor('digits').identity()
