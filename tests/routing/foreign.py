"""Small random instances of other people's models, each with its inputs and with the settings that route it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm.models.vision_transformer
import torch
import transformers
from diffusers import (
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanVideoTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from timm.models.eva import Eva
from torch import Tensor, nn
from transformers import BertConfig, BertModel, DINOv3ViTConfig, DINOv3ViTModel, ViTConfig, ViTModel

B, N, TEXT = 3, 16, 5
# Release 5 renamed ViTModel.encoder.layer to ViTModel.layers, and BertLayer returns the tokens themselves, no tuple.
TRANSFORMERS_5 = int(transformers.__version__.split('.')[0]) >= 5
STEPS, LABELS = torch.tensor([5, 400, 900]), torch.tensor([1, 2, 3])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclasses.dataclass
class Case:
    """A model, its call, its settings, and where its tokens are among the keys of an attention."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    lists: tuple[str, ...]  # paths of its block lists
    settings: dict[str, Any]
    tokens: int = N  # in the first list, those that never skip included
    first_key: tuple[int, ...] = (0,)  # where the first token is among the keys, in each list
    route: tuple[int, int] = (1, -2)

    @property
    def shared(self) -> bool:
        return self.settings.get('shared', False)

    def of_list(self, number: int, name: str, default: Any) -> Any:
        """A setting of one list."""
        blocks = self.settings.get('blocks')
        own = (blocks[self.lists[number]] or {}) if isinstance(blocks, dict) else {}
        return own.get(name, self.settings.get(name, default))

    def randomised(self) -> nn.Module:
        """The model in training mode, no gate of which is zero."""
        torch.manual_seed(0)
        model = self.build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn(parameter.shape) * 0.1 if parameter.dim() > 1 else parameter + 0.1)
        return model

    def call(self, model: nn.Module, inputs: dict[str, Any] | None = None) -> Tensor:
        torch.manual_seed(3)  # diffusers' DiT drops labels while training, DINOv3 jitters its positions
        out = model(**(inputs or self.inputs()))
        return out if isinstance(out, Tensor) else out[0]


def diffusion(kind: type[nn.Module], **more: Any) -> Callable[[], nn.Module]:
    """A model of diffusers with 2 heads of width 8 and 4 blocks on 4 x 4 patches."""
    sizes = {'num_attention_heads': 2, 'attention_head_dim': 8, 'num_layers': 4}
    return lambda: kind(**sizes, sample_size=8, patch_size=2, **more)


def two_lists(kind: type[nn.Module], **more: Any) -> Callable[[], nn.Module]:
    """A model of diffusers with 3 blocks that get the text beside the image, and 3 that get one sequence of both."""
    sizes = {'num_layers': 3, 'num_single_layers': 3, 'num_attention_heads': 2, 'joint_attention_dim': 12}
    return lambda: kind(**sizes, patch_size=1, in_channels=4, **more)


def places(columns: int) -> Tensor:
    """Row and column of each of 4 x 4 tokens, among ``columns`` coordinates."""
    coordinates = torch.zeros(N, columns)
    coordinates[:, 1], coordinates[:, 2] = torch.arange(N) // 4, torch.arange(N) % 4
    return coordinates


def qwen() -> nn.Module:
    sizes = {'num_layers': 4, 'attention_head_dim': 16, 'num_attention_heads': 2, 'joint_attention_dim': 12}
    return QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, **sizes, axes_dims_rope=(4, 6, 6))


def hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=12, pooled_projection_dim=6,
        rope_axes_dim=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip


def hunyuan_dit() -> nn.Module:
    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, num_layers=8, mlp_ratio=1.0,
        hidden_size=32, cross_attention_dim=12, cross_attention_dim_t5=16, pooled_projection_dim=12, text_len=TEXT,
        text_len_t5=TEXT, sample_size=8, learn_sigma=False, use_style_cond_and_image_meta_size=False,
    )  # fmt: skip


def hidream() -> nn.Module:
    return HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=4, num_layers=4, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, caption_channels=[12, 12], text_emb_dim=6, num_routed_experts=1,
        num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(8, 8), llama_layers=[0, 1, 2, 3, 4],
    )  # fmt: skip


def eva() -> nn.Module:
    sizes = {'img_size': 16, 'patch_size': 4, 'embed_dim': 32, 'depth': 4, 'num_heads': 2, 'num_classes': 5}
    return Eva(**sizes, use_rot_pos_emb=True, ref_feat_shape=(4, 4), qkv_fused=True)


