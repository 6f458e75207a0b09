"""Image or mirror, and the order of both on several ranks and after a checkpoint."""

import os
import resource
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.worlds import SAMPLES, read_mirrors, trained_batches, write_shards
from tests.warm import on_ranks
from tread_composer.core.batch import LABELS, RAW_LATENTS, SAMPLE_IDS
from tread_composer.data.latents import LatentDataset, mirror_choices
from tread_composer.data.loaders import train_loader


@pytest.fixture
def mirrored(tmp_path: Path) -> Path:
    return write_shards(tmp_path / 'mirrored', mirrored=True, size_limit=1024)


def test_both_are_drawn_about_equally_and_anew_each_epoch():
    choices = np.stack([mirror_choices(5, epoch, 1001) for epoch in range(20)])
    assert abs(choices.mean() - 0.5) < 4 * 0.5 / np.sqrt(choices.size)  # 4 standard errors
    assert (np.abs(choices.mean(0) - 0.5) < 0.5).all()  # no sample is always the one or always the other
    assert 350 < (choices[0] != choices[1]).sum() < 650
    assert 350 < (choices[0] != mirror_choices(6, 0, 1001)).sum() < 650
    assert np.array_equal(choices[3], mirror_choices(5, 3, 1001))
    assert np.array_equal(choices[3, :64], mirror_choices(5, 3, 64))  # a function of the sample, not of the size


def test_an_epoch_takes_image_or_mirror_and_never_another_sample(mirrored: Path):
    loader = train_loader(mirrored, batch_size=16, mirror_seed=5)
    for epoch in range(2):
        chosen = mirror_choices(5, epoch, SAMPLES)
        for batch in loader:
            sign = torch.from_numpy(1 - 2 * chosen[batch[SAMPLE_IDS].numpy()].astype(int))
            expected = (sign * (batch[SAMPLE_IDS] + 1)).half().view(-1, 1, 1, 1).expand(-1, 1, 4, 6)
            assert torch.equal(batch[RAW_LATENTS], expected)
            assert torch.equal(batch[LABELS], batch[SAMPLE_IDS] % 3)


def test_without_a_seed_and_by_position_it_is_the_image_and_absent_mirrors_are_refused(mirrored: Path, split: Path):
    assert all(bool((batch[RAW_LATENTS] > 0).all()) for batch in train_loader(mirrored, batch_size=16))
    assert bool((LatentDataset(mirrored, batch_size=16, mirror_seed=5)[7][RAW_LATENTS] == 8).all())
    with pytest.raises(ValueError, match=r'hold no mirrored latents.*convert the images again'):
        train_loader(split, batch_size=16, mirror_seed=5)


@pytest.mark.parametrize(('world_size', 'num_workers'), [(2, 0), (3, 2)])
def test_global_batches_are_the_same_sets_on_any_number_of_ranks(mirrored: Path, world_size: int, num_workers: int):
    alone = read_mirrors(mirrored, 12, 0)
    assert read_mirrors(mirrored, 12, num_workers) == alone
    ranks = on_ranks(world_size, read_mirrors, mirrored, 12, num_workers)
    together = [
        [sorted(chain.from_iterable(batches)) for batches in zip(*epochs, strict=True)]
        for epochs in zip(*ranks, strict=True)
    ]
    assert together == [[sorted(batch) for batch in epoch] for epoch in alone]


@pytest.mark.parametrize('num_workers', [0, 2])
def test_a_resumed_run_goes_on_with_the_next_sample_and_its_mirror(mirrored: Path, tmp_path: Path, num_workers: int):
    whole = trained_batches(mirrored, tmp_path / 'whole', num_workers)
    assert len(whole) == 18
    for batch in (5, 12, 15):  # 12 batches an epoch
        checkpoint = str(tmp_path / 'whole' / f'ba{batch}.pt')
        assert trained_batches(mirrored, tmp_path / f'rest{batch}', num_workers, checkpoint) == whole[batch:]


def test_more_shards_than_a_process_may_have_open_files(mirrored: Path):
    assert len(list(mirrored.glob('*.mds'))) > 20
    loader = train_loader(mirrored, batch_size=8)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    here = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (here + 12, before[1]))
    try:
        assert sum(len(batch[LABELS]) for batch in loader) == SAMPLES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
