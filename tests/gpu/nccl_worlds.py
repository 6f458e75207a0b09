"""Run by test_nccl.py on each GPU: the trainings of several ranks; the first one writes what it saw into a file."""

import contextlib
import sys
import warnings

import torch
from composer.utils import dist, get_device

from tests.parallel_worlds import fsdp1_on_cpu, train


def recipes(ranks: int) -> dict[str, dict]:
    """Trainings by name, as ``train`` takes them."""
    full = {'state_dict_type': 'full'}
    plain = {strategy: {'strategy': strategy, 'fsdp': full} for strategy in ('ddp', 'fsdp2', 'fsdp1')}
    if ranks == 4:  # two groups of two that share the weights
        degrees = {'data_parallel_shard_degree': 2, 'data_parallel_replicate_degree': 2}
        plain['hsdp'] = {'strategy': 'fsdp1', 'fsdp': {**full, 'sharding_strategy': 'HYBRID_SHARD', **degrees}}
    return plain


def main(path: str, device: str = 'gpu') -> None:
    """Train each; without a GPU (``cpu``) by gloo, to try this file out."""
    warnings.filterwarnings('ignore')
    dist.initialize_dist(get_device(device))
    seen = {}
    for name, recipe in recipes(dist.get_world_size()).items():
        if device == 'cpu' and recipe['strategy'] == 'fsdp1':
            recipe['fsdp'] |= {'state_dict_type': 'sharded'}
        with fsdp1_on_cpu() if device == 'cpu' else contextlib.nullcontext():
            seen[name] = train(**recipe, precision='fp32', device=device)[0]
    if dist.get_global_rank() == 0:
        torch.save(seen, path)
    dist.barrier()


if __name__ == '__main__':
    main(*sys.argv[1:])
