"""SampleGrid and DigitsQuality: what they write, that they always write the same, that training does not notice."""

import contextlib
import json

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
from tread_composer.callbacks.digits_quality import DigitsQuality
from tread_composer.callbacks.sample_grid import SampleGrid, draw_grid
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.metrics.digits import real_digits
from tread_composer.objectives import FlowMatching


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
        assert files.files == [('results.json', None)]
        return json.loads((folder / 'results.json').read_text()), files.data

    results, logged = run(tmp_path / 'a')
    assert results == run(tmp_path / 'b')[0]
    assert results['batch'] == 6
    assert results['run_name'] == 'painting'
    assert results['protocol'] == {
        'num_samples': 100, 'labels': 'balanced', 'seed': 1,
        'sampler': 'heun', 'num_steps': 3, 'guidance_scale': 1.0, 'weights': 'raw',
    }  # fmt: skip
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
    assert json.loads((tmp_path / 'results.json').read_text())['recognised'] == 1.0


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
        'ba000003.png', 'ba000006.png', 'latest.png', 'results.json',
    }  # fmt: skip


def test_a_grid_of_colour_images_keeps_their_size_and_colours():
    images = torch.full((4, 3, 256, 256), -1.0)
    images[:, 0] = 1.0
    picture = draw_grid(images, ['red', 'also red'], 'a title ' * 40)
    assert picture.size[0] > 512
    assert picture.getpixel((picture.size[0] - 100, 100)) == (255, 0, 0)
    with pytest.raises(ValueError, match='do not fill'):
        draw_grid(images, ['a', 'b', 'c'], '')
