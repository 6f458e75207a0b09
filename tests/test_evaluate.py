"""``python -m tread_composer evaluate`` and ``prefetch``, from their words to what they write."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from mlflow import MlflowClient

from tests.metrics.small import grey_images, random_images, write_folder
from tests.runs import run
from tread_composer import cli
from tread_composer.config import restore_config
from tread_composer.data.digits import prepare_digits
from tread_composer.metrics.inception import INCEPTION_SHA256
from tread_composer.metrics.protocol import UNKNOWN, differences, load_results, protocol_key, series_name
from tread_composer.samplers import Evaluations, SamplingSettings, guidance_cost
from tread_composer.weights.exported import write_exported
from tread_composer.weights.trained import load_trained, read_trained

SAMPLING = ['--steps', '2', '--batch-size', '16', '--device', 'cpu']


@pytest.fixture(autouse=True)
def no_weights_here(monkeypatch, tmp_path):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch_home'))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp('evaluate')
    return run(root, 'digits_tread.yaml', f'loggers.mlflow={{experiment_name: digits, folder: {root}}}').folder


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    folder = tmp_path_factory.mktemp('digits') / 'digits'
    prepare_digits(folder)
    return folder / 'eval'


def evaluate(path, reference, *words):
    return cli.main(['evaluate', str(path), '--reference', str(reference), '--features', 'digits', *words])


def refused(capsys, path, reference, *words):
    capsys.readouterr()
    assert evaluate(path, reference, *words) == 2
    return capsys.readouterr().err


def test_a_model_and_its_samples_give_the_same_numbers_with_the_same_protocol(trained, digits, tmp_path, capsys):
    words = ['--metrics', 'fid', 'prc', '--count', '40', *SAMPLING]
    assert evaluate(trained, digits, *words, '--samples', str(tmp_path / 'drawn')) == 0
    of_model = load_results(trained / 'results.json')
    assert [entry['metric'] for entry in of_model] == ['fd_digits_40', 'precision_digits_40', 'recall_digits_40']
    out, formats = tmp_path / 'samples', ['--format', 'png', 'mds']
    assert cli.main(['sample', str(trained), '--out', str(out), '--count', '40', *formats, *SAMPLING]) == 0
    capsys.readouterr()
    for place in (out, out / 'mds'):
        target = tmp_path / f'{place.name}.json'
        assert evaluate(place, digits, '--metrics', 'fid', 'prc', '--out', str(target)) == 0
        for one, other in zip(of_model, load_results(target), strict=True):
            assert one['value'] == pytest.approx(other['value'], rel=1e-9)
            assert differences(one['protocol'], other['protocol']) == []
            assert one['weights_digest'] == other['weights_digest'] is not None
            assert (other['run'], other['batch']) == ('digits_tread', 3) == (one['run'], one['batch'])
    assert 'fd_digits_40' in capsys.readouterr().out
    protocol = of_model[0]['protocol']
    assert protocol['sampling']['num_steps'] == 2
    expected = {'weights': 'ema', 'labels': 'balanced', 'seed': 0, 'resolution': 8}
    assert {name: protocol[name] for name in expected} == expected
    (logged,) = mlflow_runs(trained.parent)
    assert logged.data.metrics[series_name('fd_digits_40', protocol)] == of_model[0]['value']
    assert logged.info.status == 'FINISHED'


def test_numbers_of_two_protocols_stand_in_two_series(trained, digits, tmp_path):
    """Also of two second networks."""
    early, guided = str(next(trained.glob('*ba2*.pt'))), ['--guidance-scale', '2']
    weak = [['--guidance', 'auto', *guided, '--weak', path] for path in (early, str(trained))]
    for words in ([], guided, *weak):
        assert evaluate(trained, digits, '--count', '10', *words, *SAMPLING, '--out', str(tmp_path / 'r.json')) == 0
    entries = load_results(tmp_path / 'r.json')
    (logged,) = mlflow_runs(trained.parent)
    series = {name: value for name, value in logged.data.metrics.items() if '/fd_digits_10/' in name}
    assert sorted(series.values()) == sorted(entry['value'] for entry in entries) and len(entries) == 4
    assert any('-classifier_free-2.0-' in name for name in series)
    first, second = (entry['protocol'] for entry in entries[2:])
    assert [line.split(':')[0] for line in differences(first, second)] == ['weak']


def test_a_sweep_has_the_protocol_of_evaluate(trained, digits, tmp_path):
    """Whoever measures: the same images have the same protocol, also with the routes that sparse guidance uses."""
    sparse = ['--guidance', 'sparse', '--guidance-scale', '2', '--strong-rate', '0.25', '--weak-rate', '0.75']
    for name, words in (('plain', []), ('sparse', sparse)):
        out = str(tmp_path / f'{name}.json')
        assert evaluate(trained, digits, '--count', '20', *words, *SAMPLING, '--out', out) == 0
    words = ['--samples', '20', '--features', 'digits', '--reference', str(digits), '--out', str(tmp_path / 'sweep')]
    words += ['--guidance', 'sparse', '--guidance-settings', 'strong_rate=0.25', 'weak_rate=0.75']
    words += ['--guidance-scale', '1', '2']
    assert cli.main(['sweep', str(trained), *words, *SAMPLING]) == 0
    rows = load_results(tmp_path / 'sweep' / 'results.json')
    for name, row in zip(('plain', 'sparse'), rows, strict=True):
        (entry,) = load_results(tmp_path / f'{name}.json')
        assert differences(entry['protocol'], row['protocol']) == []
        assert protocol_key(entry['protocol']) == protocol_key(row['protocol'])
        assert row['value'] == pytest.approx(entry['value'], rel=1e-9)
    assert rows[1]['protocol']['sampling']['routes']


def test_an_exported_file_is_credited_by_what_it_says_itself(trained, digits, tmp_path, capsys):
    found, words = read_trained(trained), ['--count', '10', *SAMPLING]
    renamed = restore_config({**found.config.to_dict(), 'run_name': 'other'}, source='test')
    shutil.copy(trained / 'config.yaml', tmp_path / 'config.yaml')
    for name, config, batch in (('other', renamed, 0), ('own', found.config, 3)):
        file = tmp_path / f'{name}.safetensors'
        write_exported(file, dataclasses.replace(found, config=config, batch=batch), {}, overwrite=False)
        assert evaluate(file, digits, *words) == 0
    assert "is of run 'other', and lies in the folder of run 'digits_tread'" in capsys.readouterr().out
    (other,), (own,) = (load_results(tmp_path / name) for name in ('other.results.json', 'results.json'))
    assert (other['run'], other['batch']) == ('other', None)  # 0 is what an import says where nobody knows
    assert (own['run'], own['batch']) == ('digits_tread', 3)
    # What nobody knows the batch of is in no curve.
    before, file = mlflow_runs(trained.parent)[0].data.metrics, trained / 'unknown.safetensors'
    write_exported(file, dataclasses.replace(found, batch=0), {}, overwrite=True)
    assert evaluate(file, digits, *words, '--seed', '9', '--out', str(tmp_path / 'r.json')) == 0
    assert 'nobody has said' in capsys.readouterr().out
    assert mlflow_runs(trained.parent)[0].data.metrics == before
    file.unlink()


def mlflow_runs(folder: Path):
    client = MlflowClient(f'sqlite:///{folder}/mlflow.db')
    return client.search_runs([client.get_experiment_by_name('digits').experiment_id])


def test_evaluating_again_draws_nothing_anew_and_adds_no_second_entry(trained, digits, tmp_path, capsys):
    shutil.rmtree(trained / 'evaluation_samples', ignore_errors=True)
    words = ['--count', '20', *SAMPLING, '--out', str(tmp_path / 'numbers.json')]
    for _ in range(2):
        assert evaluate(trained, digits, *words) == 0
    assert 'finished already' in capsys.readouterr().out
    assert len(load_results(tmp_path / 'numbers.json')) == 1
    (folder,) = (trained / 'evaluation_samples').iterdir()
    assert folder.name.startswith('ema-ba3-')
    assert evaluate(trained, digits, *words, '--batch-size', '3') == 0  # no other images
    (folder,) = (trained / 'evaluation_samples').iterdir()
    assert evaluate(trained, digits, *words, '--seed', '5') == 0
    first, second = load_results(tmp_path / 'numbers.json')
    assert differences(first['protocol'], second['protocol']) == ['seed: 0 and 5']
    assert first['value'] != second['value']


def test_images_that_say_nothing_compare_with_none(digits, tmp_path, capsys):
    folder = write_folder(tmp_path / 'images', grey_images(30))
    assert evaluate(folder, digits, '--metrics', 'fid', 'kid', '--kid-subset-size', '25') == 0
    assert 'compare with no others' in capsys.readouterr().out
    fid, kid = load_results(folder / 'results.json')
    assert (fid['metric'], kid['metric']) == ('fd_digits_30', 'kd_digits_30')
    drawn = {'subsets_seed': 2020, 'images': 'in the order of their hashes'}
    assert kid['protocol']['settings'] == {'kid_subset_size': 25, 'kid_subsets': 100, **drawn}
    assert fid['protocol']['seed'] == UNKNOWN
    assert 'seed: unknown for both numbers' in differences(fid['protocol'], fid['protocol'])


STRANGERS_METRIC = """
from types import SimpleNamespace

