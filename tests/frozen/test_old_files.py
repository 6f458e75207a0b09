"""Files of an earlier version still do what they did: resumed, sampled, evaluated, exported through the command line.

``record.py --check --only files`` compares the same to the bit. Here what depends on the order of sums may differ by
rounding, so that other processors and other versions of torch pass.
"""

import re
from typing import Any

import numpy as np
import pytest

from tests.frozen.commands import Commands
from tests.frozen.old_files import EXPORTS
from tests.frozen.record import load, record_files

NUMBER = re.compile(r'\d+\.\d+')
DIGEST = re.compile(r'sha256:[0-9a-f]{64}')


@pytest.fixture(scope='module')
def now(tmp_path_factory) -> dict[str, Any]:
    return record_files(Commands(tmp_path_factory.mktemp('old_files')))


@pytest.fixture(scope='module')
def recorded() -> dict[str, Any]:
    return load('files')


@pytest.mark.parametrize('weights', ['ema', 'raw', 'posthoc:0.1', 'of the exported file'])
def test_weights_that_were_stored_come_out_to_the_bit(now, recorded, weights):
    """Of the average, the run, one of its snapshots and the exported file; with the words that say what they are."""
    result, before = now['exported'][weights], recorded['exported'][weights]
    assert {**result, 'norms': None} == {**before, 'norms': None}
    assert result['norms'] == pytest.approx(before['norms'], rel=1e-12)  # of equal weights: sums in another order


def test_an_average_made_afterwards_is_the_same(now, recorded):
    assert_same_norms(now['exported']['posthoc:0.09'], recorded['exported']['posthoc:0.09'], 1e-6)


@pytest.mark.parametrize('of', ['of the run', 'of the run, raw', 'of the run, post-hoc', 'of the exported file'])
def test_samples_are_the_same_images(now, recorded, of):
    drawn, before = now['sampled'][of], recorded['sampled'][of]
    assert drawn['said'] == before['said'] and drawn['pixels'].keys() == before['pixels'].keys()
    for name, pixels in drawn['pixels'].items():
        images = [np.frombuffer(bytes.fromhex(text), np.uint8).astype(int) for text in (pixels, before['pixels'][name])]
        assert images[0].size == 64 and abs(images[0] - images[1]).max() <= 1, name


def test_the_run_is_resumed(now, recorded):
    """Where it ended, with the losses, weights, averages and snapshots that the version before made of it."""
    resumed, before = now['resumed'], recorded['resumed']
    assert resumed['batches'] == before['batches'] == 'batches 20 to 30'
    losses = [[float.fromhex(text) for text in side['losses']] for side in (resumed, before)]
    assert len(losses[0]) == 10 and losses[0] == pytest.approx(losses[1], rel=1e-5)
    for weights in EXPORTS:
        assert_same_norms(resumed['weights'][weights], before['weights'][weights], 1e-4)
    assert resumed['snapshots'] == before['snapshots']


def test_the_exported_file_is_evaluated(now, recorded):
    lines = [[NUMBER.sub('<number>', line) for line in side['evaluated']] for side in (now, recorded)]
    assert lines[0] == lines[1]
    numbers = [[float(text) for text in NUMBER.findall(' '.join(side['evaluated']))] for side in (now, recorded)]
    assert numbers[0] and numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def assert_same_norms(now: dict[str, Any], before: dict[str, Any], rel: float) -> None:
    """Same tensors up to rounding, and the same words about them but for the digest."""
    assert now['norms'] == pytest.approx(before['norms'], rel=rel, abs=1e-7)
    assert [DIGEST.sub('', line) for line in now['said']] == [DIGEST.sub('', line) for line in before['said']]
