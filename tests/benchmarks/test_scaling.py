"""``benchmarks/scaling.py`` with tiny sizes: its rows, its model, its picture."""

import json

import pytest
import scaling
from PIL import Image


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp('scaling')
    sizes = ['--tokens', '16', '256', '--depths', '4', '--rates', '0', '0.5', '--ranks', '2', '--width', '64']
    files = ['--out', str(folder / 'rows.jsonl'), '--picture', str(folder / 'picture.png')]
    assert scaling.main([*sizes, '--turns', '2', *files]) == 0
    rows = [json.loads(line) for line in (folder / 'rows.jsonl').read_text().splitlines()]
    return {(row['curve'], row['x'], row['contender']): row for row in rows}, folder / 'picture.png'


def test_every_point_is_measured_dense_and_routed(measured):
    rows, _ = measured
    points = [('tokens', 16), ('tokens', 256), ('depth', 4), ('selection rate', 0), ('selection rate', 0.5)]
    points += [('ranks', 1), ('ranks', 2)]
    assert {*rows} == {(*point, name) for point in points for name in ('dense', 'routed')}
    for row in rows.values():
        assert 0 < row['measured']['low'] <= row['measured']['median'] <= row['measured']['high']


def test_the_model_knows_the_reference_alone(measured):
    rows, _ = measured
    model = {key: row['model'] for key, row in rows.items()}
    assert model['tokens', 256, 'dense'] == pytest.approx(1)
    assert model['selection rate', 0, 'routed'] == model['selection rate', 0, 'dense'] == pytest.approx(1)
    assert model['tokens', 16, 'dense'] < model['tokens', 256, 'routed'] < 1
    assert model['ranks', 2, 'dense'] == 2
    assert model['ranks', 1, 'routed'] == pytest.approx(1 / model['tokens', 256, 'routed'])
    # Blocks are nearly all of this network, so half of them are about half of it.
    assert 0.5 < model['depth', 4, 'dense'] < 0.6


def test_the_picture_has_a_panel_for_each_curve(measured):
    width, height = Image.open(measured[1]).size
    assert width == 4 * height
