"""DDP, FSDP1 and FSDP2 in 2 and 3 real processes on the CPU: the routed training of one process, and its average.

Every run trains on the same 12 samples a batch, with noise and routes keyed by sample, so all are one training.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.helpers import make_trainer, tiny_model
from tests.parallel_worlds import DEPTH, checkpoint, evaluator, recipes, saving, snapshots_of, train, trainings
from tests.warm import ROOT, on_ranks
from tread_composer.algorithms.power_ema.snapshots import snapshot_path
from tread_composer.algorithms.tread import Tread
from tread_composer.io.checkpoint_reader import read_checkpoint
from tread_composer.objectives.ddpm import evenly_spaced
from tread_composer.weights.trained import checkpoint_weights

ROUNDING = 2e-6  # of sums in another order, after four steps that move the weights by 0.2
RUNS = [(ranks, name) for ranks in (2, 3) for name in recipes(ROOT, ranks)]
PLAIN = [run for run in RUNS if run[1].endswith(': plain')]
EVALUATED = [*PLAIN, (2, 'fsdp1: gathered until backward')]
# The plain one is evaluated in between, these are not: so evaluation changes nothing either.
EXACT = [run for run in RUNS if run[1].endswith(('recomputed', 'on the CPU', 'resumed', 'without evaluation'))]
# Graphs of a block in training and evaluation; recomputing adds some. None is added by a further block or batch.
GRAPHS = {
    'ddp: compiled': 2, 'fsdp2: compiled': 2, 'fsdp1: compiled': 2,
    'fsdp2: compiled, recomputed': 3, 'fsdp1: compiled, recomputed': 4,
}  # fmt: skip


def title(run):
    return f'{run[0]} {run[1]}'


def largest(a, b):
    """Difference of two sets of weights; the second may have more."""
    assert a and a.keys() <= b.keys()
    return max(float((value.double() - b[name].double()).abs().max()) for name, value in a.items())


class Worlds:
    """What each rank saw of each run, by (number of ranks, name), and the same training in one process."""

    def __init__(self, folder):
        self.folder = folder
        self.one, _ = train('ddp', evaluate=True, snapshots=folder / 'one', **saving(folder / 'one'))
        # In this order: three ranks go on where two have stopped.
        self.ranks = {ranks: on_ranks(ranks, trainings, folder) for ranks in (2, 3)}

    def __getitem__(self, run):
        ranks, name = run
        return self.ranks[ranks][0][name]

    def snapshots(self, folder, batch=4):
        return load_file(snapshot_path(folder, batch))


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    return Worlds(tmp_path_factory.mktemp('worlds'))


@pytest.mark.parametrize('run', RUNS, ids=title)
def test_several_processes_train_as_one_and_keep_its_averages(worlds, run):
    seen, one = worlds[run], worlds.one
    assert largest(seen['weights'], one['weights']) < ROUNDING
    assert largest(seen['average'], one['average']) < ROUNDING
    expected = one['losses'][-len(seen['losses']) :]
    assert seen['losses'] == pytest.approx(expected, rel=1e-5)
    assert len(seen['losses']) == (2 if 'resumed' in run[1] else 4)
    if 'snapshots' in recipes(ROOT, run[0])[run[1]]:
        ours, of_one = (worlds.snapshots(f) for f in (snapshots_of(worlds.folder, *run), worlds.folder / 'one'))
        assert ours.keys() == of_one.keys() and len(ours) == 2 * len(seen['average'])
        assert largest(ours, of_one) < ROUNDING


@pytest.mark.parametrize('run', EVALUATED, ids=title)
def test_evaluation_computes_with_the_average_and_leaves_the_weights_as_they_were(worlds, run):
    seen, fresh = worlds[run], dict(tiny_model(depth=DEPTH).named_parameters())
    # The average is the one kept by hand, in whole float32 tensors.
    assert seen['average'].keys() == {name for name, value in fresh.items() if value.requires_grad}
    for name, value in seen['average'].items():
        assert value.dtype == torch.float32 and value.shape == fresh[name].shape
    assert largest(seen['average'], seen['by_hand']) < ROUNDING
    assert largest(seen['average'], seen['weights']) > 0.01
    assert largest(seen['at']['start'], fresh) == 0
    assert largest(seen['average'], seen['at']['eval_start']) == 0
    assert largest(seen['at']['trained'], seen['at']['eval_end']) == 0
    assert largest(seen['at']['eval_start'], seen['at']['eval_end']) > 0.01
    # What was computed, not what was stored: FSDP keeps a gathered copy of some weights after a forward pass.
    assert seen['eval_losses'] == pytest.approx(worlds.one['eval_losses'], rel=1e-6)


@pytest.mark.parametrize('run', EXACT, ids=title)
def test_a_run_recomputed_moved_resumed_or_not_evaluated_is_the_same_to_the_bit(worlds, run):
    plain = worlds[run[0], f'{run[1].split(":")[0]}: plain']
    assert largest(worlds[run]['weights'], plain['weights']) == 0
    assert largest(worlds[run]['average'], plain['average']) == 0


@pytest.mark.parametrize('run', PLAIN, ids=title)
def test_ranks_share_weights_and_average_and_the_first_one_saves(worlds, run):
    ranks, name = run
    numbers = sum(value.numel() for value in worlds.one['weights'].values())
    held = [seen[name]['held'] for seen in worlds.ranks[ranks]]
    if 'ddp' in name:
        assert held == [numbers] * ranks
    else:
        assert sum(held) == numbers and max(held) < 1.1 * numbers / ranks
    assert all(seen[name]['average'] == {} for seen in worlds.ranks[ranks][1:])


def test_every_rank_sample_and_step_has_a_route_of_its_own_and_a_sample_that_of_one_process(worlds):
    keyed = [seen['ddp: without evaluation']['draws'] for seen in worlds.ranks[2]]
    for both in (keyed, [seen['without ids'] for seen in worlds.ranks[2]]):
        routes = [route for draws in both for route, _ in draws.values()]
        assert len(routes) == 4 * 12 and len(set(routes)) == len(routes)
    assert train('ddp', draws=Tread)[0]['draws'] == keyed[0] | keyed[1]


@pytest.mark.parametrize('name', GRAPHS)
def test_blocks_are_compiled_in_place_in_few_graphs(worlds, name):
    assert worlds[2, name]['graphs'] == GRAPHS[name]


FOLDERS = ['fsdp2_sharded', 'fsdp1', 'fsdp1_of_three']


@pytest.mark.parametrize('name', ['ddp', 'fsdp2', 'fsdp2_of_three', *FOLDERS])
def test_one_process_goes_on_with_what_several_have_saved(worlds, name):
    path = checkpoint(worlds.folder / name, 2, sharded=name in FOLDERS)
    if name in FOLDERS:
        path, shards = f'{worlds.folder}/{name}.pt', path
        dcp_to_torch_save(shards, path)  # python -m torch.distributed.checkpoint.format_utils dcp_to_torch ...
    snapshots = worlds.folder / 'snapshots' / f'one after {name}'
    seen, _ = train('ddp', load_path=path, snapshots=snapshots)
    assert largest(seen['weights'], worlds.one['weights']) < ROUNDING
    assert largest(seen['average'], worlds.one['average']) < ROUNDING
    assert largest(worlds.snapshots(worlds.folder / 'one'), worlds.snapshots(snapshots)) < ROUNDING
    # What `sample` and `export` read of it, with pickles refused.
    state, same = read_checkpoint(path), read_checkpoint(checkpoint(worlds.folder / 'one', 2))
    assert int(state['timestamp']['Timestamp']['batch']) == 2
    for weights in ('raw', 'ema'):
        found, expected = (checkpoint_weights(content, weights, path) for content in (state, same))
        assert found.keys() == expected.keys() and largest(found, expected) < ROUNDING


def test_a_network_in_bfloat16_is_given_whole_timesteps_and_nameless_weights_are_refused(worlds):
    for seen in worlds.ranks[2]:
        assert seen['bfloat16']['trained'] == list(range(1000))
        assert seen['bfloat16']['sampled'] == evenly_spaced(1000, 7)[::-1]
    assert 'EMA cannot average with parallelism_config.fsdp.use_orig_params: false' in worlds.ranks[2][1]['refused']


def test_these_comparisons_would_notice(worlds):
    """Weights, average and evaluation loss of another training are further away than anything above allows."""
    other, _ = train('ddp', max_duration='3ba', snapshots=worlds.folder / 'other')
    assert largest(other['weights'], worlds.one['weights']) > 0.01
    assert largest(other['average'], worlds.one['average']) > 0.01
    assert largest(worlds.snapshots(worlds.folder / 'other', 3), worlds.snapshots(worlds.folder / 'one')) > 0.01
    raw = tiny_model(depth=DEPTH)
    raw.load_state_dict(worlds.one['weights'])
    trainer = make_trainer(raw, eval_dataloader=evaluator())
    trainer.eval()
    loss = float(trainer.state.eval_metrics['eval']['loss'].compute())
    assert abs(loss / worlds.one['eval_losses'][-1] - 1) > 1e-3
