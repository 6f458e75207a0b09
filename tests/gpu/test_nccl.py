"""Several GPUs, connected by NCCL, train as one process does: DDP, FSDP2, FSDP1, and HSDP on four."""

import contextlib
import os
import warnings

import pytest
import torch

from tests.parallel_worlds import fsdp1_on_cpu, train
from tests.warm import on_ranks

ROUNDING = 1e-4  # of sums in another order, after four steps that move the weights by 0.2


def recipes(ranks: int) -> dict[str, dict]:
    """Trainings by name, as ``train`` takes them."""
    full = {'state_dict_type': 'full'}
    plain = {strategy: {'strategy': strategy, 'fsdp': full} for strategy in ('ddp', 'fsdp2', 'fsdp1')}
    if ranks == 4:  # two groups of two that share the weights
        degrees = {'data_parallel_shard_degree': 2, 'data_parallel_replicate_degree': 2}
        plain['hsdp'] = {'strategy': 'fsdp1', 'fsdp': {**full, 'sharding_strategy': 'HYBRID_SHARD', **degrees}}
    return plain


WORLDS = [(ranks, name) for ranks in (2, 4) for name in recipes(ranks)]


def trainings(ranks: int, device: str) -> dict[str, dict]:
    """What this rank saw of each; without a GPU (``cpu``) by gloo, to try this file out."""
    warnings.filterwarnings('ignore')
    os.environ['FSDP_VERSION'] = '1'
    seen = {}
    for name, recipe in recipes(ranks).items():
        if device == 'cpu' and recipe['strategy'] == 'fsdp1':
            recipe['fsdp'] = recipe['fsdp'] | {'state_dict_type': 'sharded'}
        with fsdp1_on_cpu() if device == 'cpu' else contextlib.nullcontext():
            seen[name] = train(**recipe, precision='fp32', device=device)[0]
    return seen


@pytest.fixture(scope='module')
def worlds():
    """What rank 0 saw, of all numbers of ranks that this machine has GPUs for."""
    counts = [ranks for ranks in (2, 4) if ranks <= torch.cuda.device_count()]
    return {ranks: on_ranks(ranks, trainings, ranks, 'gpu', device='gpu')[0] for ranks in counts}


@pytest.fixture(scope='module')
def one():
    """The same training in one process."""
    return train('ddp', precision='fp32', device='gpu')[0]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ('ranks', 'name'),
    [
        pytest.param(
            *world, marks=pytest.mark.skipif(torch.cuda.device_count() < world[0], reason=f'needs {world[0]} GPUs')
        )
        for world in WORLDS
    ],
)
def test_several_gpus_train_as_one(worlds, one, ranks, name):
    seen = worlds[ranks][name]
    for kind in ('weights', 'average'):
        assert seen[kind].keys() >= one[kind].keys()
        for key, value in one[kind].items():
            assert torch.allclose(seen[kind][key].cpu(), value.cpu(), rtol=0, atol=ROUNDING), (kind, key)
