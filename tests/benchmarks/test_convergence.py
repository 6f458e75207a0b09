"""``benchmarks/convergence.py`` on ten classes of coloured squares: cut off, gone on with, and what it leaves."""

import csv
import json
import sys

import convergence
import numpy as np
import pytest
from PIL import Image

from tests.runs import ROOT, launch
from tread_composer.cli.convert import convert_main


@pytest.fixture
def data(tmp_path):
    """160 images to train on and 40 held out, as the converter writes CIFAR-10's."""
    random = np.random.default_rng(0)
    for split, count in (('train', 16), ('val', 4)):
        for label in range(10):
            folder = tmp_path / 'images' / split / f'class{label}'
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 60, (32, 32, 3)) + 18 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f'{number}.png')
    words = ['--source', str(tmp_path / 'images'), '--out', str(tmp_path / 'data'), '--pixels', '--resolution', '32']
    assert convert_main(words) == 0
    return tmp_path / 'data'


def compare(data, *words):
    script = str(ROOT / 'benchmarks' / 'convergence.py')
    settings = '--small --steps 4 --points 2 --samples 20 --seeds 17 --classifier-epochs 1 --methods TREAD'
    return launch(data.parent, [sys.executable, script, 'cifar10', '--data', str(data), *settings.split(), *words])


def test_a_comparison_that_is_cut_off_goes_on_and_measures_all(data):
    cut = compare(data, '--minutes', '0.01')
    assert cut.returncode == 3 and 'TREAD, seed 17: goes on from its checkpoint with the same command' in cut.stderr
    done = compare(data)
    assert done.returncode == 0, done.stderr
    folder = data.parent / 'runs' / 'convergence' / 'cifar10'
    kept = json.loads((folder / 'results.json').read_text())
    points = kept['results']['TREAD']['17']
    assert [point['step'] for point in points] == [2, 4] and '| TREAD | 1 |' in done.stdout
    for point in points:
        assert point['fd_image_classifier_20'] > 0 and 0 <= point['recognised_image_classifier_20'] <= 1
    assert (folder / 'convergence.png').stat().st_size > 10_000
    with open(folder / 'cifar10_tread_17' / 'loss.csv') as file:
        assert [int(row['batch']) for row in csv.DictReader(file)] == [1, 2, 3, 4]  # of batches, not of steps
    protocol = json.loads((folder / 'cifar10_tread_17' / 'results.json').read_text())[0]['protocol']
    assert 'of 40 held-out images recognised' in json.dumps(protocol)
    other = data.parent / 'other.json'  # of another machine: a further seed of one method, and another method
    other.write_text(json.dumps(kept | {'results': {'TREAD': {'18': points}, 'dense': {'17': points}}}))
    joined = compare(data, '--join', str(other))
    assert joined.returncode == 0 and 'seeds [17, 18]' in joined.stdout, joined.stderr
    assert '| TREAD | 2 |' in joined.stdout and '| dense | 1 |' in joined.stdout
    assert json.loads((folder / 'results.json').read_text())['results']['TREAD'] == {'17': points, '18': points}
    other.write_text(json.dumps(kept | {'protocol': kept['protocol'] | {'num_samples': 50}}))
    changed = json.loads(other.read_text())
    with pytest.raises(SystemExit, match=r'do not join with ours: num_samples: 20 and 50$'):
        convergence.join({}, kept['protocol'], other, changed)
    with pytest.raises(SystemExit, match=r'do not join with ours: TREAD, seed 17, is ours too$'):
        convergence.join({'TREAD': {17: points}}, kept['protocol'], other, kept)


def test_seconds_are_compared_seed_by_seed_since_seeds_may_come_from_machines_of_other_speed():
    dense = {17: [{'seconds': 50.0}, {'seconds': 100.0}], 19: [{'seconds': 100.0}, {'seconds': 200.0}]}
    results = {'dense': dense, 'TREAD': {19: [{'seconds': 80.0}, {'seconds': 160.0}]}}
    assert convergence.time_share(results, 'TREAD') == pytest.approx(0.8)
    assert convergence.time_share({'TREAD': results['TREAD']}, 'TREAD') is None
