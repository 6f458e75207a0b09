"""Other people's models against an oracle that gathers nothing: dense attention in which skipped tokens are masked.

On the blocks of the route every attention sees all tokens, with those that skip masked out as keys; behind the last
one they are restored. A table or a mask that went to the wrong token shows in it.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanVideoTransformer3DModel,
    QwenImageTransformer2DModel,
)
from timm.models.eva import Eva
from torch import Tensor, nn
from torch.nn import functional
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from tests.routing.foreign import TRANSFORMERS_5, noise
from tread_composer.routing import Route, apply_tread

B, TEXT = 2, 5
PAGE = (Path(__file__).parents[2] / 'docs' / 'your_model.md').read_text()
SDPA = functional.scaled_dot_product_attention


@dataclasses.dataclass
class Case:
    """A model, its call, its settings, and where its tokens are among the keys of an attention.

    Args:
        build: Makes the model.
        inputs: Of its call.
        settings: That route it.
        route: First and last block.
        lists: Paths of its block lists.
        tokens: Number of tokens in the first list, leading and trailing ones that never skip included.
        fixed: How many of them lead and trail, in each list.
        first_key: Where the first token is among the keys, in each list.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    settings: dict[str, Any]
    route: tuple[int, int]
    lists: tuple[str, ...]
    tokens: int = 16
    fixed: tuple[tuple[int, int], ...] = ((0, 0),)
    first_key: tuple[int, ...] = (0,)

    @property
    def shared(self) -> bool:
        return self.settings.get('shared', False)


def qwen() -> nn.Module:
    sizes = {'num_layers': 4, 'attention_head_dim': 16, 'num_attention_heads': 2, 'joint_attention_dim': 12}
    return QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, **sizes, axes_dims_rope=(4, 6, 6))


def qwen_inputs() -> dict[str, Any]:
    return {
        'hidden_states': noise(B, 16, 16), 'encoder_hidden_states': noise(B, TEXT, 12, seed=2),
        'encoder_hidden_states_mask': torch.ones(B, TEXT, dtype=torch.int64),
        'timestep': torch.tensor([0.3, 0.8]), 'img_shapes': [[(1, 4, 4)]] * B,
    }  # fmt: skip


def hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=6,
        rope_axes_dim=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip


def hunyuan_video_inputs() -> dict[str, Any]:
    mask = torch.ones(B, TEXT, dtype=torch.int64)
    mask[1, 3:] = 0
    return {
        'hidden_states': noise(B, 4, 1, 8, 8), 'timestep': torch.tensor([3, 800]), 'encoder_attention_mask': mask,
        'encoder_hidden_states': noise(B, TEXT, 12, seed=2), 'pooled_projections': noise(B, 6, seed=3),
    }  # fmt: skip


def flux2() -> nn.Module:
    return Flux2Transformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip


def flux2_inputs() -> dict[str, Any]:
    places = torch.stack([torch.zeros(16), torch.arange(16) // 4, torch.arange(16) % 4, torch.zeros(16)], dim=1)
    text = torch.zeros(TEXT, 4)
    text[:, 3] = torch.arange(TEXT)
    return {
        'hidden_states': noise(B, 16, 4), 'encoder_hidden_states': noise(B, TEXT, 12, seed=2),
        'timestep': torch.tensor([0.3, 0.8]), 'img_ids': places, 'txt_ids': text,
    }  # fmt: skip


def dinov3() -> nn.Module:
    sizes = {'hidden_size': 32, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 32}
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes, image_size=16, patch_size=4, num_register_tokens=2))


def eva() -> nn.Module:
    sizes = {'img_size': 16, 'patch_size': 4, 'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'num_classes': 5}
    return Eva(**sizes, use_rot_pos_emb=True, ref_feat_shape=(4, 4), qkv_fused=True)


def hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, num_layers=8, mlp_ratio=1.0,
        hidden_size=32, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=12, text_len=TEXT,
        text_len_t5=TEXT, sample_size=8, learn_sigma=False, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def hunyuan_dit_inputs() -> dict[str, Any]:
    mask = torch.ones(B, TEXT)
    angles = noise(16, 16, seed=6)
    return {
        'hidden_states': noise(B, 4, 8, 8), 'timestep': torch.tensor([3.0, 800.0]), 'text_embedding_mask': mask,
        'encoder_hidden_states': noise(B, TEXT, 12, seed=2), 'text_embedding_mask_t5': mask,
        'encoder_hidden_states_t5': noise(B, TEXT, 16, seed=3), 'image_rotary_emb': (angles.cos(), angles.sin()),
    }  # fmt: skip


def hidream() -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[12, 12], text_emb_dim=6, num_routed_experts=1,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=[0, 1, 2, 3, 4],
    )  # fmt: skip


