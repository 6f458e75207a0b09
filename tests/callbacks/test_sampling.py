"""SampleGrid and DigitsQuality: what they write, that they always write the same, that training does not notice."""

import functools
from typing import ClassVar

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger
from PIL import Image

from tests.callbacks.small import Files, Painter, digits_model, losses_of, trainer
from tests.helpers import make_trainer
from tests.runs import run
from tread_composer.algorithms.ema import EMA
from tread_composer.autoencoders.pixels import to_tiles
from tread_composer.callbacks import sampling
from tread_composer.callbacks.digits_quality import DigitsQuality
from tread_composer.callbacks.sample_grid import SampleGrid
from tread_composer.io.picture_grid import class_grid, picture_grid, shown_in_grid
from tread_composer.metrics.digits import DigitsImages, real_digits
from tread_composer.metrics.protocol import differences, load_results
from tread_composer.samplers import SamplingSettings


def paint_once(model, callback):
    """One batch that changes nothing."""
    trainer('1ba', model, callbacks=[callback], optimizers=torch.optim.SGD(model.parameters(), lr=0.0)).fit()


def pixels(path):
    return np.asarray(Image.open(path))


def test_pictures_come_at_the_interval_and_at_the_end_without_repeating_one(tmp_path):
    files = Files()
    grid = SampleGrid('3ba', folder=f'{tmp_path}/{{run_name}}', weights='raw', num_steps=2)
    trainer('6ba', callbacks=[grid], loggers=[files]).fit()
    folder = tmp_path / 'painting'
    assert sorted(path.name for path in folder.iterdir()) == ['ba000003.png', 'ba000006.png', 'latest.png']
    assert files.files == [(name, 'samples') for name in ('ba000003.png', 'latest.png', 'ba000006.png', 'latest.png')]
    assert (folder / 'latest.png').read_bytes() == (folder / 'ba000006.png').read_bytes()
    assert Image.open(folder / 'latest.png').size[0] > 10 * 64


def test_each_row_shows_its_class(tmp_path):
    model = Painter()
    with torch.no_grad():
        model.pictures.weight.copy_(torch.linspace(-1, 1, 10)[:, None].expand(10, 64))
    paint_once(model, SampleGrid(folder=str(tmp_path), weights='raw', classes=[9, 0]))
    picture = pixels(tmp_path / 'latest.png')
    height = len(picture)
    assert picture[28 : height // 2, 100:300].mean() > 180  # class 9 is white, in the upper row
    assert picture[height // 2 + 20 :, 100:300].mean() < 60


@pytest.mark.parametrize('make', [lambda f: SampleGrid('2ba', folder=f), lambda f: DigitsQuality('2ba', folder=f)])
def test_training_does_not_notice(tmp_path, make):
    def run(callbacks):
        frozen = Painter()
        frozen.extra = torch.nn.Dropout().eval()  # frozen in evaluation mode by its owner
        made = trainer('6ba', frozen, callbacks=callbacks, loggers=[InMemoryLogger()], algorithms=[EMA(decay=0.5)])
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
    model = Painter()
    torch.nn.init.constant_(model.pictures.weight, -1.0)  # black, as the average of six batches still is
    callbacks = [SampleGrid('9ba', folder=str(tmp_path / weights), weights=weights) for weights in ('raw', 'ema')]
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0)
    trainer('6ba', model, callbacks=callbacks, algorithms=[EMA(decay=0.9999)], optimizers=optimizer).fit()
    assert pixels(tmp_path / 'ema' / 'latest.png')[60, 100:130].mean() < 30
    assert pixels(tmp_path / 'raw' / 'latest.png')[60, 100:130].mean() > 60
    assert model.pictures.weight.mean() > -0.7


@pytest.mark.parametrize('kind', [SampleGrid, DigitsQuality])
def test_averaged_weights_that_nobody_keeps_are_refused_before_training(tmp_path, kind):
    run = trainer(callbacks=[kind(folder=str(tmp_path))])
    with pytest.raises(ValueError, match=rf'callbacks\.{kind.__name__[:5].lower()}.*Add `ema: '):
        run.fit()
    assert int(run.state.timestamp.batch) == 0


def test_impossible_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match='multiple of 10'):
        DigitsQuality(num_samples=55)
    with pytest.raises(ValueError, match="'mean'; choose of ema, raw"):
        SampleGrid(weights='mean')
    with pytest.raises(ValueError, match=r'\[10\] are not classes of the model'):
        trainer(callbacks=[SampleGrid(classes=[3, 10], weights='raw', folder=str(tmp_path))]).fit()
    with pytest.raises(ValueError, match='is for the ten digits, but the model has 5 classes'):
        make_trainer(digits_model(num_classes=5), callbacks=[DigitsQuality(folder=str(tmp_path), weights='raw')]).fit()


def test_a_diverged_model_is_drawn_and_good_digits_are_recognised(tmp_path):
    model = Painter()
    with torch.no_grad():
        model.pictures.weight.fill_(float('nan'))
    paint_once(model, SampleGrid(folder=str(tmp_path), weights='raw'))
    assert (pixels(tmp_path / 'latest.png')[60, 100] == 128).all()
    images, labels = real_digits()['train']
    with torch.no_grad():
        for digit in range(10):
            model.pictures.weight[digit] = images[labels == digit].mean(0).flatten()
    paint_once(model, DigitsQuality(folder=str(tmp_path), num_samples=100, weights='raw'))
    assert load_results(tmp_path / 'results.json')[0]['value'] == 1.0


