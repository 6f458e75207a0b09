"""``python -m tread_composer evaluate`` and ``prefetch``, from their words to what they write."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from tests.metrics.small import grey_images, random_images, write_folder
from tests.runs import make_store, run, tracked
from tread_composer.config import restore_config
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
    make_store(root / 'runs')
    logger = f'loggers.mlflow={{experiment_name: digits, folder: {root / "runs"}}}'
    return run(root, 'digits_tread.yaml', logger).folder


@pytest.fixture(scope='module')
def digits(digits):
    return digits / 'eval'


@pytest.fixture
def evaluate(cli):
    def call(path, reference, *words, code=0):
        return cli('evaluate', path, '--reference', reference, '--features', 'digits', *words, code=code)

    return call


@pytest.fixture
def refused(evaluate):
    return lambda *arguments: evaluate(*arguments, code=2).err


def test_a_model_and_its_samples_give_the_same_numbers_with_the_same_protocol(trained, digits, tmp_path, cli, evaluate):
    words = ['--metrics', 'fid', 'prc', '--count', '40', *SAMPLING]
    evaluate(trained, digits, *words, '--samples', tmp_path / 'drawn')
    of_model = load_results(trained / 'results.json')
    assert [entry['metric'] for entry in of_model] == ['fd_digits_40', 'precision_digits_40', 'recall_digits_40']
    out, formats = tmp_path / 'samples', ['--format', 'png', 'mds']
    cli('sample', trained, '--out', out, '--count', '40', *formats, *SAMPLING)
    for place in (out, out / 'mds'):
        target = tmp_path / f'{place.name}.json'
        assert 'fd_digits_40' in evaluate(place, digits, '--metrics', 'fid', 'prc', '--out', target).out
        for one, other in zip(of_model, load_results(target), strict=True):
            assert one['value'] == pytest.approx(other['value'], rel=1e-9)
            assert differences(one['protocol'], other['protocol']) == []
            assert one['weights_digest'] == other['weights_digest'] is not None
            assert (other['run'], other['batch']) == ('digits_tread', 3) == (one['run'], one['batch'])
    protocol = of_model[0]['protocol']
    assert protocol['sampling']['num_steps'] == 2
    expected = {'weights': 'ema', 'labels': 'balanced', 'seed': 0, 'resolution': 8}
    assert {name: protocol[name] for name in expected} == expected
    logged = tracked(trained.parent)
    assert logged.data.metrics[series_name('fd_digits_40', protocol)] == of_model[0]['value']
    assert logged.info.status == 'FINISHED'


def test_numbers_of_two_protocols_stand_in_two_series(trained, digits, tmp_path, evaluate):
    """Also of two second networks."""
    early, guided = str(next(trained.glob('*ba2*.pt'))), ['--guidance-scale', '2']
    weak = [['--guidance', 'auto', *guided, '--weak', path] for path in (early, str(trained))]
    for words in ([], guided, *weak):
        evaluate(trained, digits, '--count', '10', *words, *SAMPLING, '--out', tmp_path / 'r.json')
    entries = load_results(tmp_path / 'r.json')
    logged = tracked(trained.parent)
    series = {name: value for name, value in logged.data.metrics.items() if '/fd_digits_10/' in name}
    assert sorted(series.values()) == sorted(entry['value'] for entry in entries) and len(entries) == 4
    assert any('-classifier_free-2.0-' in name for name in series)
    first, second = (entry['protocol'] for entry in entries[2:])
    assert [line.split(':')[0] for line in differences(first, second)] == ['weak']


def test_a_sweep_has_the_protocol_of_evaluate(trained, digits, tmp_path, cli, evaluate):
    """Whoever measures: the same images have the same protocol, also with the routes that sparse guidance uses."""
    sparse = ['--guidance', 'sparse', '--guidance-scale', '2', '--strong-rate', '0.25', '--weak-rate', '0.75']
    for name, words in (('plain', []), ('sparse', sparse)):
        evaluate(trained, digits, '--count', '20', *words, *SAMPLING, '--out', tmp_path / f'{name}.json')
    words = ['--samples', '20', '--features', 'digits', '--reference', digits, '--out', tmp_path / 'sweep']
    words += ['--guidance', 'sparse', '--guidance-settings', 'strong_rate=0.25', 'weak_rate=0.75']
    cli('sweep', trained, *words, '--guidance-scale', '1', '2', *SAMPLING)
    rows = load_results(tmp_path / 'sweep' / 'results.json')
    for name, row in zip(('plain', 'sparse'), rows, strict=True):
        (entry,) = load_results(tmp_path / f'{name}.json')
        assert differences(entry['protocol'], row['protocol']) == []
        assert protocol_key(entry['protocol']) == protocol_key(row['protocol'])
        assert row['value'] == pytest.approx(entry['value'], rel=1e-9)
    assert rows[1]['protocol']['sampling']['routes']


def test_an_exported_file_is_credited_by_what_it_says_itself(trained, digits, tmp_path, evaluate):
    found, words = read_trained(trained), ['--count', '10', *SAMPLING]
    renamed = restore_config({**found.config.to_dict(), 'run_name': 'other'}, source='test')
    shutil.copy(trained / 'config.yaml', tmp_path / 'config.yaml')
    for name, config, batch in (('other', renamed, 0), ('own', found.config, 3)):
        file = tmp_path / f'{name}.safetensors'
        write_exported(file, dataclasses.replace(found, config=config, batch=batch), {}, overwrite=False)
        text = evaluate(file, digits, *words).out
        assert ("is of run 'other', and lies in the folder of run 'digits_tread'" in text) == (name == 'other')
    (other,), (own,) = (load_results(tmp_path / name) for name in ('other.results.json', 'results.json'))
    assert (other['run'], other['batch']) == ('other', None)  # 0 is what an import says where nobody knows
    assert (own['run'], own['batch']) == ('digits_tread', 3)
    # What nobody knows the batch of is in no curve.
    before, file = tracked(trained.parent).data.metrics, trained / 'unknown.safetensors'
    write_exported(file, dataclasses.replace(found, batch=0), {}, overwrite=True)
    assert 'nobody has said' in evaluate(file, digits, *words, '--seed', '9', '--out', tmp_path / 'r.json').out
    assert tracked(trained.parent).data.metrics == before
    file.unlink()


def test_evaluating_again_draws_nothing_anew_and_adds_no_second_entry(trained, digits, tmp_path, evaluate):
    shutil.rmtree(trained / 'evaluation_samples', ignore_errors=True)
    words = ['--count', '20', *SAMPLING, '--out', tmp_path / 'numbers.json']
    evaluate(trained, digits, *words)
    assert 'finished already' in evaluate(trained, digits, *words).out
    assert len(load_results(tmp_path / 'numbers.json')) == 1
    (folder,) = (trained / 'evaluation_samples').iterdir()
    assert folder.name.startswith('ema-ba3-')
    evaluate(trained, digits, *words, '--batch-size', '3')  # no other images
    (folder,) = (trained / 'evaluation_samples').iterdir()
    evaluate(trained, digits, *words, '--seed', '5')
    first, second = load_results(tmp_path / 'numbers.json')
    assert differences(first['protocol'], second['protocol']) == ['seed: 0 and 5']
    assert first['value'] != second['value']


def test_images_are_of_their_samples_however_spelled(trained, digits, tmp_path, cli, monkeypatch, evaluate):
    out = tmp_path / 'samples'
    cli('sample', trained, '--out', out, '--count', '40', *SAMPLING)
    monkeypatch.chdir(out / 'images')
    for number, spelling in enumerate(('.', '..', '../../samples/images')):
        target = tmp_path / f'{number}.json'
        evaluate(spelling, digits, '--out', target)
        (fid,) = load_results(target)
        assert (fid['run'], fid['protocol']['seed']) == ('digits_tread', 0)


def test_images_that_say_nothing_compare_with_none(digits, tmp_path, evaluate):
    folder = write_folder(tmp_path / 'images', grey_images(30))
    text = evaluate(folder, digits, '--metrics', 'fid', 'kid', '--kid-subset-size', '25').out
    assert 'compare with no others' in text
    fid, kid = load_results(folder / 'results.json')
    assert (fid['metric'], kid['metric']) == ('fd_digits_30', 'kd_digits_30')
    drawn = {'subsets_seed': 2020, 'images': 'in the order of their hashes'}
    assert kid['protocol']['settings'] == {'kid_subset_size': 25, 'kid_subsets': 100, **drawn}
    assert fid['protocol']['seed'] == UNKNOWN
    assert 'seed: unknown for both numbers' in differences(fid['protocol'], fid['protocol'])


def test_a_set_against_itself(tmp_path, digits, evaluate):
    target = tmp_path / 'self.json'
    evaluate(digits, digits, '--metrics', 'fid', 'prc', 'recognised', '--out', target)
    values = {entry['metric']: entry['value'] for entry in load_results(target)}
    assert values.pop('fd_digits_297') == pytest.approx(0, abs=1e-6)
    assert values['precision_digits_297'] == values['recall_digits_297'] == 1.0
    assert values['recognised_digits_297'] > 0.97


def test_the_reference_is_looked_at_once(tmp_path, evaluate):
    folder, reference = (write_folder(tmp_path / name, grey_images(12, seed)) for seed, name in enumerate('ab'))
    for number, looks in enumerate((True, False, True)):
        if number == 2:
            write_folder(reference, grey_images(1, 7))
        text = evaluate(folder, reference, '--out', tmp_path / f'{number}.json').out
        assert ('12 reference images, once' in text) == looks
    first, second, changed = (load_results(tmp_path / f'{number}.json')[0] for number in range(3))
    assert first['value'] == second['value'] != changed['value']
    protocols = ({**entry['protocol'], 'seed': 0} for entry in (first, changed))
    assert [line.split(':')[0] for line in differences(*protocols)].count('reference_hash') == 1


def test_a_file_of_something_else_is_kept(trained, digits, tmp_path, refused):
    (tmp_path / 'results.json').write_text('{"recognised": 0.9}')
    message = refused(trained, digits, '--count', '20', *SAMPLING, '--out', tmp_path / 'results.json')
    assert 'is no list of measured numbers' in message and 'write the numbers elsewhere' in message
    assert (tmp_path / 'results.json').read_text() == '{"recognised": 0.9}'


def test_what_does_not_go_together_is_refused(trained, digits, tmp_path, refused):
    images = write_folder(tmp_path / 'images', grey_images(12))
    large = write_folder(tmp_path / 'large', random_images(12, 16))
    drawn = ('--count', '20')
    for path, reference, words, message in (
        (images, large, [], 'images of 16 pixels, and the samples have 8'),
        (trained, large, drawn, 'images of 16 pixels, and the samples have 8'),
        (images, digits, ['--count', '9', '--steps', '3'], '--count, --steps: of a model'),
        (images, digits, ['autoencoder.path=x'], 'autoencoder.path=x: of a model'),
        (trained, digits, ['autoencoder.path=x', *drawn], 'pixels'),
        (images, digits, ['--kid-subset-size', '1'], '--kid-subset-size: 1 must be at least 2'),
        (images, digits, ['--metrics', 'kid'], 'kid needs 1000 images'),
        (images, digits, ['--metrics', 'recognised'], 'recognised needs the label of each image'),
        (images, digits, ['--features', 'inception'], 'the weights of Inception are not here'),
    ):
        assert message in refused(path, reference, *words)
    assert not list((trained / 'evaluation_samples').glob('*-ba0*')), 'refused before sampling'
    damaged = write_folder(tmp_path / 'damaged', grey_images(12))
    (damaged / '000003.png').write_bytes((damaged / '000003.png').read_bytes()[:40])
    before = sorted((trained / 'evaluation_samples').glob('*'))
    assert '000003.png' in refused(trained, damaged, '--count', '50', *SAMPLING)
    assert sorted((trained / 'evaluation_samples').glob('*')) == before, 'refused before sampling'


def test_unfinished_samples_and_ones_that_were_tampered_with_are_refused(trained, digits, tmp_path, cli, refused):
    out = tmp_path / 'samples'
    cli('sample', trained, '--out', out, '--count', '10', *SAMPLING)
    next((out / 'images').iterdir()).unlink()
    assert 'holds 9 images, and' in refused(out, digits)
    record = json.loads((out / 'samples.json').read_text())
    (out / 'samples.json').write_text(json.dumps({**record, 'complete': False}))
    assert 'is not finished' in refused(out, digits)


def test_prefetch(tmp_path, cli):
    text = cli('prefetch').out
    assert INCEPTION_SHA256 in text and '95,628,359' in text and str(tmp_path / 'torch_home') in text
    np.save(tmp_path / 'other.npy', np.zeros(3))
    assert f'expected {INCEPTION_SHA256}' in cli.refusal('prefetch', '--check', tmp_path / 'other.npy')
    cli.refusal('prefetch', '--check', tmp_path / 'nowhere')


def test_an_adaptive_sampler_is_recorded_by_its_tolerances_and_its_evaluations(trained, digits, tmp_path, evaluate):
    words = ['--count', '20', '--sampler', 'dopri5', '--sampler-settings', 'rtol=1e-2', '--device', 'cpu']
    message = evaluate(trained, digits, *words, '--steps', '9', code=2).err
    assert '--steps: has no effect with --sampler dopri5' in message and 'atol, rtol by --sampler-settings' in message
    evaluate(trained, digits, *words, '--out', tmp_path / 'r.json', '--samples', tmp_path / 'd')
    (entry,) = load_results(tmp_path / 'r.json')
    sampling = entry['protocol']['sampling']
    assert sampling['sampler_settings'] == {'atol': 1e-6, 'rtol': 1e-2} and 'num_steps' not in sampling
    model, taken = load_trained(trained).model, Evaluations()
    settings = SamplingSettings('dopri5', sampler_settings={'rtol': 1e-2})
    model.draw([index % 10 for index in range(20)], list(range(20)), settings, batch_size=7, evaluations=taken)
    assert entry['evaluations'] == pytest.approx(sum(taken.taken) / 20) and min(taken.taken) >= 8
    record = json.loads((tmp_path / 'd' / 'samples.json').read_text())
    once, shapes = SamplingSettings('euler', num_steps=1), {'latent_shape': (1, 8, 8), 'null_label': 10}
    cost = guidance_cost(model.denoiser, model.objective, once, **shapes).gmacs
    assert record['gmacs_per_image'] / record['evaluations'] == pytest.approx(cost)