def hidream_inputs() -> dict[str, Any]:
    return {
        'hidden_states': noise(B, 4, 8, 8), 'timesteps': torch.tensor([3, 800]), 'pooled_embeds': noise(B, 6, seed=3),
        'encoder_hidden_states_t5': noise(B, 2, 12, seed=2), 'encoder_hidden_states_llama3': noise(5, B, 3, 12, seed=4),
    }  # fmt: skip


JOINT, SINGLE = 'transformer_blocks', 'single_transformer_blocks'
CASES = {
    'qwen_image': Case(
        qwen, qwen_inputs,
        {'tokens_out': 1, 'shared': True, 'token_arguments': {'image_rotary_emb': {'dims': 0, 'members': [0]}}},
        (1, 2), (JOINT,), first_key=(TEXT,),
    ),
    'hunyuan_video': Case(
        hunyuan_video, hunyuan_video_inputs,
        {
            'tokens_out': 0, 'shared': True,
            'blocks': {
                JOINT: {'token_arguments': {
                    'attention_mask': {'dims': -1, 'before': 'encoder_hidden_states'}, 'freqs_cis': 0}},
                SINGLE: {'token_arguments': {
                    'attention_mask': {'dims': -1, 'before': 'encoder_hidden_states'}, 'image_rotary_emb': 0}},
            },
        },
        (1, 2), (JOINT, SINGLE), fixed=((0, 0), (0, 0)), first_key=(0, 0),
    ),
    'flux2': Case(
        flux2, flux2_inputs,
        {
            'shared': True,
            'blocks': {
                JOINT: {'tokens_out': 1, 'token_arguments': {
                    'image_rotary_emb': {'dims': 0, 'after': 'encoder_hidden_states'}}},
                SINGLE: {'always_keep': TEXT, 'token_arguments': {'image_rotary_emb': 0}},
            },
        },
        (1, 4), (JOINT, SINGLE), fixed=((0, 0), (TEXT, 0)), first_key=(TEXT, 0),
    ),
    'dinov3': Case(
        dinov3, lambda: {'pixel_values': noise(B, 3, 16, 16)},
        {'always_keep': 3, 'shared': True,
         'token_arguments': {'position_embeddings': {'dims': 0, 'without_first': 3}}},
        (1, 2), ('model.layer' if TRANSFORMERS_5 else 'layer',), tokens=19, fixed=((3, 0),),
    ),
    'eva02': Case(
        eva, lambda: {'x': noise(B, 3, 16, 16)},
        {'always_keep': 1, 'shared': True, 'token_arguments': {'rope': {'dims': 0, 'without_first': 1}}},
        (1, 2), ('blocks',), tokens=17, fixed=((1, 0),),
    ),
    'hunyuan_dit': Case(
        hunyuan_dit, hunyuan_dit_inputs, {'shared': True, 'token_arguments': {'image_rotary_emb': 0}},
        (2, 5), ('blocks',),
    ),
    'hidream': Case(
        hidream, hidream_inputs,
        {'blocks': 'double_stream_blocks', 'tokens_out': 0,
         'token_arguments': {'image_rotary_emb': {'dims': 1, 'before': 'encoder_hidden_states'}}},
        (1, 2), ('double_stream_blocks',),
    ),
}  # fmt: skip


