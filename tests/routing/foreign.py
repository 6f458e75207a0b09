"""Small random instances of other people's models, each with the settings that route it and an explicit loop.

``Family.explicit`` is the model's forward pass written out from its own parts, with the route as indexing by hand.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import timm.models.vision_transformer
import torch
import transformers
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel
from torch import Tensor, nn
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

B, N = 3, 16
# Release 5 renamed ViTModel.encoder.layer to ViTModel.layers, and BertLayer returns the tokens themselves, no tuple.
TRANSFORMERS_5 = int(transformers.__version__.split('.')[0]) >= 5
VIT_LAYERS = 'layers' if TRANSFORMERS_5 else 'encoder.layer'
STEPS, LABELS = torch.tensor([5, 400, 900]), torch.tensor([1, 2, 3])


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows(x: Tensor, kept: Tensor, dim: int = 1) -> Tensor:
    """The kept entries of each sample, one sample after the other; ``dim`` counts the samples' dimension too."""
    return torch.stack([x[b].index_select(dim - 1, kept[b]) for b in range(len(x))])


LOOPED: list[Tensor] = []
"""What each block of the last explicit loop returned."""


def walk(blocks: nn.Module, x: Tensor, call: Callable[..., Tensor], span: tuple[int, int], kept: Tensor) -> Tensor:
    """``call(block, tokens, kept or None)`` for each block, with the route from span[0] to span[1]."""
    full = x
    LOOPED.clear()
    for index in range(len(blocks)):
        on = span[0] <= index <= span[1]
        if index == span[0]:
            full, x = x, rows(x, kept)
        x = call(blocks[index], x, kept if on else None)
        LOOPED.append(x)
        if index == span[1]:
            processed, x = x, full.clone()
            for b in range(len(x)):
                x[b, kept[b]] = processed[b]
    return x


