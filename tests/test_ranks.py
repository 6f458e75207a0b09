"""Two real processes (gloo, DDP): every rank, sample and step has a route of its own."""

import json
import sys

import pytest

from tests.runs import ROOT, launch


def record(folder, ranks, keyed_by):
    folder.mkdir()
    done = launch(
        folder, [sys.executable, str(ROOT / 'tests' / 'record_routes.py'), str(folder), keyed_by], ranks=ranks
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(ranks)]


def by_sample(rank, entry):
    """What each (batch, sample) had."""
    return {
        (batch, sample): value
        for batch, samples in enumerate(rank['samples'])
        for sample, value in zip(samples, rank[entry][batch], strict=True)
    }


@pytest.mark.parametrize('keyed_by', ['sample', 'rank'])
def test_routes_differ_between_ranks_samples_and_steps(tmp_path, keyed_by):
    first, second = record(tmp_path / 'two', 2, keyed_by)
    assert first['losses'] == second['losses']  # reduced over the ranks
    routes = [tuple(row) for rank in (first, second) for batch in rank['kept'] for row in batch]
    assert len(routes) == 2 * 6 * 4 and len(set(routes)) == len(routes)


def test_one_rank_and_two_draw_the_same_for_a_sample(tmp_path):
    (one,) = record(tmp_path / 'one', 1, 'sample')
    two = record(tmp_path / 'two', 2, 'sample')
    for entry in ('kept', 'noise'):
        assert by_sample(one, entry) == by_sample(two[0], entry) | by_sample(two[1], entry)
    losses = [[float.fromhex(loss) for loss in run['losses']] for run in (one, two[0])]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