from tread_composer.metrics.metric import Quantity


class Spread:
    name = 'spread'
    quantities = (Quantity('spread', 'higher', 'units of a feature'),)
    needs_logits = False
    compares_with = 'images'

    def check(self, num_samples, num_reference):
        assert num_reference

    def measure(self, samples, reference, device):
        value = float(samples.features_ND.std() / reference.features.features_ND.std())
        return [SimpleNamespace(quantity=self.quantities[0], value=value, spread=None, settings={'by': 'a stranger'})]
"""


def test_a_metric_of_another_package_is_measured_by_its_name(trained, digits, tmp_path, monkeypatch, capsys):
    (tmp_path / 'strangers_metric.py').write_text(STRANGERS_METRIC)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ['--metrics', 'fid', 'strangers_metric:Spread', '--out', str(tmp_path / 'r.json')]
    assert evaluate(digits, digits, *words) == 0
    entries = {entry['metric']: entry for entry in load_results(tmp_path / 'r.json')}
    assert entries['spread_digits_297']['value'] == 1.0
    assert entries['spread_digits_297']['protocol']['settings'] == {'by': 'a stranger'}
    places = ['--reference', str(digits), '--features', 'digits', '--out', str(tmp_path / 'sweep')]
    scales = ['--guidance-scale', '1', '3', '--samples', '20', '--metrics', 'strangers_metric:Spread']
    assert cli.main(['sweep', str(trained), *places, *scales, *SAMPLING]) == 0
    with (tmp_path / 'sweep' / 'sweep.csv').open() as file:
        rows = list(csv.DictReader(file))
    values = [float(row['spread_digits_20']) for row in rows]
    assert [row['best'] for row in rows].index('spread_digits_20') == values.index(max(values))
    for name, message in (('strangers_metric:Spred', "has no 'Spred'"), ('nowhere:Spread', "named 'nowhere'")):
        assert message in refused(capsys, digits, digits, '--metrics', name)


def test_a_set_against_itself(tmp_path, digits):
    target = tmp_path / 'self.json'
    assert evaluate(digits, digits, '--metrics', 'fid', 'prc', 'recognised', '--out', str(target)) == 0
    values = {entry['metric']: entry['value'] for entry in load_results(target)}
    assert values.pop('fd_digits_297') == pytest.approx(0, abs=1e-6)
    assert values['precision_digits_297'] == values['recall_digits_297'] == 1.0
    assert values['recognised_digits_297'] > 0.97


def test_the_reference_is_looked_at_once(digits, tmp_path, capsys):
    folder, reference = (write_folder(tmp_path / name, grey_images(12, seed)) for seed, name in enumerate('ab'))
    for number, looks in enumerate((True, False)):
        assert evaluate(folder, reference, '--out', str(tmp_path / f'{number}.json')) == 0
        assert ('12 reference images, once' in capsys.readouterr().out) == looks
    write_folder(reference, grey_images(1, 7))
    assert evaluate(folder, reference, '--out', str(tmp_path / '2.json')) == 0
    assert '12 reference images, once' in capsys.readouterr().out
    first, second, changed = (load_results(tmp_path / f'{number}.json')[0] for number in range(3))
    assert first['value'] == second['value'] != changed['value']
    assert [line.split(':')[0] for line in differences(
        {**first['protocol'], 'seed': 0}, {**changed['protocol'], 'seed': 0}
    )].count('reference_hash') == 1  # fmt: skip


def test_a_file_of_something_else_is_kept(trained, digits, tmp_path, capsys):
    (tmp_path / 'results.json').write_text('{"recognised": 0.9}')
    message = refused(capsys, trained, digits, '--count', '20', *SAMPLING, '--out', str(tmp_path / 'results.json'))
    assert 'is no list of measured numbers' in message and 'write the numbers elsewhere' in message
    assert (tmp_path / 'results.json').read_text() == '{"recognised": 0.9}'


def test_what_does_not_go_together_is_refused(trained, digits, tmp_path, capsys):
    images = write_folder(tmp_path / 'images', grey_images(12))
    large = write_folder(tmp_path / 'large', random_images(12, 16))
    drawn = ('--count', '20')
    for path, reference, words, message in (
        (images, large, [], 'images of 16 pixels, and the samples have 8'),
        (trained, large, drawn, 'images of 16 pixels, and the samples have 8'),
        (trained, digits, [], 'say how many images'),
        (images, digits, ['--count', '9', '--steps', '3'], '--count, --steps: of a model'),
        (images, digits, ['autoencoder.path=x'], 'autoencoder.path=x: of a model'),
        (trained, digits, ['seed=3', *drawn], 'a trained model is sampled as it was'),
        (trained, digits, ['autoencoder.path=x', *drawn], 'pixels'),
        (tmp_path / 'nowhere', digits, [], 'no such file or folder'),
        (images, digits, ['--kid-subset-size', '1'], '--kid-subset-size: 1 must be at least 2'),
        (images, digits, ['--metrics', 'kid'], 'kid needs 1000 images'),
        (images, digits, ['--metrics', 'recognised'], 'recognised needs the label of each image'),
        (images, digits, ['--features', 'inception'], 'the weights of Inception are not here'),
    ):
        assert message in refused(capsys, path, reference, *words)
    assert not list((trained / 'evaluation_samples').glob('*-ba0*')), 'refused before sampling'
    damaged = write_folder(tmp_path / 'damaged', grey_images(12))
    (damaged / '000003.png').write_bytes((damaged / '000003.png').read_bytes()[:40])
    before = sorted((trained / 'evaluation_samples').glob('*'))
    assert '000003.png' in refused(capsys, trained, damaged, '--count', '50', *SAMPLING)
    assert sorted((trained / 'evaluation_samples').glob('*')) == before, 'refused before sampling'


def test_unfinished_samples_and_ones_that_were_tampered_with_are_refused(trained, digits, tmp_path, capsys):
    out = tmp_path / 'samples'
    assert cli.main(['sample', str(trained), '--out', str(out), '--count', '10', *SAMPLING]) == 0
    next((out / 'images').iterdir()).unlink()
    assert 'holds 9 images, and' in refused(capsys, out, digits)
    record = json.loads((out / 'samples.json').read_text())
    (out / 'samples.json').write_text(json.dumps({**record, 'complete': False}))
    assert 'is not finished' in refused(capsys, out, digits)


def test_prefetch(tmp_path, capsys):
    assert cli.main(['prefetch']) == 0
    text = capsys.readouterr().out
    assert INCEPTION_SHA256 in text and '95,628,359' in text and str(tmp_path / 'torch_home') in text
    np.save(tmp_path / 'other.npy', np.zeros(3))
    assert cli.main(['prefetch', '--check', str(tmp_path / 'other.npy')]) == 2
    assert f'expected {INCEPTION_SHA256}' in capsys.readouterr().err
    assert cli.main(['prefetch', '--check', str(tmp_path / 'nowhere')]) == 2


def test_an_adaptive_sampler_is_recorded_by_its_tolerances_and_the_evaluations_that_it_took(trained, digits, tmp_path):
    words = ['--count', '20', '--sampler', 'dopri5', '--sampler-settings', 'rtol=1e-2', '--device', 'cpu']
    assert evaluate(trained, digits, *words, '--out', str(tmp_path / 'r.json'), '--samples', str(tmp_path / 'd')) == 0
    (entry,) = load_results(tmp_path / 'r.json')
    sampling = entry['protocol']['sampling']
    assert sampling['sampler_settings'] == {'atol': 1e-6, 'rtol': 1e-2} and 'num_steps' not in sampling
    model, taken = load_trained(trained).model, Evaluations()
    settings = SamplingSettings('dopri5', sampler_settings={'rtol': 1e-2})
    model.draw([index % 10 for index in range(20)], list(range(20)), settings, batch_size=7, evaluations=taken)
    assert entry['evaluations'] == pytest.approx(sum(taken.taken) / 20) and min(taken.taken) >= 8
    record = json.loads((tmp_path / 'd' / 'samples.json').read_text())
    assert record['gmacs_per_image'] / record['evaluations'] == pytest.approx(
        guidance_cost(
            model.denoiser,
            model.objective,
            SamplingSettings('euler', num_steps=1),
            latent_shape=(1, 8, 8),
            null_label=10,
        ).gmacs
    )


def test_steps_of_an_adaptive_sampler_are_refused(trained, digits, tmp_path, capsys):
    message = refused(capsys, trained, digits, '--count', '20', '--sampler', 'dopri5', '--steps', '9')
    assert '--steps: has no effect with --sampler dopri5' in message and 'atol, rtol by --sampler-settings' in message