@dataclasses.dataclass
class Family:
    """How a model is made, called, routed, and written out."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    call: Callable[[nn.Module, dict[str, Any]], Tensor]
    explicit: Callable[[nn.Module, dict[str, Any], tuple[int, int], Tensor], Tensor]
    lists: tuple[str, ...]
    settings: dict[str, Any]
    tokens: int = N
    tokens_name: str = 'hidden_states'


def unpatchified(x: Tensor, patch: int = 2) -> Tensor:
    x = x.reshape(len(x), 4, 4, patch, patch, -1)
    return torch.einsum('nhwpqc->nchpwq', x).reshape(len(x), -1, 4 * patch, 4 * patch)


def build_dit() -> nn.Module:
    sizes = {'num_attention_heads': 2, 'attention_head_dim': 8, 'num_layers': 4}
    return DiTTransformer2DModel(**sizes, in_channels=3, sample_size=8, patch_size=2, num_embeds_ada_norm=10)


def explicit_dit(model, inputs, span, kept):
    c = {'timestep': inputs['timestep'], 'class_labels': inputs['class_labels']}
    x = model.pos_embed(inputs['hidden_states'])
    x = walk(model.transformer_blocks, x, lambda block, x, _: block(x, **c), span, kept)
    emb = model.transformer_blocks[0].norm1.emb(*c.values(), hidden_dtype=x.dtype)
    shift, scale = model.proj_out_1(nn.functional.silu(emb)).chunk(2, dim=1)
    return unpatchified(model.proj_out_2(model.norm_out(x) * (1 + scale[:, None]) + shift[:, None]))


def build_pixart() -> nn.Module:
    sizes = {'num_attention_heads': 2, 'attention_head_dim': 8, 'num_layers': 4, 'cross_attention_dim': 16}
    return PixArtTransformer2DModel(
        **sizes, in_channels=4, out_channels=4, sample_size=8, patch_size=2, caption_channels=12,
        use_additional_conditions=False,
    )  # fmt: skip


def explicit_pixart(model, inputs, span, kept):
    x = model.pos_embed(inputs['hidden_states'])
    c, emb = model.adaln_single(inputs['timestep'], {}, batch_size=B, hidden_dtype=x.dtype)
    text = model.caption_projection(inputs['encoder_hidden_states'])
    bias = (1 - inputs['encoder_attention_mask'].float()).unsqueeze(1) * -10000.0
    others = {'encoder_hidden_states': text, 'encoder_attention_mask': bias, 'timestep': c}
    x = walk(model.transformer_blocks, x, lambda block, x, _: block(x, **others), span, kept)
    shift, scale = (model.scale_shift_table[None] + emb[:, None]).chunk(2, dim=1)
    return unpatchified(model.proj_out(model.norm_out(x) * (1 + scale) + shift))


def build_sd3() -> nn.Module:
    sizes = {'num_attention_heads': 2, 'attention_head_dim': 8, 'num_layers': 4, 'caption_projection_dim': 16}
    return SD3Transformer2DModel(
        **sizes, in_channels=4, out_channels=4, sample_size=8, patch_size=2, joint_attention_dim=12,
        pooled_projection_dim=6, pos_embed_max_size=8,
    )  # fmt: skip


def explicit_sd3(model, inputs, span, kept):
    x = model.pos_embed(inputs['hidden_states'])
    temb = model.time_text_embed(inputs['timestep'], inputs['pooled_projections'])
    text = [model.context_embedder(inputs['encoder_hidden_states'])]

    def call(block, x, _):
        text[0], x = block(hidden_states=x, encoder_hidden_states=text[0], temb=temb)
        return x

    x = walk(model.transformer_blocks, x, call, span, kept)
    return unpatchified(model.proj_out(model.norm_out(x, temb)))


def build_flux() -> nn.Module:
    sizes = {'num_layers': 3, 'num_single_layers': 3, 'attention_head_dim': 8, 'num_attention_heads': 2}
    return FluxTransformer2DModel(
        **sizes, patch_size=1, in_channels=4, joint_attention_dim=12, pooled_projection_dim=6, axes_dims_rope=(2, 2, 4)
    )


def flux_inputs() -> dict[str, Any]:
    places = torch.stack([torch.zeros(N), torch.arange(N) // 4, torch.arange(N) % 4], dim=1)
    return {
        'hidden_states': noise(B, N, 4),
        'encoder_hidden_states': noise(B, 5, 12, seed=2),
        'pooled_projections': noise(B, 6, seed=3),
        'timestep': STEPS / 1000,
        'img_ids': places,
        'txt_ids': torch.zeros(5, 3),
    }


def explicit_flux(model, inputs, span, kept):
    x = model.x_embedder(inputs['hidden_states'])
    temb = model.time_text_embed(inputs['timestep'] * 1000, inputs['pooled_projections'])
    text = [model.context_embedder(inputs['encoder_hidden_states'])]
    whole = model.pos_embed(torch.cat([inputs['txt_ids'], inputs['img_ids']]))
    places = torch.cat([torch.arange(5), kept[0] + 5])
    reduced = tuple(table[places] for table in whole)

    def call(block, x, on):
        rope = whole if on is None else reduced
        text[0], x = block(hidden_states=x, encoder_hidden_states=text[0], temb=temb, image_rotary_emb=rope)
        return x

    x = walk([*model.transformer_blocks, *model.single_transformer_blocks], x, call, span, kept)
    return model.proj_out(model.norm_out(x, temb))


def build_timm() -> nn.Module:
    sizes = {'img_size': 16, 'patch_size': 4, 'embed_dim': 16, 'depth': 4, 'num_heads': 2, 'num_classes': 5}
    return timm.models.vision_transformer.VisionTransformer(**sizes)


def explicit_timm(model, inputs, span, kept):
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(inputs['x']))))
    return model.head(model.norm(walk(model.blocks, x, lambda block, x, _: block(x), span, kept))[:, 0])


def build_vit() -> nn.Module:
    sizes = {'hidden_size': 16, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 32}
    return ViTModel(ViTConfig(**sizes, image_size=16, patch_size=4), add_pooling_layer=False)


def explicit_vit(model, inputs, span, kept):
    x = model.embeddings(inputs['pixel_values'])
    return model.layernorm(walk(model.get_submodule(VIT_LAYERS), x, lambda block, x, _: block(x), span, kept))


def build_bert() -> nn.Module:
    sizes = {'hidden_size': 16, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 32}
    dropout = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0}
    return BertModel(BertConfig(vocab_size=50, **sizes, **dropout), add_pooling_layer=False)


def padding() -> Tensor:
    mask = torch.ones(B, N, dtype=torch.int64)
    mask[1, 11:] = 0
    mask[2, 5:] = 0
    return mask


def explicit_bert(model, inputs, span, kept):
    def call(block, x, on):
        mask = inputs['attention_mask'] if on is None else rows(inputs['attention_mask'], on)
        bias = torch.zeros(B, 1, 1, x.shape[1]).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
        return block(x, bias) if TRANSFORMERS_5 else block(x, bias)[0]

    return walk(model.encoder.layer, model.embeddings(inputs['input_ids']), call, span, kept)


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)


def explicit_encoder(model, inputs, span, kept):
    def call(block, x, on):
        mask = inputs['src_key_padding_mask'] if on is None else rows(inputs['src_key_padding_mask'], on)
        return block(x, src_key_padding_mask=mask)

    return walk(model.layers, inputs['src'], call, span, kept)


def explicit_masked_encoder(model, inputs, span, kept):
    def call(block, x, on):
        return block(x, src_mask=inputs['mask'] if on is None else inputs['mask'][kept[0]][:, kept[0]])

    return walk(model.layers, inputs['src'], call, span, kept)


def sample(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


def image(channels: int, side: int = 8) -> Tensor:
    return noise(B, channels, side, side)


BIAS = noise(N, N, seed=4)
FAMILIES = {
    'diffusers_dit': Family(
        build_dit,
        lambda: {'hidden_states': image(3), 'timestep': STEPS, 'class_labels': LABELS},
        sample, explicit_dit, ('transformer_blocks',), {},
    ),
    'diffusers_pixart': Family(
        build_pixart,
        lambda: {
            'hidden_states': image(4), 'encoder_hidden_states': noise(B, 5, 12, seed=2), 'timestep': STEPS,
            'encoder_attention_mask': torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]),
        },
        sample, explicit_pixart, ('transformer_blocks',), {},
    ),
    'diffusers_sd3': Family(
        build_sd3,
        lambda: {
            'hidden_states': image(4), 'encoder_hidden_states': noise(B, 5, 12, seed=2),
            'pooled_projections': noise(B, 6, seed=3), 'timestep': STEPS,
        },
        sample, explicit_sd3, ('transformer_blocks',), {'tokens_out': 1},
    ),
    'diffusers_flux': Family(
        build_flux, flux_inputs, sample, explicit_flux, ('transformer_blocks', 'single_transformer_blocks'),
        {
            'blocks': ['transformer_blocks', 'single_transformer_blocks'], 'tokens_out': 1, 'shared': True,
            'token_arguments': {'image_rotary_emb': {'dims': 0, 'after': 'encoder_hidden_states'}},
        },
    ),
    'timm_vit': Family(
        build_timm, lambda: {'x': image(3, 16)}, lambda model, inputs: model(**inputs), explicit_timm, ('blocks',),
        {'always_keep': 1}, tokens=N + 1, tokens_name='x',
    ),
    'hf_vit': Family(
        build_vit, lambda: {'pixel_values': image(3, 16)}, sample, explicit_vit, (VIT_LAYERS,),
        {'always_keep': 1}, tokens=N + 1,
    ),
    'hf_bert': Family(
        build_bert,
        lambda: {'input_ids': torch.arange(B * N).view(B, N), 'attention_mask': padding()},
        sample, explicit_bert, ('encoder.layer',),
        {'always_keep': 1, 'tokens_out': 0, 'token_arguments': {'attention_mask': [-2, -1]}},
    ),
    'torch_encoder': Family(
        lambda: nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False),
        lambda: {'src': noise(B, N, 16), 'src_key_padding_mask': padding() == 0},
        lambda model, inputs: model(**inputs), explicit_encoder, ('layers',),
        {'always_keep': 1, 'token_arguments': ['src_key_padding_mask']}, tokens_name='src',
    ),
    'torch_encoder_with_a_bias': Family(
        lambda: nn.TransformerEncoder(layer(), 4, enable_nested_tensor=False),
        lambda: {'src': noise(B, N, 16), 'mask': BIAS},
        lambda model, inputs: model(**inputs), explicit_masked_encoder, ('layers',),
        {'shared': True, 'token_arguments': {'src_mask': [0, 1]}}, tokens_name='src',
    ),
    'torch_sequential': Family(
        lambda: nn.Sequential(*(layer() for _ in range(4))),
        lambda: {'input': noise(B, N, 16)}, lambda model, inputs: model(**inputs),
        lambda model, inputs, span, kept: walk(model, inputs['input'], lambda block, x, _: block(x), span, kept),
        ('',), {}, tokens_name='src',
    ),
}  # fmt: skip
