"""The Measurer: on several ranks the numbers of one, the reference looked at once, refusals before any image."""

import math

import pytest
import torch

from tests.metrics.small import as_batch, grey_images, random_images, write_folder
from tests.warm import on_ranks
from tread_composer.core.errors import UserError
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.features import looked
from tread_composer.metrics.measurement import Measurement
from tread_composer.metrics.measurer import Measurer
from tread_composer.metrics.metric import Figure, Quantity

CPU = torch.device('cpu')
DRAWN = {'weights': 'ema', 'labels': 'none', 'seed': 0, 'sampling': 'unknown', 'autoencoder': 'pixels',
         'autoencoder_hash': None, 'decode_dtype': 'float32', 'uint8_rule': 'rounded'}  # fmt: skip


def measurement(root, **changes) -> Measurement:
    small = {'metrics': ('fid', 'kid', 'prc'), 'features': 'digits', 'kid_subset_size': 10, 'batch_size': 7}
    return Measurement(str(root / 'reference'), **{**small, 'cache': root / 'cache', **changes})


def numbers(root, cache, **changes):
    """In a process of its own, one of one or more: what this rank measures of its share, and what it logs."""
    ranks, lines = Ranks.start(), []
    measurer = Measurer(measurement(root, cache=root / cache, **changes), CPU, ranks, lines.append)
    measurer.check(24, 8)
    images = as_batch(grey_images(24, seed=1))[ranks.rank :: ranks.world]
    figures = measurer.figures(looked(images.split(5), measurer.extractor))
    return {figure.quantity.name: figure.value for figure in figures}, lines


def test_two_ranks_share_the_work_and_the_first_has_the_numbers_of_one(tmp_path):
    write_folder(tmp_path / 'reference', grey_images(20))
    (first, lines), (second, _) = on_ranks(2, numbers, tmp_path, 'two')
    alone, again = numbers(tmp_path, 'one'), numbers(tmp_path, 'one')
    assert second == {} and first.keys() == alone[0].keys() == {'fid', 'kid', 'precision', 'recall'}
    assert first == pytest.approx(alone[0], rel=1e-6)
    assert len(lines) == len(alone[1]) == 1 and '20 reference images, once' in lines[0]
    assert again == (alone[0], [])
    assert len(list((tmp_path / 'two').iterdir())) == len(list((tmp_path / 'one').iterdir())) == 1


def test_grey_images_are_measured_as_their_three_equal_channels(tmp_path):
    write_folder(tmp_path / 'reference', grey_images(20))
    measurer = Measurer(measurement(tmp_path), CPU)
    images = as_batch(grey_images(12, seed=1))
    sets = [looked([batch], measurer.extractor) for batch in (images, images[:, :1])]
    assert measurer.figures(sets[0]) == measurer.figures(sets[1])


def test_entries_say_with_what_they_were_measured(tmp_path):
    write_folder(tmp_path / 'reference', grey_images(20))
    measurer = Measurer(measurement(tmp_path, metrics=('kid',)), CPU)
    figures = measurer.figures(looked([as_batch(grey_images(12, seed=1))], measurer.extractor))
    (entry,) = measurer.entries(figures, DRAWN, 12, 8, source='here', run='a run')
    assert (entry['metric'], entry['run'], entry['value']) == ('kd_digits_12', 'a run', figures[0].value)
    assert entry['unit'] == 'squared MMD' and entry['better'] == 'lower'
    protocol = entry['protocol']
    assert protocol['reference_hash'] == measurer.reference.hash and protocol['features']['name'] == 'digits'
    assert protocol['settings']['kid_subset_size'] == 10 and protocol['num_samples'] == 12


def test_impossible_measurements_are_refused_before_an_image_is_looked_at(tmp_path):
    write_folder(tmp_path / 'reference', random_images(20))
    for changes, message in (
        ({'features': 'clip'}, "'clip' is none of inception, digits"),
        ({'metrics': ('is',)}, 'these features have none'),
        ({'metrics': ('kid',), 'kid_subset_size': 25}, 'kid needs 25 images'),
    ):
        with pytest.raises(UserError, match=message):
            measurement(tmp_path, **changes).check(24)
    measurer = Measurer(measurement(tmp_path), CPU)
    with pytest.raises(UserError, match='images of 8 pixels, and the samples have 16'):
        measurer.check(24, 16)
    with pytest.raises(UserError, match='kid needs 10 images on each side, and there are 9 samples'):
        measurer.check(9, 8)
    with pytest.raises(UserError, match='in colour'):
        measurer.prepare()
    assert not (tmp_path / 'cache').exists()


def test_a_number_that_is_none_is_refused(tmp_path):
    write_folder(tmp_path / 'reference', grey_images(4))
    measurer, figure = Measurer(measurement(tmp_path), CPU), Figure(Quantity('fid', 'lower', ''), math.nan)
    with pytest.raises(UserError, match='fid_digits_9: came out as nan'):
        measurer.entries([figure], DRAWN, 9, 8, source='s')
