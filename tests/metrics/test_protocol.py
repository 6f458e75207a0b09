import dataclasses
import json
import threading

import pytest

from tests.metrics.small import PROTOCOL
from tread_composer.core.errors import UserError
from tread_composer.metrics.metric import build_metrics
from tread_composer.metrics.protocol import (
    UNKNOWN,
    Protocol,
    append_results,
    by_protocol,
    differences,
    load_results,
    protocol_key,
    series_name,
)


def changed(**values):
    return {**PROTOCOL, **values}


def test_equal_protocols_compare_also_after_being_stored():
    stored = json.loads(json.dumps(PROTOCOL))
    assert differences(PROTOCOL, stored) == []
    assert differences(PROTOCOL, changed(sampling={**PROTOCOL['sampling'], 'guidance_scale': 1})) == []


@pytest.mark.parametrize('name', [field.name for field in dataclasses.fields(Protocol)])
def test_every_part_of_a_protocol_counts(name):
    other = changed(**{name: {'name': 'another'} if isinstance(PROTOCOL[name], dict) else 'another'})
    if name == 'time_grid':
        other = changed(time_grid={'objective': 'edm', 'rho': 7.0})
    if name == 'autoencoder':  # a name beside an equal hash
        assert differences(PROTOCOL, other) == []
        other = {**other, 'autoencoder_hash': 'sha256:dd'}
    assert any(line.startswith(name) for line in differences(PROTOCOL, other))


def test_a_difference_within_a_section_is_named_and_another_name_of_the_same_reference_is_none():
    other = changed(sampling={**PROTOCOL['sampling'], 'num_steps': 25}, reference={'name': 'copy.npz', 'kind': 'adm'})
    assert differences(PROTOCOL, other) == ['sampling.num_steps: 50 and 25']


def test_what_is_unknown_never_compares_not_even_with_itself():
    unknown = changed(seed=UNKNOWN)
    assert differences(unknown, PROTOCOL) == ['seed: unknown for the first']
    assert differences(unknown, unknown) == ['seed: unknown for both numbers']
    stored = {name: value for name, value in PROTOCOL.items() if name != 'decode_dtype'}
    assert differences(PROTOCOL, stored) == ['decode_dtype: unknown for the second']


def test_numbers_of_an_earlier_version_are_read_and_compare_with_nothing(tmp_path):
    old = {name: value for name, value in PROTOCOL.items() if name not in ('time_grid', 'weak')}
    (tmp_path / 'results.json').write_text(json.dumps([{'metric': 'fid', 'value': 2.0, 'protocol': old}]))
    assert load_results(tmp_path / 'results.json')[0]['protocol'] == old
    lines = differences(old, PROTOCOL)
    assert sorted(lines) == ['time_grid: unknown for the first', 'weak: unknown for the first']
    assert sorted(differences(PROTOCOL, changed(sampling=UNKNOWN))) == ['sampling: unknown for the second']


def test_the_key_of_a_protocol_is_the_same_where_there_is_no_difference():
    key = protocol_key(PROTOCOL)
    assert key == protocol_key(json.loads(json.dumps(PROTOCOL)))
    assert key == protocol_key(changed(sampling={**PROTOCOL['sampling'], 'guidance_scale': 1}))
    assert key == protocol_key(changed(reference={'name': 'copy.npz', 'kind': 'adm'}, autoencoder='/data/vae'))
    for values in ({'seed': 1}, {'seed': UNKNOWN}, {'autoencoder_hash': None}, {'reference_hash': 'sha256:ee'}):
        assert key != protocol_key(changed(**values))
    pixels = changed(autoencoder='pixels', autoencoder_hash=None)
    assert protocol_key(pixels) != protocol_key({**pixels, 'autoencoder': 'other'})


def test_a_series_has_some_of_the_protocol_in_its_name():
    guided = changed(sampling={**PROTOCOL['sampling'], 'guidance': 'classifier_free', 'guidance_scale': 1.5})
    name = series_name('fid_10000', guided)
    assert name.startswith('evaluation/fid_10000/ema-heun-50-classifier_free-1.5-')
    assert series_name('fid_10000', PROTOCOL).startswith('evaluation/fid_10000/ema-heun-50-')
    assert series_name('fid_10000', changed(seed=1)) != series_name('fid_10000', PROTOCOL)
    assert series_name('fid', changed(sampling=UNKNOWN)).startswith('evaluation/fid/ema-')


@pytest.mark.parametrize(
    ('metric', 'position', 'features', 'count', 'name'),
    [
        ('fid', 0, 'inception', 50_000, 'fid'),
        ('fid', 0, 'inception', 49_999, 'fid_49999'),
        ('is', 0, 'inception', 10_000, 'inception_score_10000'),
        ('fid', 0, 'digits', 500, 'fd_digits_500'),
        ('kid', 0, 'digits', 50_000, 'kd_digits'),
        ('prc', 1, 'inception', 5_000, 'recall_5000'),
    ],
)
def test_a_name_says_how_many_samples_and_which_features(metric, position, features, count, name):
    (built,) = build_metrics([metric], {})
    assert built.quantities[position].reported(features, count) == name


def result(value: float, batch: int | None = None) -> dict:
    return {'metric': 'fid', 'value': value, 'protocol': PROTOCOL, 'source': 'runs/a', 'batch': batch}


def test_results_are_appended_and_a_repeated_measurement_replaces_the_first(tmp_path):
    path = tmp_path / 'run' / 'results.json'
    for value, batch in ((3.5, 100), (3.4, 200), (3.6, 100)):
        append_results(path, [result(value, batch)])
    assert [(entry['batch'], entry['value']) for entry in load_results(path)] == [(100, 3.6), (200, 3.4)]


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    path = tmp_path / 'results.json'
    threads = [threading.Thread(target=append_results, args=(path, [result(1.0, index)])) for index in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry['batch'] for entry in load_results(path)) == list(range(20))


def test_a_file_of_something_else_is_kept(tmp_path):
    path = tmp_path / 'results.json'
    for content, message in (('{"recognised": 0.9}', 'no list of measured numbers'), ('[{}]', 'has no proper metric')):
        path.write_text(content)
        with pytest.raises(UserError, match=message):
            append_results(path, [result(1.0)])
        assert path.read_text() == content


def test_protocols_are_grouped_and_what_is_of_a_metric_stays_with_it():
    kid = changed(settings={'kid_subset_size': 5})
    groups = by_protocol([('fid', PROTOCOL), ('is', changed(seed=1)), ('kid', kid), ('fid', kid)])
    assert [names for _, names in groups] == [['fid', 'kid'], ['is']]
    assert groups[1][0] == {k: v for k, v in changed(seed=1).items() if k != 'settings'}
    assert groups[0][0] == {**PROTOCOL, 'settings': {'kid': kid['settings'], 'fid': kid['settings']}}