def timm_vit() -> nn.Module:
    sizes = {'img_size': 16, 'patch_size': 4, 'embed_dim': 16, 'depth': 4, 'num_heads': 2, 'num_classes': 5}
    return timm.models.vision_transformer.VisionTransformer(**sizes)


def sizes_of_hf(width: int) -> dict[str, int]:
    return {'hidden_size': width, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 32}


def vit() -> nn.Module:
    return ViTModel(ViTConfig(**sizes_of_hf(16), image_size=16, patch_size=4), add_pooling_layer=False)


def dinov3() -> nn.Module:
    return DINOv3ViTModel(DINOv3ViTConfig(**sizes_of_hf(32), image_size=16, patch_size=4, num_register_tokens=2))


def bert() -> nn.Module:
    dropout = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
    return BertModel(BertConfig(vocab_size=50, **sizes_of_hf(16), **dropout), add_pooling_layer=False)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def padding() -> Tensor:
    mask = torch.ones(B, N, dtype=torch.int64)
    mask[1, 11:] = 0
    mask[2, 5:] = 0
    return mask


def padded_text() -> Tensor:
    mask = torch.ones(B, TEXT, dtype=torch.int64)
    mask[1, 3:] = 0
    return mask


def captioned(channels: int, **more: Any) -> dict[str, Any]:
    return {
        'hidden_states': noise(B, channels, 8, 8), 'timestep': STEPS,
        'encoder_hidden_states': noise(B, TEXT, 12, seed=2), **more,
    }  # fmt: skip


def sequence(channels: int, **more: Any) -> dict[str, Any]:
    return {
        'hidden_states': noise(B, N, channels), 'timestep': STEPS / 1000,
        'encoder_hidden_states': noise(B, TEXT, 12, seed=2), **more,
    }  # fmt: skip


def hunyuan_dit_inputs() -> dict[str, Any]:
    mask, angles = torch.ones(B, TEXT), noise(16, 16, seed=6)
    more = {'text_embedding_mask': mask, 'text_embedding_mask_t5': mask}
    t5 = {'encoder_hidden_states_t5': noise(B, TEXT, 16, seed=3)}
    return captioned(4, **more, **t5, image_rotary_emb=(angles.cos(), angles.sin())) | {'timestep': STEPS.float()}


def hidream_inputs() -> dict[str, Any]:
    return {
        'hidden_states': noise(B, 4, 8, 8), 'timesteps': STEPS, 'pooled_embeds': noise(B, 6, seed=3),
        'encoder_hidden_states_t5': noise(B, 2, 12, seed=2), 'encoder_hidden_states_llama3': noise(5, B, 3, 12, seed=4),
    }  # fmt: skip


