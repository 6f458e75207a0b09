"""``parallelism_config`` in YAML: what reaches Composer, and what is refused before it could go wrong."""

import re

import pytest
import torch
from composer.trainer import _patch_pytorch

from tread_composer.config import check_machine, load_config
from tread_composer.config.errors import ConfigError
from tread_composer.config.trainer_settings import fsdp_section

HSDP = {'data_parallel_replicate_degree': 2, 'data_parallel_shard_degree': 4, 'activation_checkpointing': True}


def test_sharding_replicas_and_recomputing_reach_composer_as_they_were_written(base):
    words = ', '.join(f'{name}: {str(value).lower()}' for name, value in HSDP.items())
    config = load_config(base, [f'parallelism_config={{fsdp: {{{words}}}}}'], world_size=8)
    assert config.trainer_arguments()['parallelism_config'] == {'fsdp': HSDP}


@pytest.mark.parametrize(
    ('settings', 'ranks', 'part'),
    [
        ('cpu_offload: true', 2, 'parallelism_config.fsdp.cpu_offload: true: Composer has no CPU offload'),
        (
            'data_parallel_replicate_degree: 2, data_parallel_shard_degree: 1',
            2,
            'data_parallel_shard_degree: 1 with data_parallel_replicate_degree 2: nothing would be sharded',
        ),
        ('data_parallel_replicate_degree: 3', 8, '3 replicas of some shards do not make up 8 ranks'),
        ('data_parallel_shard_degree: 4', 8, '1 replicas of 4 shards do not make up 8 ranks'),
        ('reshard_after_forward: true', 2, 'is a setting of FSDP2: set FSDP_VERSION=2'),
        ('save_planner: x', 2, 'takes an object, which YAML cannot write'),
        ('device_mesh: [2, 2]', 4, 'is made by Composer; FSDP1 takes data_parallel_replicate_degree'),
    ],
)
def test_what_composer_would_not_refuse_in_words(message, settings, ranks, part):
    assert part in message(f'parallelism_config={{fsdp: {{{settings}}}}}', world_size=ranks)


def test_fsdp2_has_settings_of_its_own():
    second, first = fsdp_section('2'), fsdp_section('1')
    assert second(activation_checkpointing=True, state_dict_type='full').reshard_after_forward is True
    assert 'replicas of shards (HSDP) are a setting of FSDP1' in second.refused['data_parallel_replicate_degree']
    assert 'is a setting of FSDP1' in second.refused['sharding_strategy']
    assert not set(second.refused) & set(second.model_fields) and not set(first.refused) & set(first.model_fields)


def test_fsdp1_needs_a_gpu(base):
    config = load_config(base, ['parallelism_config={fsdp: {}}', 'device=cpu'])
    with pytest.raises(ConfigError, match='FSDP1 needs a GPU in Composer; on the CPU set FSDP_VERSION=2'):
        check_machine(config)
    if torch.cuda.is_available():
        check_machine(load_config(base, ['parallelism_config={fsdp: {}}', 'device=gpu']))


def test_auto_microbatch_under_fsdp1_is_refused_where_composer_has_no_search(base):
    able = hasattr(_patch_pytorch, 'unshard_with_sync')
    try:
        load_config(base, ['parallelism_config={fsdp: {}}', 'device_train_microbatch_size=auto'])
        text = ''
    except ConfigError as error:
        text = str(error)
    rule = f'device_train_microbatch_size: .*torch 2.6 to 2.7.0 only, and this is torch {re.escape(torch.__version__)}'
    assert (re.search(rule, text) is None) == able
    if not able:  # what would happen without the rule
        with pytest.raises(NameError, match='unshard_with_sync'):
            _patch_pytorch.patch_unshard_for_automicrobatching()