def test_digits_are_measured_with_their_protocol_and_every_measurement_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    (tmp_path / 'digits').mkdir()  # no reference
    files, quality = Files(), DigitsQuality('3ba', folder='run', num_samples=30, num_steps=2, weights='raw', seed=7)
    quality.load_state_dict({})  # as a checkpoint of 0.1.0 has it
    made = make_trainer(digits_model(), callbacks=[quality], loggers=[files], run_name='real')
    made.fit()
    assert files.files == [('results.json', None)] * 2
    assert [path.name for path in (tmp_path / 'run').glob('[!.]*')] == ['results.json']
    entries = load_results(tmp_path / 'run' / 'results.json')
    names = ['recognised_digits_30', 'fd_digits_30']
    assert [(entry['metric'], entry['batch']) for entry in entries] == [(n, b) for b in (3, 6) for n in names]
    assert [entry['better'] for entry in entries[:2]] == ['higher', 'lower']
    for name, kept in (('recognised', entries[::2]), ('frechet_distance', entries[1::2])):
        assert [float(value) for _, value in files.data[f'digits/{name}']] == [entry['value'] for entry in kept]
    protocol = entries[0]['protocol']
    expected = {'num_samples': 30, 'labels': 'balanced', 'seed': 7, 'weights': 'raw', 'resolution': 8}
    assert {name: protocol[name] for name in expected} == expected
    assert protocol['sampling'] == SamplingSettings(num_steps=2).to_dict() and 'round' in protocol['uint8_rule']
    assert protocol['reference_hash'] == DigitsImages('train').hash and differences(protocol, protocol) == []
    rows = dict(quality.summary(made.state))
    recognised, distance = (entry['value'] for entry in entries[2:])
    assert rows['recognised'].startswith(f'{round(recognised * 30)} of 30 samples ')
    real = float(rows['recognised'].rpartition(' ')[2].rstrip('%')), float(rows['Fréchet distance'].rpartition(' ')[2])
    assert real[0] > 97 and rows['Fréchet distance'].startswith(f'{distance:.2f} ') and distance > 10 * real[1]
    assert rows['samples'] == 'raw weights, heun 2 steps, guidance 1, dense, at batch 6'


def test_digits_are_those_of_evaluate(tmp_path, cli):
    """The same images, reference and protocol, so the same numbers."""
    words = 'callbacks.digits_quality={num_samples: 20, num_steps: 2, weights: raw}'
    folder = run(tmp_path, 'digits.yaml', words).folder
    trained = load_results(folder / 'results.json')
    words = ['--reference', 'digits', '--features', 'digits', '--metrics', 'recognised', 'fid', '--weights', 'raw']
    words += ['--count', '20', '--steps', '2', '--device', 'cpu', '--out', str(tmp_path / 'again.json')]
    cli('evaluate', folder, *words)
    for entry, again in zip(trained, load_results(tmp_path / 'again.json'), strict=True):
        assert entry['metric'] == again['metric'] and differences(entry['protocol'], again['protocol']) == []
        assert again['value'] == pytest.approx(entry['value'], rel=1e-3)


def test_with_the_real_model_and_the_real_average_and_with_progress(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sampling, 'Progress', functools.partial(sampling.Progress, interval=0.0))
    callbacks = [
        SampleGrid('3ba', folder=str(tmp_path), num_steps=2, samples_per_class=2),
        DigitsQuality(folder=str(tmp_path), num_samples=20, num_steps=2, guidance_scale=1.5),
    ]
    make_trainer(digits_model(), algorithms=[EMA(decay=0.5)], callbacks=callbacks, run_name='real').fit()
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith('.')}
    assert names == {'ba000003.png', 'ba000006.png', 'latest.png', 'results.json'}
    printed = capsys.readouterr().err
    assert 'sample_grid at batch 3: 20 of 20 images (100.0%), ' in printed and ' left\n' in printed
    assert 'digits_quality at batch 6: 20 of 20 images (100.0%), ' in printed
    # Within a batch, which on a CPU may take minutes.
    start = '0 of 20 images (0.0%), 0.0 images/s, no estimate yet; in work: 3 evaluations, '
    assert f'sample_grid at batch 6: {start}' in printed


def test_which_images_a_grid_shows():
    assert shown_in_grid([0, 1, 2] * 2) == ([0, 3, 1, 4, 2, 5], [0, 1, 2])
    many = shown_in_grid([i % 12 for i in range(240)])
    assert many[1] == list(range(8)) and many[0][:3] == [0, 12, 24] and len(many[0]) == 80
    assert shown_in_grid([3, 1, 1]) == ([1, 0], [1, 3])
    assert shown_in_grid([4] * 25) == (list(range(20)), [4, None])


def test_a_grid_of_colour_images_keeps_their_size_and_colours():
    images = torch.full((4, 3, 256, 256), -1.0)
    images[:, 0] = 1.0
    picture = class_grid(to_tiles(images), [0, None], ['red'], 'a title ' * 40)
    assert picture.size[0] > 512
    assert picture.getpixel((picture.size[0] - 100, picture.size[1] - 100)) == (255, 0, 0)
    with pytest.raises(ValueError, match='do not fill'):
        picture_grid(to_tiles(images), '', columns=2, row_names=['a', 'b', 'c'])


def test_names_beyond_ascii_are_no_boxes():
    tiles = np.zeros((6, 8, 8, 1), np.uint8)
    rows = ['Åland', 'жираф', '猫', '犬', r'\u732b', 'ψ']
    strips = [np.asarray(class_grid(tiles, [0, *[None] * 5], [name], ''))[:60] for name in rows]
    # Boxes would be alike: two signs of one length that the font lacks must not be.
    assert not np.array_equal(strips[2], strips[3]) and np.array_equal(strips[2], strips[4])
