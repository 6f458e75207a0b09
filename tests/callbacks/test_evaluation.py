"""Evaluation: what it writes, that training does not notice, and the same numbers on one rank and on two."""

import json
import logging
import random
import time

import numpy as np
import pytest
import torch
from composer.loggers import InMemoryLogger
from composer.utils import dist

from tests.callbacks.small import Files, Painter, digits_model, trainer
from tests.helpers import Recorder, assert_equal_weights, make_trainer, weights
from tests.metrics.small import extract, random_images, write_folder
from tests.runs import YAMLS
from tests.warm import on_ranks
from tread_composer.algorithms.ema import EMA
from tread_composer.callbacks.evaluation import Evaluation
from tread_composer.config import check_files, load_config
from tread_composer.core.errors import UserError
from tread_composer.metrics.features import open_extractor
from tread_composer.metrics.metric import Comparison, build_metrics, measure
from tread_composer.metrics.protocol import differences, load_results, series_name
from tread_composer.metrics.published import statistics
from tread_composer.metrics.references import open_reference
from tread_composer.objectives import FlowMatching


def evaluation(folder, reference, interval='2ba', **settings):
    small = {'features': 'digits', 'num_samples': 20, 'num_steps': 2, 'metrics': ['fid', 'prc'], 'batch_size': 8}
    places = {'folder': str(folder / 'run'), 'cache': str(folder / 'cache')}
    return Evaluation(str(reference), interval, **{**small, **places, **settings})


def streams():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_training_goes_on_as_without_it_to_the_bit(tmp_path, digits, capsys):
    def train(*callbacks):
        recorder = Recorder()
        made = make_trainer(digits_model(), algorithms=[EMA(decay=0.5)], callbacks=[recorder, *callbacks])
        random.seed(5)
        made.fit()
        return recorder, made, streams()

    recorder, made, at_end = train(evaluation(tmp_path, digits / 'eval'))
    assert '297 reference images, once' in capsys.readouterr().err
    plain_recorder, plain, plain_at_end = train()
    assert recorder.losses == plain_recorder.losses
    assert recorder.batches == plain_recorder.batches
    assert len(recorder.losses) == 6
    assert at_end == plain_at_end
    assert_equal_weights(weights(made), weights(plain))
    assert [entry['batch'] for entry in load_results(tmp_path / 'run' / 'results.json')][::3] == [2, 4, 6]


def test_what_is_written_is_what_the_images_of_the_average_give(tmp_path, digits):
    files = Files()
    callback = evaluation(tmp_path, digits / 'eval', '6ba', seed=3)
    model, ema = digits_model(), EMA(decay=0.5)
    made = make_trainer(model, algorithms=[ema], callbacks=[callback], loggers=[files], run_name='six')
    made.fit()
    entries = load_results(tmp_path / 'run' / 'results.json')
    assert [entry['metric'] for entry in entries] == ['fd_digits_20', 'precision_digits_20', 'recall_digits_20']
    with ema.averaged(made.state):
        latents = model.sample([i % 10 for i in range(20)], [3 + i for i in range(20)], num_steps=2)
    images = ((latents + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
    extractor = open_extractor('digits')
    reference = open_reference(digits / 'eval').features(extractor, None)
    against = Comparison(statistics(reference.features_ND), reference)
    figures = measure(build_metrics(['fid', 'prc'], {}), extract([images], extractor), against)
    # Drawn in other batches than in training: a byte may differ by one.
    assert [e['value'] for e in entries] == pytest.approx([figure.value for figure in figures], rel=2e-3, abs=0.051)
    assert entries[0]['value'] > 10
    for entry in entries:
        assert (entry['run'], entry['batch']) == ('six', 6)
        assert entry['training']['seconds'] > 0
        assert float(files.data[series_name(entry['metric'], entry['protocol'])][-1][1]) == entry['value']
    assert files.files == [('results.json', None)]
    protocol = entries[0]['protocol']
    assert protocol['reference_hash'] == open_reference(digits / 'eval').hash
    assert protocol['features'] == extractor.identity()
    expected = {'weights': 'ema', 'num_samples': 20, 'labels': 'balanced', 'seed': 3, 'resolution': 8}
    assert {key: protocol[key] for key in expected} == expected
    assert protocol['sampling']['num_steps'] == 2
    assert (protocol['autoencoder'], protocol['autoencoder_hash']) == ('pixels', None)
    assert protocol['time_grid'] == {'objective': 'flow_matching', 'sampling_shift': 1.0, 'corrected_at_zero': True}
    assert protocol['weak'] == 'none' and differences(protocol, protocol) == []
    assert any('fd_digits_20' in text for _, text in callback.summary(made.state))


class Walls(Painter):
    """Paints without an autoencoder."""

    autoencoder = None
    objective = FlowMatching()  # else nobody knows at which times it was sampled


def paint(callback, model=None, **settings):
    made = trainer('4ba', model or Walls(), callbacks=[callback], **settings)
    made.fit()
    return made


def test_numbers_repeat_and_those_of_other_settings_do_not_compare(tmp_path, digits):
    for place, settings in (('a', {}), ('b', {}), ('c', {'batch_size': 5}), ('d', {'num_samples': 30})):
        paint(evaluation(tmp_path / place, digits / 'eval', '4ba', weights='raw', **settings))
    a, b, c, d = (load_results(tmp_path / place / 'run' / 'results.json')[0] for place in 'abcd')
    assert (a['value'], a['protocol']) == (b['value'], b['protocol'])
    assert c['value'] == pytest.approx(a['value'], rel=1e-6)
    assert differences(a['protocol'], c['protocol']) == []
    assert differences(a['protocol'], d['protocol']) == ['num_samples: 20 and 30']


def test_the_time_of_measuring_is_not_counted_as_training(tmp_path, digits):
    class Slow(Walls):
        def sample(self, *args, **settings):
            time.sleep(0.2)
            return super().sample(*args, **settings)

    paint(evaluation(tmp_path, digits / 'eval', '1ba', weights='raw', metrics=['fid']), Slow())
    seconds = [entry['training']['seconds'] for entry in load_results(tmp_path / 'run' / 'results.json')]
    assert len(seconds) == 4
    assert seconds == sorted(seconds)
    assert 0 < seconds[-1] < 1.0  # three measurements of 0.6 s came before


def test_a_diverged_model_is_not_measured_and_training_goes_on(tmp_path, digits, caplog):
    model = Walls()
    with torch.no_grad():
        model.pictures.weight[3].fill_(float('nan'))
    memory = InMemoryLogger()
    with caplog.at_level(logging.WARNING):
        made = paint(evaluation(tmp_path, digits / 'eval', '2ba', weights='raw'), model, loggers=[memory])
    assert int(made.state.timestamp.batch) == 4
    assert not (tmp_path / 'run' / 'results.json').exists()
    assert 'images are not finite' in caplog.text
    assert float(memory.data['evaluation/images_not_finite'][0][1]) >= 2


def test_what_would_fail_later_is_refused_at_the_start(tmp_path, digits, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'empty'))
    large = write_folder(tmp_path / 'large', random_images(30, 16))

    def refused(message, reference=digits / 'eval', **settings):
        with pytest.raises(UserError, match=message):
            paint(evaluation(tmp_path, reference, weights='raw', **settings))

    refused('no multiple of the 10 classes', num_samples=25)
    refused('no such file', tmp_path / 'nowhere')
    refused('images of 16 pixels, and the samples have 8', large)
    refused('weights of Inception are not here', features='inception')
    refused('297 reference images', metrics=['kid'], num_samples=300, kid_subset_size=300)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'results.json').write_text('{}')
    refused('is no list of measured numbers')


