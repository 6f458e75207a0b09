"""The networks of DiT, SiT, CompVis/tread and MaskDiT once more, in float64 and plain functions of torch.

Written from the published key tables and formulas alone (reference: arXiv 2212.09748, 2401.08740, 2306.09305,
2206.00364 and the tables of keys in their repositories), and nothing of the package is used. Each function takes the
tensors as the project's file has them. Shapes: one sample, C channels, H x W latent pixels, N tokens, D width.
"""

import math

import torch
from torch.nn import functional

SIZES = {'width': 32, 'depth': 2, 'heads': 4, 'channels': 4, 'patch': 2, 'side': 8, 'classes': 5}
DECODER = {'width': 64, 'depth': 2, 'heads': 16}


def positions(width, side):
    """[1, N, D]: the first half of the width from the column, the second from the row; sines before cosines."""
    frequencies = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns, rows = line.repeat(side, 1), line.repeat_interleave(side, 0)
    return torch.cat([columns, rows], dim=1).float().unsqueeze(0)


def make_weights(head_channels, maskdit=False, seed=0):
    """Random weights under the published names."""
    generator = torch.Generator().manual_seed(seed)
    d, p, c, k = SIZES['width'], SIZES['patch'], SIZES['channels'], SIZES['classes']

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    out = {'pos_embed': positions(d, SIZES['side'] // p), 'x_embedder.proj.weight': random(d, c, p, p)}
    out['x_embedder.proj.bias'] = random(d)
    out['t_embedder.mlp.0.weight'], out['t_embedder.mlp.0.bias'] = random(d, 256), random(d)
    out['t_embedder.mlp.2.weight'], out['t_embedder.mlp.2.bias'] = random(d, d), random(d)
    out['y_embedder.embedding_table.weight'] = random(d, k) if maskdit else random(k + 1, d)

    def linear(name, rows, columns):
        out[f'{name}.weight'], out[f'{name}.bias'] = random(rows, columns), random(rows)

    def block(name, width):
        linear(f'{name}.attn.qkv', 3 * width, width)
        linear(f'{name}.attn.proj', width, width)
        linear(f'{name}.mlp.fc1', 4 * width, width)
        linear(f'{name}.mlp.fc2', width, 4 * width)
        linear(f'{name}.adaLN_modulation.1', 6 * width, d)

    for i in range(SIZES['depth']):
        block(f'blocks.{i}', d)
    last = DECODER['width'] if maskdit else d
    if maskdit:
        out['decoder_pos_embed'] = positions(last, SIZES['side'] // p)
        out['mask_token'] = random(1, 1, last)
        linear('decoder_layer.linear', last, d)
        linear('decoder_layer.adaLN_modulation.1', 2 * d, d)
        for i in range(DECODER['depth']):
            block(f'decoder_blocks.{i}', last)
    linear('final_layer.linear', p * p * head_channels, last)
    linear('final_layer.adaLN_modulation.1', 2 * last, d)
    return out


def apply_linear(w, name, x):
    return functional.linear(x, w[f'{name}.weight'], w[f'{name}.bias'])


def modulated(x_ND, shift_D, scale_D):
    return functional.layer_norm(x_ND, x_ND.shape[-1:], eps=1e-6) * (1 + scale_D) + shift_D


def run_block(w, name, x_ND, c_D, heads):
    shift1, scale1, gate1, shift2, scale2, gate2 = apply_linear(
        w, f'{name}.adaLN_modulation.1', functional.silu(c_D)
    ).chunk(6)
    inner = apply_linear(w, f'{name}.attn.qkv', modulated(x_ND, shift1, scale1))
    q, k, v = inner.view(len(x_ND), 3, heads, -1).permute(1, 2, 0, 3)  # each: head, token, width of a head
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    mixed = (weights @ v).transpose(0, 1).flatten(1)
    x_ND = x_ND + gate1 * apply_linear(w, f'{name}.attn.proj', mixed)
    hidden = functional.gelu(apply_linear(w, f'{name}.mlp.fc1', modulated(x_ND, shift2, scale2)), approximate='tanh')
    return x_ND + gate2 * apply_linear(w, f'{name}.mlp.fc2', hidden)


def run_head(w, name, x_ND, c_D):
    shift, scale = apply_linear(w, f'{name}.adaLN_modulation.1', functional.silu(c_D)).chunk(2)
    return apply_linear(w, f'{name}.linear', modulated(x_ND, shift, scale))


def embedded(w, x_CHW, t, label):
    """The condition of one sample, and its patches as tokens; label None is MaskDiT's zero vector."""
    angles = float(t) * 10000 ** -(torch.arange(128, dtype=torch.float64) / 128)
    hidden = apply_linear(w, 't_embedder.mlp.0', torch.cat([angles.cos(), angles.sin()]))
    c_D = apply_linear(w, 't_embedder.mlp.2', functional.silu(hidden))
    table = w['y_embedder.embedding_table.weight']
    table = table.T if 'decoder_pos_embed' in w else table  # MaskDiT's is a linear layer on one-hot labels
    weight, bias = w['x_embedder.proj.weight'], w['x_embedder.proj.bias']
    patches = functional.conv2d(x_CHW.double()[None], weight, bias, stride=SIZES['patch'])
    return c_D if label is None else c_D + table[label], patches[0].flatten(1).T + w['pos_embed'][0]


def picture(tokens):
    """A token holds its square row by row, the channels of a pixel side by side."""
    p, side = SIZES['patch'], SIZES['side'] // SIZES['patch']
    return tokens.view(side, side, p, p, -1).permute(4, 0, 2, 1, 3).reshape(-1, side * p, side * p)


def network(weights, x_CHW, t, label):
    """The network's own output for one sample, all channels of its head."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    c_D, x_ND = embedded(w, x_CHW, t, label)
    for i in range(SIZES['depth']):
        x_ND = run_block(w, f'blocks.{i}', x_ND, c_D, SIZES['heads'])
    if 'decoder_pos_embed' in w:
        x_ND = run_head(w, 'decoder_layer', x_ND, c_D) + w['decoder_pos_embed'][0]
        for i in range(DECODER['depth']):
            x_ND = run_block(w, f'decoder_blocks.{i}', x_ND, c_D, DECODER['heads'])
    return picture(run_head(w, 'final_layer', x_ND, c_D))


def sit_velocity(weights, x_CHW, t, label):
    """SiT: data - noise at its own time, where t = 1 is data; of the head's 2C channels the first C."""
    return network(weights, x_CHW, t, label)[: SIZES['channels']]


def edm_denoised(weights, x_CHW, sigma, label):
    """EDM's preconditioning with a data deviation of 0.5."""
    total = sigma**2 + 0.5**2
    inner = network(weights, x_CHW.double() / math.sqrt(total), math.log(sigma) / 4, label)
    return 0.5**2 / total * x_CHW.double() + sigma * 0.5 / math.sqrt(total) * inner


def lightning_weights(qk_norm=False, head_channels=4, seed=0):
    """LightningDiT: RMSNorm, gated MLPs, and the rotary table as its file stores it, each angle twice."""
    generator = torch.Generator().manual_seed(seed)
    d, side, size = SIZES['width'], SIZES['side'] // SIZES['patch'], SIZES['width'] // SIZES['heads']
    out, inner = make_weights(head_channels, seed=seed), int(2 / 3 * 4 * d)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.2

    for i in range(SIZES['depth']):
        block = f'blocks.{i}'
        for name in ('fc1', 'fc2'):
            del out[f'{block}.mlp.{name}.weight'], out[f'{block}.mlp.{name}.bias']
        out[f'{block}.mlp.w12.weight'], out[f'{block}.mlp.w12.bias'] = random(2 * inner, d), random(2 * inner)
        out[f'{block}.mlp.w3.weight'], out[f'{block}.mlp.w3.bias'] = random(d, inner), random(d)
        out[f'{block}.norm1.weight'], out[f'{block}.norm2.weight'] = 1 + random(d), 1 + random(d)
        if qk_norm:
            out[f'{block}.attn.q_norm.weight'], out[f'{block}.attn.k_norm.weight'] = 1 + random(size), 1 + random(size)
    out['final_layer.norm_final.weight'] = 1 + random(d)
    frequencies = 1 / 10000 ** (torch.arange(0, size // 2, 2) / (size // 2))
    line = torch.outer(torch.arange(side), frequencies).repeat_interleave(2, 1)
    angles = torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)
    out['feat_rope.freqs_cos'], out['feat_rope.freqs_sin'] = angles.cos(), angles.sin()
    return out


def lightning_velocity(weights, x_CHW, t, label):
    """LightningDiT: data - noise at its own time, where t = 1 is data."""
    w = {name: tensor.double() for name, tensor in weights.items()}

    def normed(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f'{name}.weight']

    def turned(x_HNF):  # (a, b) -> (a cos - b sin, b cos + a sin) for each pair
        swapped = torch.stack([-x_HNF[..., 1::2], x_HNF[..., 0::2]], dim=-1).flatten(-2)
        return x_HNF * w['feat_rope.freqs_cos'] + swapped * w['feat_rope.freqs_sin']

    c_D, x_ND = embedded(w, x_CHW, t, label)
    for i in range(SIZES['depth']):
        name = f'blocks.{i}'
        m = apply_linear(w, f'{name}.adaLN_modulation.1', functional.silu(c_D)).chunk(6)
        qkv = apply_linear(w, f'{name}.attn.qkv', normed(f'{name}.norm1', x_ND) * (1 + m[1]) + m[0])
        q, k, v = qkv.view(len(x_ND), 3, SIZES['heads'], -1).permute(1, 2, 0, 3)
        if f'{name}.attn.q_norm.weight' in w:
            q, k = normed(f'{name}.attn.q_norm', q), normed(f'{name}.attn.k_norm', k)
        mixed = (turned(q) @ turned(k).mT / math.sqrt(q.shape[-1])).softmax(-1) @ v
        x_ND = x_ND + m[2] * apply_linear(w, f'{name}.attn.proj', mixed.transpose(0, 1).flatten(1))
        a, b = apply_linear(w, f'{name}.mlp.w12', normed(f'{name}.norm2', x_ND) * (1 + m[4]) + m[3]).chunk(2, -1)
        x_ND = x_ND + m[5] * apply_linear(w, f'{name}.mlp.w3', functional.silu(a) * b)
    shift, scale = apply_linear(w, 'final_layer.adaLN_modulation.1', functional.silu(c_D)).chunk(2)
    out = apply_linear(w, 'final_layer.linear', normed('final_layer.norm_final', x_ND) * (1 + scale) + shift)
    return picture(out)[: SIZES['channels']]