class Masked:
    """Makes a dense model behave as if tokens skipped its blocks from ``route[0]`` to ``route[1]``."""

    def __init__(self, model: nn.Module, case: Case, skipped: Tensor):
        self.skipped, self.first_key, self.active, self.waiting = skipped, 0, False, torch.empty(0)
        places = [(path, i) for path in case.lists for i in range(len(model.get_submodule(path)))]
        lists = {path: number for number, path in enumerate(case.lists)}
        for index in range(case.route[0], case.route[1] + 1):
            path, place = places[index]
            number = lists[path]
            begins = index == case.route[0] or place == 0
            ends = index == case.route[1] or index + 1 == len(places) or places[index + 1][0] != path
            block = model.get_submodule(path)[place]
            block.register_forward_pre_hook(self.before(case, number, begins), with_kwargs=True)
            block.register_forward_hook(self.after(case, number, ends))

    def before(self, case: Case, number: int, begins: bool):
        def hook(block, args, kwargs):
            x = kwargs.get('hidden_states', args[0] if args else None)
            self.active, self.first_key = True, case.first_key[number] + case.fixed[number][0]
            if begins:
                self.waiting = x

        return hook

    def after(self, case: Case, number: int, ends: bool):
        def hook(block, args, out):
            self.active = False
            if not ends:
                return out
            position = case.settings.get('tokens_out')
            blocks = case.settings.get('blocks')
            if isinstance(blocks, dict):
                position = (blocks[case.lists[number]] or {}).get('tokens_out', position)
            x = out if isinstance(out, Tensor) else out[position]
            lead, trail = case.fixed[number]
            gone = functional.pad(self.skipped, (lead, trail))[..., None]
            x = torch.where(gone, self.waiting, x)
            return x if isinstance(out, Tensor) else (*out[:position], x, *out[position + 1 :])

        return hook

    def attention(self, query, key, value, attn_mask=None, *args, **kwargs):
        keys, free = key.shape[-2], self.skipped.shape[1]
        if self.active and keys >= self.first_key + free and keys == query.shape[-2]:
            hidden = functional.pad(self.skipped, (self.first_key, keys - self.first_key - free))[:, None, None]
            if attn_mask is None:
                attn_mask = ~hidden
            elif attn_mask.dtype == torch.bool:
                attn_mask = attn_mask & ~hidden
            else:
                attn_mask = attn_mask.masked_fill(hidden, -math.inf)
        return SDPA(query, key, value, attn_mask, *args, **kwargs)


def call(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(3)  # DINOv3 jitters its positions while training
    try:
        out = model(**inputs, return_dict=False)
    except TypeError:  # timm
        out = model(**inputs)
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.parametrize('name', CASES)
def test_output_and_gradients_equal_dense_attention_with_skipped_tokens_masked(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = case.build().train()
    with torch.no_grad():
        for parameter in model.parameters():  # gates that start at zero hide everything
            parameter.copy_(torch.randn(parameter.shape) * 0.1 if parameter.dim() > 1 else parameter + 0.1)
    plain = copy.deepcopy(model)
    lead, trail = case.fixed[0]
    free = case.tokens - lead - trail
    order = torch.stack([torch.randperm(free, generator=torch.Generator().manual_seed(b)) for b in range(B)])
    order = order[:1] if case.shared else order
    stay = order[:, : free - free // 2].sort(dim=1).values
    skipped = torch.ones(len(order), free, dtype=torch.bool).scatter(1, stay, False).expand(B, -1)
    kept = torch.cat([torch.arange(lead).expand(len(stay), -1), stay + lead], dim=1)

    routing = apply_tread(model, Route(*case.route, 0.5), **{'blocks': case.lists[0], **case.settings})
    routing.arm([kept], num_tokens=case.tokens)
    out = call(model, case.inputs())
    assert routing.used and routing.checked is True
    out.square().mean().backward()
    oracle = Masked(plain, case, skipped)
    with mock.patch.object(functional, 'scaled_dot_product_attention', oracle.attention):
        expected = call(plain, case.inputs())
        expected.square().mean().backward()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for (at, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=at)
    routing.disarm()
    assert (out - call(model, case.inputs())).abs().max() > 1e-4
    routing.arm(sampler=routing.sample)  # draws of its own, in the layout of the first list
    call(model, case.inputs()).sum().backward()


@pytest.mark.parametrize('name', CASES)
def test_the_page_has_these_settings(name):
    (row,) = [line for line in PAGE.splitlines() if line.startswith('|') and f'`{name}`' in line]
    assert eval(f'dict({row.split("|")[3].strip().strip("`")})') == CASES[name].settings