def test_impossible_settings_are_refused(tmp_path):
    for message, settings in {
        'choose of fid': {'metrics': ['fvd']},
        'these features have none': {'metrics': ['is']},
        "'clip' is none of inception, digits": {'features': 'clip'},
        'must be at least 2': {'num_samples': 1},
        "'mine'; choose of balanced, random": {'labels': 'mine'},
    }.items():
        with pytest.raises(UserError, match=message):
            evaluation(tmp_path, tmp_path, **settings)


def test_the_configuration_knows_it_and_refuses_what_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))

    def load(settings='features: digits', reference='data/digits/eval', *more):
        setting = f'callbacks.evaluation={{reference: {reference}, num_samples: 500, interval: 350ba, {settings}}}'
        return load_config(YAMLS / 'digits.yaml', ['callbacks.digits_quality=null', setting, *more])

    assert load().callbacks['evaluation'].build().measurement.features == 'digits'
    check_files(load())  # the digits are made before training
    check_files(load(reference='digits'))
    refusals = {
        'add it, or set weights: raw': lambda: load('features: digits', 'data/digits/eval', 'algorithms.ema=null'),
        'sampler: .*hoin': lambda: load('features: digits, sampler: hoin'),
        'inception: the weights of Inception are not here': lambda: check_files(load('metrics: [fid]')),
    }
    load('features: digits', 'x', 'callbacks.digits_quality={}')  # their numbers have protocols of their own
    for message, act in refusals.items():
        with pytest.raises(UserError, match=message):
            act()


def measured(folder, reference):
    """In a process of its own, one of one or two."""
    callback = evaluation(folder, reference, '6ba', num_samples=30, batch_size=7, weights='raw')
    model = digits_model()
    make_trainer(model, callbacks=[callback], lr=0.0, run_name='ranks').fit()
    path = folder / 'run' / 'results.json'
    dist.barrier()
    return [(entry['metric'], entry['value']) for entry in json.loads(path.read_text())]


def test_two_ranks_measure_what_one_measures(tmp_path, digits):
    two = on_ranks(2, measured, tmp_path / 'two', digits / 'eval')
    one = dict(measured(tmp_path / 'one', digits / 'eval'))
    assert two[0] == two[1]
    assert dict(two[0]).keys() == one.keys()
    for name, value in two[0]:
        assert value == pytest.approx(one[name], rel=2e-3, abs=1e-3)