JOINT, SINGLE, ROPE, CAPTION = (
    'transformer_blocks', 'single_transformer_blocks', 'image_rotary_emb', 'encoder_hidden_states'
)  # fmt: skip
PADDED = {'attention_mask': {'dims': -1, 'before': CAPTION}}
TEXT_JOINS = {  # beside the image in the first list, in one sequence with it in the second
    JOINT: {'tokens_out': 1, 'token_arguments': {ROPE: {'dims': 0, 'after': CAPTION}}},
    SINGLE: {'always_keep': TEXT, 'token_arguments': {ROPE: 0}},
}
CASES = {
    'diffusers_dit': Case(
        diffusion(DiTTransformer2DModel, in_channels=3, num_embeds_ada_norm=10),
        lambda: {'hidden_states': noise(B, 3, 8, 8), 'timestep': STEPS, 'class_labels': LABELS}, (JOINT,), {},
    ),
    'diffusers_pixart': Case(
        diffusion(
            PixArtTransformer2DModel, in_channels=4, out_channels=4, cross_attention_dim=16, caption_channels=12,
            use_additional_conditions=False,
        ),
        lambda: captioned(4, encoder_attention_mask=padded_text()), (JOINT,), {},
    ),
    'diffusers_sd3': Case(
        diffusion(
            SD3Transformer2DModel, in_channels=4, out_channels=4, caption_projection_dim=16, joint_attention_dim=12,
            pooled_projection_dim=6, pos_embed_max_size=8,
        ),
        lambda: captioned(4, pooled_projections=noise(B, 6, seed=3)), (JOINT,), {'tokens_out': 1},
    ),
    'diffusers_flux': Case(
        two_lists(FluxTransformer2DModel, attention_head_dim=8, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4)),
        lambda: sequence(4, pooled_projections=noise(B, 6, seed=3), img_ids=places(3), txt_ids=torch.zeros(TEXT, 3)),
        (JOINT, SINGLE),
        {
            'blocks': [JOINT, SINGLE], 'tokens_out': 1, 'shared': True,
            'token_arguments': {ROPE: {'dims': 0, 'after': CAPTION}},
        },
        first_key=(TEXT, TEXT),
    ),
    'timm_vit': Case(
        timm_vit, lambda: {'x': noise(B, 3, 16, 16)}, ('blocks',), {'always_keep': 1}, tokens=N + 1
    ),
    'hf_vit': Case(
        vit, lambda: {'pixel_values': noise(B, 3, 16, 16)}, ('layers' if TRANSFORMERS_5 else 'encoder.layer',),
        {'always_keep': 1}, tokens=N + 1,
    ),
    'hf_bert': Case(
        bert, lambda: {'input_ids': torch.arange(B * N).view(B, N), 'attention_mask': padding()}, ('encoder.layer',),
        {'always_keep': 1, 'tokens_out': 0, 'token_arguments': {'attention_mask': [-2, -1]}},
    ),
    'torch_encoder': Case(
        encoder, lambda: {'src': noise(B, N, 16), 'src_key_padding_mask': padding() == 0}, ('layers',),
        {'always_keep': 1, 'token_arguments': ['src_key_padding_mask']},
    ),
    'torch_encoder_with_a_bias': Case(
        encoder, lambda: {'src': noise(B, N, 16), 'mask': noise(N, N, seed=4)}, ('layers',),
        {'shared': True, 'token_arguments': {'src_mask': [0, 1]}},
    ),
    'torch_sequential': Case(
        lambda: nn.Sequential(*(layer() for _ in range(4))), lambda: {'input': noise(B, N, 16)}, ('',), {},
    ),
    'qwen_image': Case(
        qwen,
        lambda: sequence(
            16, encoder_hidden_states_mask=torch.ones(B, TEXT, dtype=torch.int64), img_shapes=[[(1, 4, 4)]] * B
        ),
        (JOINT,), {'tokens_out': 1, 'shared': True, 'token_arguments': {ROPE: {'dims': 0, 'members': [0]}}},
        first_key=(TEXT,),
    ),
    'hunyuan_video': Case(
        hunyuan_video,
        lambda: captioned(4, encoder_attention_mask=padded_text(), pooled_projections=noise(B, 6, seed=3))
        | {'hidden_states': noise(B, 4, 1, 8, 8)},
        (JOINT, SINGLE),
        {
            'tokens_out': 0, 'shared': True,
            'blocks': {
                JOINT: {'token_arguments': {**PADDED, 'freqs_cis': 0}}, SINGLE: {'token_arguments': {**PADDED, ROPE: 0}}
            },
        },
        first_key=(0, 0),
    ),
    'flux2': Case(
        two_lists(
            Flux2Transformer2DModel, attention_head_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        lambda: sequence(4, img_ids=places(4), txt_ids=torch.arange(TEXT)[:, None] * torch.eye(4)[3]),
        (JOINT, SINGLE), {'shared': True, 'blocks': TEXT_JOINS}, first_key=(TEXT, 0),
    ),
    'chroma': Case(
        two_lists(
            ChromaTransformer2DModel, attention_head_dim=16, axes_dims_rope=(4, 6, 6), approximator_num_channels=16,
            approximator_hidden_dim=32, approximator_layers=1,
        ),
        lambda: sequence(4, img_ids=places(3), txt_ids=torch.zeros(TEXT, 3)),
        (JOINT, SINGLE), {'shared': True, 'blocks': TEXT_JOINS}, first_key=(TEXT, 0),
    ),
    'hidream': Case(
        hidream, hidream_inputs, ('double_stream_blocks',),
        {
            'blocks': 'double_stream_blocks', 'tokens_out': 0,
            'token_arguments': {ROPE: {'dims': 1, 'before': CAPTION}},
        },
    ),
    'hunyuan_dit': Case(
        hunyuan_dit, hunyuan_dit_inputs, ('blocks',), {'shared': True, 'token_arguments': {ROPE: 0}}, route=(2, -3)
    ),
    'dinov3': Case(
        dinov3, lambda: {'pixel_values': noise(B, 3, 16, 16)}, ('model.layer' if TRANSFORMERS_5 else 'layer',),
        {
            'always_keep': 3, 'shared': True,
            'token_arguments': {'position_embeddings': {'dims': 0, 'without_first': 3}},
        },
        tokens=N + 3,
    ),
    'eva02': Case(
        eva, lambda: {'x': noise(B, 3, 16, 16)}, ('blocks',),
        {'always_keep': 1, 'shared': True, 'token_arguments': {'rope': {'dims': 0, 'without_first': 1}}}, tokens=N + 1,
    ),
}  # fmt: skip
