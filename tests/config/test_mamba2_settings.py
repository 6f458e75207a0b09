"""The section of the state-space network: its sizes, its kernel, and what its route must take along."""

import pathlib

import pytest

from tread_composer.config import check_machine, load_config
from tread_composer.config.errors import ConfigError
from tread_composer.config.tree import backbone_arguments

YAMLS = pathlib.Path(__file__).parents[2] / 'yamls'


def test_the_preset_gives_the_sizes_and_the_section_the_rest():
    model = load_config(YAMLS / 'mamba2_dit_b.yaml', ['model.scan=alternate']).model
    sizes = {'patch_size': 2, 'hidden_size': 768, 'depth': 12}
    mixer = {'expand': 2, 'head_size': 64, 'state_size': 64, 'chunk_size': 256, 'kernel': 'torch'}
    assert backbone_arguments(model) == {**sizes, **mixer, 'mlp_ratio': 3.0, 'scan': 'alternate', 'learn_sigma': False}


@pytest.mark.parametrize(
    ('override', 'message'),
    [
        ('model.depth=3', "model.depth: 3: the preset 'Mamba2-DiT-B/2' has decided that"),
        ('model.preset=null', "model.hidden_size: is missing.*'Mamba2-DiT-B/2'"),
        ('model.num_heads=4', 'model.num_heads'),
        ('model.scan=spiral', 'model.scan'),
        ('model.kernel=cuda', 'model.kernel'),
        ('algorithms.tread.token_arguments=[]', r'token_arguments: \[positions\]'),
    ],
)
def test_mistakes_are_refused_by_key(override, message):
    with pytest.raises(ConfigError, match=f'(?s){message}'):
        load_config(YAMLS / 'mamba2_dit_b_tread.yaml', [override])


def test_the_fused_kernel_is_refused_before_a_run_on_the_cpu_and_can_be_planned():
    config = load_config(YAMLS / 'digits_mamba2.yaml', ['model.kernel=fused', 'device=cpu'])
    with pytest.raises(ConfigError, match=r"model\.kernel: 'fused' cannot run here: .*written for CUDA"):
        check_machine(config)
