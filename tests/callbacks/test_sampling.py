"""SampleGrid and DigitsQuality: what they write, that they always write the same, that training does not notice."""

import contextlib
import dataclasses
import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from composer.core import Algorithm
from composer.loggers import InMemoryLogger
from PIL import Image

from tests.callbacks.small import Painter, losses_of, trainer
from tests.helpers import make_trainer, tiny_dit
from tread_composer.algorithms.ema import EMA
from tread_composer.autoencoders import Pixels
from tread_composer.callbacks.digits_quality import DigitsQuality, measure
from tread_composer.callbacks.sample_grid import SampleGrid, draw_grid
from tread_composer.io.picture_grid import shown_in_grid
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.metrics.digits import real_digits
from tread_composer.metrics.protocol import Protocol, differences
from tread_composer.objectives import FlowMatching
from tread_composer.samplers import SamplingSettings


class Average(Algorithm):
    """Stands for EMA: inside of the context every picture is black."""

    def match(self, event, state):
        return False

    def apply(self, event, state, logger):
        pass

    @contextlib.contextmanager
    def averaged(self, state):
        weight = state.model.pictures.weight
        own = weight.data.clone()
        weight.data.fill_(-1.0)
        yield
        weight.data.copy_(own)


class Files(InMemoryLogger):
    def __init__(self):
        super().__init__()
        self.files = []

    def log_file(self, path, artifact_folder=None):
        self.files.append((path.name, artifact_folder))


def test_pictures_come_at_the_interval_and_at_the_end_without_repeating_one(tmp_path):
    files = Files()
    grid = SampleGrid('3ba', folder=f'{tmp_path}/{{run_name}}', weights='raw', num_steps=2)
    trainer('6ba', callbacks=[grid], loggers=[files]).fit()
    assert sorted(path.name for path in (tmp_path / 'painting').iterdir()) == [
        'ba000003.png', 'ba000006.png', 'latest.png',
    ]  # fmt: skip
    assert files.files == [(name, 'samples') for name in ('ba000003.png', 'latest.png', 'ba000006.png', 'latest.png')]
    last = (tmp_path / 'painting' / 'ba000006.png').read_bytes()
    assert (tmp_path / 'painting' / 'latest.png').read_bytes() == last
    assert Image.open(tmp_path / 'painting' / 'latest.png').size[0] > 10 * 64


