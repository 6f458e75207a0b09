"""The networks of DiT, SiT, CompVis/tread and MaskDiT, slowly: float64, one sample, one head, one token at a time.

Written from the published key tables and formulas alone (reference: arXiv 2212.09748, 2401.08740, 2306.09305,
2206.00364 and the tables of keys in their repositories), and nothing of the package is used. Each function takes the
tensors as the project's file has them.
"""

import math

import torch

SIZES = {'width': 32, 'depth': 2, 'heads': 4, 'channels': 4, 'patch': 2, 'side': 8, 'classes': 5}
DECODER = {'width': 64, 'depth': 2, 'heads': 16}


def positions(width, side):
    """[1, N, width]: the first half of the width from the column, the second from the row; sines before cosines."""
    rows = []
    for row in range(side):
        for column in range(side):
            values = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (k / (width // 4)) for k in range(width // 4)]
                values += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            rows.append(values)
    return torch.tensor(rows, dtype=torch.float64).float().unsqueeze(0)


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


def silu(x):
    return x / (1 + torch.exp(-x))


def layer_norm(x):
    return (x - x.mean()) / ((x - x.mean()).square().mean() + 1e-6).sqrt()


def apply_linear(w, name, x):
    return w[f'{name}.weight'] @ x + w[f'{name}.bias']


def run_block(w, name, tokens, c, heads):
    shift1, scale1, gate1, shift2, scale2, gate2 = apply_linear(w, f'{name}.adaLN_modulation.1', silu(c)).split(
        len(tokens[0])
    )
    inner = [apply_linear(w, f'{name}.attn.qkv', layer_norm(x) * (1 + scale1) + shift1) for x in tokens]
    size = len(tokens[0]) // heads
    mixed = []
    for query in inner:
        parts = []
        for head in range(heads):
            of = slice(head * size, (head + 1) * size)
            q = query[: len(tokens[0])][of]
            keys = [one[len(tokens[0]) : 2 * len(tokens[0])][of] for one in inner]
            values = [one[2 * len(tokens[0]) :][of] for one in inner]
            weights = torch.exp(torch.stack([q @ key / math.sqrt(size) for key in keys]))
            parts.append(sum(a * value for a, value in zip(weights / weights.sum(), values, strict=True)))
        mixed.append(apply_linear(w, f'{name}.attn.proj', torch.cat(parts)))
    tokens = [x + gate1 * new for x, new in zip(tokens, mixed, strict=True)]
    out = []
    for x in tokens:
        h = apply_linear(w, f'{name}.mlp.fc1', layer_norm(x) * (1 + scale2) + shift2)
        h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        out.append(x + gate2 * apply_linear(w, f'{name}.mlp.fc2', h))
    return out


def modulated(w, name, tokens, c):
    shift, scale = apply_linear(w, f'{name}.adaLN_modulation.1', silu(c)).chunk(2)
    return [apply_linear(w, f'{name}.linear', layer_norm(x) * (1 + scale) + shift) for x in tokens]


def network(weights, x_chw, t, label):
    """The network's own output for one sample, all channels of its head; label None is MaskDiT's zero vector."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    p, side = SIZES['patch'], SIZES['side'] // SIZES['patch']
    angles = [float(t) * math.exp(-math.log(10000) * k / 128) for k in range(128)]
    sinusoid = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    c = apply_linear(w, 't_embedder.mlp.2', silu(apply_linear(w, 't_embedder.mlp.0', sinusoid)))
    table = w['y_embedder.embedding_table.weight']
    if 'decoder_pos_embed' in w:
        one_hot = torch.zeros(SIZES['classes'], dtype=torch.float64)
        if label is not None:
            one_hot[label] = 1
        c = c + table @ one_hot
    else:
        c = c + table[label]
    kernel = w['x_embedder.proj.weight'].flatten(1)
    tokens = []
    for n in range(side * side):
        row, column = divmod(n, side)
        square = x_chw.double()[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
        tokens.append(kernel @ square.flatten() + w['x_embedder.proj.bias'] + w['pos_embed'][0, n])
    for i in range(SIZES['depth']):
        tokens = run_block(w, f'blocks.{i}', tokens, c, SIZES['heads'])
    if 'decoder_pos_embed' in w:
        tokens = modulated(w, 'decoder_layer', tokens, c)
        tokens = [x + place for x, place in zip(tokens, w['decoder_pos_embed'][0], strict=True)]
        for i in range(DECODER['depth']):
            tokens = run_block(w, f'decoder_blocks.{i}', tokens, c, DECODER['heads'])
    patches = modulated(w, 'final_layer', tokens, c)
    channels = len(patches[0]) // (p * p)
    out = torch.zeros(channels, side * p, side * p, dtype=torch.float64)
    for n, values in enumerate(patches):
        row, column = divmod(n, side)
        for i in range(p):
            for j in range(p):
                first = (i * p + j) * channels
                out[:, row * p + i, column * p + j] = values[first : first + channels]
    return out


def sit_velocity(weights, x_chw, t, label):
    """SiT: data - noise at its own time, where t = 1 is data; of the head's 2C channels the first C."""
    return network(weights, x_chw, t, label)[: SIZES['channels']]


def edm_denoised(weights, x_chw, sigma, label):
    """EDM's preconditioning with a data deviation of 0.5."""
    total = sigma**2 + 0.5**2
    inner = network(weights, x_chw.double() / math.sqrt(total), math.log(sigma) / 4, label)
    return 0.5**2 / total * x_chw.double() + sigma * 0.5 / math.sqrt(total) * inner
