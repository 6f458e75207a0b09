"""Sharded checkpoints of two ranks under FSDP2 on the CPU: whole on all ranks, or not taken."""

import os
import sys

import pytest
import torch

from tests.runs import ROOT, launch
from tread_composer.io.checkpoints import damage


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    folder = tmp_path_factory.mktemp('sharded')
    words = [sys.executable, str(ROOT / 'tests' / 'weights' / 'sharded_worlds.py'), str(folder)]
    done = launch(folder, [*words, 'die'], ranks=2)
    assert done.returncode in (-9, 1), done.stdout + done.stderr
    entries = {path.name for path in (folder / 'killed').iterdir()}
    assert entries == {'ep0-ba2', '.unfinished-ep1-ba4', 'latest-rank0.pt'}
    done = launch(folder, [*words, 'resume'], ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = [torch.load(folder / f'resume{rank}.pt', weights_only=True) for rank in range(2)]
    whole = torch.load(folder / 'die0.pt', weights_only=True)['whole']
    return folder, done.stderr, ranks, whole


@pytest.mark.parametrize(
    ('name', 'batches'),
    [('killed', 4), ('of composer', 2), ('a rank is missing', 2), ('a bit', 2), ('a half of composer', 4), ('room', 2)],
)
def test_it_goes_on_from_the_newest_whole_one_to_the_same_end(worlds, name, batches):
    _, _, (seen, _), whole = worlds
    assert seen[name]['batches'] == batches
    for part in ('weights', 'average'):
        assert whole[part] and all(torch.equal(value, seen[name][part][key]) for key, value in whole[part].items())


def test_what_is_left_is_whole_and_latest_names_the_newest(worlds):
    folder, errors, *_ = worlds
    aside = {'a half of composer': 'ep1-ba4', 'a rank is missing': 'ep2-ba6', 'a bit': 'ep2-ba6'}
    for name in ('killed', 'of composer', 'full', *aside):
        assert os.readlink(folder / name / 'latest-rank0.pt') == 'ep2-ba6'
        entries = {path.name for path in (folder / name).iterdir()}
        damaged = {f'{aside[name]}.damaged'} if name in aside else set()
        assert entries == {'ep0-ba2', 'ep1-ba4', 'ep2-ba6', 'latest-rank0.pt', *damaged}
        assert damage(folder / name / 'ep2-ba6') is None
    for name, file in (('a rank is missing', '__1_0.distcp'), ('a bit', '__0_0.distcp')):
        (line,) = [line for line in errors.splitlines() if f'{name}/ep2-ba6' in line]
        assert 'ep2-ba6.damaged' in line and file in line


def test_the_full_disk_of_one_rank_stops_all_in_words(worlds):
    _, _, ranks, _ = worlds
    for seen in ranks:
        for text in (seen['full'], seen['full of replicas']):
            assert text.startswith('save_folder: a checkpoint could not be written'), text
    assert ranks[0]['left'] == {'ep0-ba2', 'ep1-ba4', 'latest-rank0.pt'}
    assert ranks[0]['left_of_replicas'] == {'ep0-ba2-rank0.pt', 'latest-rank0.pt'}
    assert [seen['replicas']['batches'] for seen in ranks] == [4, 4]
