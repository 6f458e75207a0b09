"""Rules of ``parallelism_config``: what Composer would refuse late, without words, or not at all."""

import os
from collections.abc import Iterator

import torch

from tread_composer.config.errors import Problem
from tread_composer.config.tree import Config

__all__ = ['sharding_needs_gpu', 'sharding_problems']

_HERE = ('parallelism_config', 'fsdp')


def sharding_problems(config: Config, world_size: int) -> Iterator[Problem]:
    """What is wrong between the settings of FSDP, the number of ranks and the rest of the run."""
    fsdp, searches = config.fsdp, config.device_train_microbatch_size == 'auto'
    if fsdp is None:
        return
    if _is_second():
        if searches:
            text = "'auto' works with DDP and FSDP1 alone in Composer; give a number, or set FSDP_VERSION=1"
            yield Problem(('device_train_microbatch_size',), text)
        return
    if searches and torch.__version__ >= '2.7.1':  # ordered as a version
        # What the search puts in place of FSDP1's unshard is defined below that version only; above it is a NameError.
        text = (
            f"'auto': Composer searches under FSDP1 with torch 2.6 to 2.7.0 only, and this is torch "
            f'{torch.__version__}; give a number, or install torch 2.7.0 (make TORCH=2.7)'
        )
        yield Problem(('device_train_microbatch_size',), text)
    if fsdp.cpu_offload:
        text = (
            'true: Composer has no CPU offload of parameters (its own words: not supported yet). Shard over more '
            'ranks, or move what activations need: activation_checkpointing or activation_cpu_offload: true'
        )
        yield Problem((*_HERE, 'cpu_offload'), text)
    # HSDP: replicas, each sharded over some of the ranks.
    replicas, shards = fsdp.data_parallel_replicate_degree or 1, fsdp.data_parallel_shard_degree
    if replicas > 1 and shards == 1:
        # torch takes a shard group of one rank for no sharding at all and then forgets the replicas.
        text = (
            f'1 with data_parallel_replicate_degree {replicas}: nothing would be sharded, and torch would not average '
            f'the gradients of the replicas either. Take parallelism_config out (that is DDP), or 2 and more shards'
        )
        yield Problem((*_HERE, 'data_parallel_shard_degree'), text)
        return
    product = replicas * (shards if shards != -1 else max(1, world_size // replicas))
    if product != world_size:
        text = (
            f'{replicas} replicas of {shards if shards != -1 else "some"} shards do not make up {world_size} ranks; '
            f'the two degrees must multiply to the number of ranks, and one shard degree of -1 fills up'
        )
        yield Problem((*_HERE, 'data_parallel_replicate_degree'), text)


def sharding_needs_gpu(config: Config) -> Iterator[Problem]:
    """For a run on the CPU: Composer gives FSDP1 the CUDA device without asking whether there is one."""
    if config.fsdp is not None and not _is_second():
        text = 'FSDP1 needs a GPU in Composer; on the CPU set FSDP_VERSION=2 in the environment, or take it out (DDP)'
        yield Problem(_HERE, text)


def _is_second() -> bool:
    return os.environ.get('FSDP_VERSION', '1') == '2'  # where Composer reads it