def test_each_row_shows_its_class(tmp_path):
    model = Painter()
    with torch.no_grad():
        model.pictures.weight.copy_(torch.linspace(-1, 1, 10)[:, None].expand(10, 64))
    grid = SampleGrid('1ep', folder=str(tmp_path), weights='raw', classes=[9, 0], class_names=list('abcdefghij'))
    trainer('1ba', model, callbacks=[grid], optimizers=torch.optim.SGD(model.parameters(), lr=0.0)).fit()
    picture = np.asarray(Image.open(tmp_path / 'latest.png'))
    height = len(picture)
    assert picture[28 : height // 2, 100:300].mean() > 180  # class 9 is white, in the upper row
    assert picture[height // 2 + 20 :, 100:300].mean() < 60


@pytest.mark.parametrize('make', [lambda f: SampleGrid('2ba', folder=f), lambda f: DigitsQuality('2ba', folder=f)])
def test_training_does_not_notice(tmp_path, make):
    def run(callbacks):
        frozen = Painter()
        frozen.extra = torch.nn.Dropout().eval()  # frozen in evaluation mode by its owner
        made = trainer('6ba', frozen, callbacks=callbacks, loggers=[InMemoryLogger()], algorithms=[Average()])
        losses = losses_of(made)
        assert made.state.model.pictures.training
        return losses, np.random.get_state()[1].tolist(), made.state.model.pictures.weight.tolist()

    assert run([make(str(tmp_path))]) == run([])


def test_pictures_are_drawn_in_float32_whatever_training_has_chosen(tmp_path):
    class Watched(Painter):
        seen: ClassVar[list] = []

        def sample(self, *arguments, **settings):
            self.seen.append(rounding())
            return super().sample(*arguments, **settings)

        def decode(self, latents):
            self.seen.append(rounding())
            return super().decode(latents)

    def rounding():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    tf32 = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision('high')  # as Composer does for a GPU
    torch.backends.cudnn.allow_tf32 = True
    try:
        trainer('1ba', Watched(), callbacks=[SampleGrid(folder=str(tmp_path), weights='raw')]).fit()
        assert set(Watched.seen) == {('highest', False)} and len(Watched.seen) == 4
        assert rounding() == ('high', True)
    finally:
        torch.set_float32_matmul_precision('highest')
        torch.backends.cudnn.allow_tf32 = tf32


def test_averaged_weights_are_used_and_given_back(tmp_path):
    raw, averaged = tmp_path / 'raw', tmp_path / 'averaged'
    callbacks = [
        SampleGrid('9ba', folder=str(raw), weights='raw'),
        SampleGrid('9ba', folder=str(averaged), weights='ema'),
    ]
    run = trainer('6ba', callbacks=callbacks, algorithms=[Average()])
    run.fit()
    assert np.asarray(Image.open(averaged / 'latest.png'))[60, 100:130].mean() < 30
    assert np.asarray(Image.open(raw / 'latest.png'))[60, 100:130].mean() > 60
    assert run.state.model.pictures.weight.std() > 0.1


@pytest.mark.parametrize('kind', [SampleGrid, DigitsQuality])
def test_averaged_weights_that_nobody_keeps_are_refused_before_training(tmp_path, kind):
    run = trainer(callbacks=[kind(folder=str(tmp_path))])
    with pytest.raises(ValueError, match='Add `ema: '):
        run.fit()
    assert int(run.state.timestamp.batch) == 0


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match='multiple of 10'):
        DigitsQuality(num_samples=55)
    with pytest.raises(ValueError, match="'mean' is neither"):
        SampleGrid(weights='mean')
    with pytest.raises(ValueError, match=r'\[10\] are not classes of the model'):
        trainer(callbacks=[SampleGrid(classes=[3, 10], weights='raw', folder=str(tmp_path))]).fit()


def test_a_diverged_model_is_drawn_and_named(tmp_path):
    model = Painter()
    with torch.no_grad():
        model.pictures.weight.fill_(float('nan'))
    trainer('1ba', model, callbacks=[SampleGrid(folder=str(tmp_path), weights='raw')]).fit()
    picture = np.asarray(Image.open(tmp_path / 'latest.png'))
    assert (picture[60, 100] == 128).all()


def test_quality_is_written_with_its_protocol_and_repeats(tmp_path):
    def run(folder):
        files = Files()
        quality = DigitsQuality(folder=str(folder), num_samples=100, weights='raw', num_steps=3)
        trainer(callbacks=[quality], loggers=[files]).fit()
        assert files.files == [('digits_quality.json', None)]
        return json.loads((folder / 'digits_quality.json').read_text()), files.data

    results, logged = run(tmp_path / 'a')
    assert results == run(tmp_path / 'b')[0]
    assert results['batch'] == 6
    assert results['run_name'] == 'painting'
    protocol = results['protocol']
    assert protocol.keys() == {entry.name for entry in dataclasses.fields(Protocol)}
    expected = {'num_samples': 100, 'labels': 'balanced', 'seed': 0, 'weights': 'raw', 'resolution': 8}
    assert {name: protocol[name] for name in expected} == expected
    assert protocol['sampling'] == SamplingSettings(num_steps=3).to_dict()
    assert results['real_held_out']['recognised'] > 0.97
    assert results['frechet_distance'] > 10 * results['real_held_out']['frechet_distance']
    assert float(logged['digits/recognised'][-1][1]) == results['recognised']


def test_good_digits_are_recognised(tmp_path):
    model = Painter()
    images, labels = real_digits()['train']
    with torch.no_grad():
        for digit in range(10):
            model.pictures.weight[digit] = images[labels == digit].mean(0).flatten()
    quality = DigitsQuality(folder=str(tmp_path), num_samples=100, weights='raw')
    trainer('1ba', model, callbacks=[quality], optimizers=torch.optim.SGD(model.parameters(), lr=0.0)).fit()
    assert json.loads((tmp_path / 'digits_quality.json').read_text())['recognised'] == 1.0


def test_with_the_real_model_and_the_real_average(tmp_path):
    callbacks = [
        SampleGrid('3ba', folder=str(tmp_path), num_steps=2, samples_per_class=2),
        DigitsQuality(folder=str(tmp_path), num_samples=20, num_steps=2, guidance_scale=1.5),
    ]
    denoiser = tiny_dit()
    settings = {'latent_shape': (1, 8, 8), 'num_classes': 10, 'autoencoder': Pixels()}
    model = LatentDiffusion(denoiser, FlowMatching(), **settings)
    make_trainer(model, algorithms=[EMA(decay=0.5)], callbacks=callbacks, run_name='real').fit()
    assert {path.name for path in tmp_path.iterdir()} == {
        'ba000003.png', 'ba000006.png', 'latest.png', 'digits_quality.json',
    }  # fmt: skip


def test_quality_is_that_of_the_images_that_sample_draws_and_all_points_are_kept(tmp_path):
    settings = {'latent_shape': (1, 8, 8), 'num_classes': 10, 'autoencoder': Pixels()}
    model = LatentDiffusion(tiny_dit(), FlowMatching(), **settings)
    quality = DigitsQuality('3ba', folder=str(tmp_path), num_samples=30, num_steps=2, weights='raw', seed=7)
    (tmp_path / 'results.json').write_text('[]')  # of `evaluate`: none of its business
    make_trainer(model, callbacks=[quality], run_name='real').fit()
    found = json.loads((tmp_path / 'digits_quality.json').read_text())
    images = model.decode(model.sample([i % 10 for i in range(30)], [7 + i for i in range(30)], num_steps=2))
    assert found['frechet_distance'] == pytest.approx(
        measure(images, [i % 10 for i in range(30)])['frechet_distance'], rel=1e-4
    )
    assert [point['batch'] for point in found['points']] == [3, 6]
    assert found['points'][1]['frechet_distance'] == found['frechet_distance'] != found['points'][0]['frechet_distance']
    assert differences(found['protocol'], found['protocol']) == []
    assert (tmp_path / 'results.json').read_text() == '[]'
    # Measured by another protocol, the points begin anew.
    other = DigitsQuality(folder=str(tmp_path), num_samples=20, num_steps=2, weights='raw')
    make_trainer(model, callbacks=[other], run_name='real').fit()
    found = json.loads((tmp_path / 'digits_quality.json').read_text())
    assert [point['batch'] for point in found['points']] == [6]


def test_which_images_a_grid_shows():
    assert shown_in_grid([0, 1, 2] * 2) == ([0, 3, 1, 4, 2, 5], [0, 1, 2])
    many = shown_in_grid([i % 12 for i in range(240)])
    assert many[1] == list(range(8)) and many[0][:3] == [0, 12, 24] and len(many[0]) == 80
    assert shown_in_grid([3, 1, 1]) == ([1, 0], [1, 3])
    assert shown_in_grid([4] * 25) == (list(range(20)), [4, None])


def test_a_grid_of_colour_images_keeps_their_size_and_colours():
    images = torch.full((4, 3, 256, 256), -1.0)
    images[:, 0] = 1.0
    picture = draw_grid(images, ['red', 'also red'], 'a title ' * 40)
    assert picture.size[0] > 512
    assert picture.getpixel((picture.size[0] - 100, picture.size[1] - 100)) == (255, 0, 0)
    with pytest.raises(ValueError, match='do not fill'):
        draw_grid(images, ['a', 'b', 'c'], '')


def test_names_beyond_ascii_are_no_boxes():
    images = torch.zeros(6, 1, 8, 8)
    rows = ['Åland', 'жираф', '猫', '犬', r'\u732b', 'ψ']
    strips = [np.asarray(draw_grid(images, [name, *[''] * 5], ''))[:60] for name in rows]
    # Boxes would be alike: two signs of one length that the font lacks must not be.
    assert not np.array_equal(strips[2], strips[3]) and np.array_equal(strips[2], strips[4])
