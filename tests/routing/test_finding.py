"""``find_settings`` on other people's models: what it proposes is what the oracles of the other files were held to."""

import copy

import pytest
import torch
from torch import nn

from tests.routing.foreign import FAMILIES, TRANSFORMERS_5
from tests.routing.test_between import Busy, pose, tokens
from tests.routing.test_checks import Convolution, Stack
from tests.routing.test_checks import tokens as samples
from tests.routing.test_masked import CASES, call
from tread_composer.routing import Route, apply_tread, find_settings

ROPE = 'image_rotary_emb'
FOUND = {
    'diffusers_dit': {},
    'diffusers_pixart': {},
    'diffusers_sd3': {'tokens_out': 1},
    'diffusers_flux': {
        'tokens_out': 1, 'shared': True, 'token_arguments': {ROPE: {'dims': 0, 'after': 'encoder_hidden_states'}},
    },
    'timm_vit': {},
    'hf_bert': {**({} if TRANSFORMERS_5 else {'tokens_out': 0}), 'token_arguments': {'attention_mask': [-2, -1]}},
    'torch_encoder': {'token_arguments': ['src_key_padding_mask']},
    'torch_encoder_with_a_bias': {'shared': True, 'token_arguments': {'src_mask': [0, 1]}},
    'qwen_image': {'tokens_out': 1, 'shared': True, 'token_arguments': {ROPE: {'dims': 0, 'members': [0]}}},
    'dinov3': {
        'always_keep': 3, 'shared': True, 'token_arguments': {'position_embeddings': {'dims': 0, 'without_first': 3}},
    },
    'eva02': {'always_keep': 1, 'shared': True, 'token_arguments': {'rope': {'dims': 0, 'without_first': 1}}},
    'hunyuan_dit': {'shared': True, 'token_arguments': {ROPE: 0}},
    'hidream': {
        'tokens_out': 0, 'token_arguments': {ROPE: {'dims': 1, 'before': 'encoder_hidden_states'}},
    },
}  # fmt: skip


@pytest.mark.parametrize('name', FOUND)
def test_the_settings_are_found_by_running_the_model(name):
    torch.manual_seed(0)
    if name in FAMILIES:
        family = FAMILIES[name]
        model, path = family.build(), family.lists[0]

        def run(model):
            return family.call(model, family.inputs())
    else:
        model, path = CASES[name].build(), CASES[name].lists[0]

        def run(model):
            return call(model, CASES[name].inputs())

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.1 if parameter.dim() > 1 else parameter + 0.1)
    before = run(model.train(False))
    found = find_settings(model, run, blocks=path)
    assert found.fault is None
    assert found.settings == {'blocks': path, **FOUND[name]}
    assert type(model.get_submodule(path)) in (nn.ModuleList, nn.Sequential) and torch.equal(run(model), before)
    written = str(found).partition('\n')[0]
    printed = eval(written, {'Tread': dict})
    assert printed['blocks'] == path
    start, end = Route(printed['start'], printed['end']).span(len(model.get_submodule(path)))  # type: ignore[arg-type]
    assert start <= end
    apply_tread(model, Route(1, -2, 0.5), **found.settings)
    assert ('always_keep=1, or [0, 1]' in str(found)) is (name == 'timm_vit')


def test_two_arguments_that_could_be_the_tokens_are_said():
    family = FAMILIES['diffusers_sd3']
    torch.manual_seed(0)
    found = find_settings(family.build(), lambda model: family.call(model, family.inputs()))
    assert "'hidden_states' holds the tokens: 16 of them; 'encoder_hidden_states' would fit too" in found.notes


@pytest.mark.parametrize(
    ('depth', 'route'), [(1, (0, -1)), (2, (0, -1)), (3, (1, -2)), (6, (1, -2)), (7, (2, -4)), (8, (2, -4))]
)
def test_the_printed_route_fits_the_model(depth, route):
    model = Busy()
    model.blocks = nn.ModuleList(copy.deepcopy(model.blocks[0]) for _ in range(depth))
    found = find_settings(model, lambda model: model(tokens()), blocks='blocks')
    assert found.fault is None and found.route == route
    assert str(found).startswith(f'Tread(start={route[0]}, end={route[1]}, ')
    apply_tread(model, Route(*found.route), **found.settings)
    model.train()(tokens())
    assert (f'{depth} blocks are too few' in str(found)) is (depth < 7)


def test_what_cannot_be_routed_says_why():
    found = find_settings(Stack(Convolution()), lambda model: model(samples()))
    assert found.fault == 'the tokens in another order give another result, whatever follows them'
    assert str(found).startswith('cannot be routed: the tokens in another order')
    found = find_settings(Busy(pose), lambda model: model(tokens()))
    assert 'another order give another result' in str(found.fault)
    found = find_settings(Busy(lambda model, x: model.norm(x)), lambda model: model(tokens()))
    assert 'between block 2 and block 3' in str(found.fault)
    with pytest.raises(ValueError, match="the forward pass does not go through 'blocks'"):
        find_settings(Busy(), lambda model: torch.zeros(1))
