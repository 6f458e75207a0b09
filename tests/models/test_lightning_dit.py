"""LightningDiT: blocks against a second, slow implementation; rotary positions; routing; sizes, cost, grids."""

import cmath
import math

import pytest
import torch
from torch import Tensor

from tests.helpers import randomised
from tests.models.networks import inputs, linear_of, macs, on_meta, random_net, silu
from tread_composer.models import LightningDiT
from tread_composer.models.lightning_dit import LightningDiTBlock, rotary_table, rotate
from tread_composer.routing import Route, apply_tread


def table(grid: tuple[int, int], head_size: int = 8, batch_size: int = 1) -> Tensor:
    made = rotary_table(grid, head_size, device=torch.device('cpu'), dtype=torch.float64)
    return made.expand(batch_size, -1, -1, -1)


def slow_rotated(v: Tensor, row: int, column: int) -> Tensor:
    """A head's vector as complex numbers, each times a number of length 1."""
    pairs = [complex(v[2 * k], v[2 * k + 1]) for k in range(len(v) // 2)]
    half = len(pairs) // 2
    out = []
    for k, pair in enumerate(pairs):
        angle = (row if k < half else column) / 10000 ** ((k % half) / half)
        turned = pair * cmath.exp(1j * angle)
        out += [turned.real, turned.imag]
    return torch.tensor(out, dtype=torch.float64)


def slow_norm(v: Tensor, weight: Tensor) -> Tensor:
    return torch.tensor([float(one) / math.sqrt(sum(float(n) ** 2 for n in v) / len(v) + 1e-6) for one in v]) * weight


def slow_block(weights: dict[str, Tensor], x: Tensor, c: Tensor, places: list[tuple[int, int]], heads: int) -> Tensor:
    """A block for one sample ``[N, D]``, token by token and head by head, in float64; ``places`` are (row, column)."""
    width, linear = x.shape[1], linear_of(weights)
    size = width // heads
    m = linear('adaLN_modulation.1', silu(c)).reshape(6, width)
    qkv = [linear('attn.qkv', slow_norm(v, weights['norm1.weight']) * (1 + m[1]) + m[0]) for v in x]
    attended = torch.zeros_like(x)
    for head in range(heads):
        q, k, v = ([one[p * width + head * size : p * width + (head + 1) * size] for one in qkv] for p in range(3))
        if 'attn.q_norm.weight' in weights:
            q = [slow_norm(one, weights['attn.q_norm.weight']) for one in q]
            k = [slow_norm(one, weights['attn.k_norm.weight']) for one in k]
        q, k = ([slow_rotated(one, *place) for one, place in zip(vectors, places, strict=True)] for vectors in (q, k))
        for i in range(len(x)):
            scores = [math.exp(float(q[i] @ other) / math.sqrt(size)) for other in k]
            mixed = sum(score / sum(scores) * value for score, value in zip(scores, v, strict=True))
            attended[i, head * size : (head + 1) * size] = mixed
    out = torch.stack([token + m[2] * linear('attn.proj', one) for token, one in zip(x, attended, strict=True)])
    for i, token in enumerate(out.clone()):
        a, b = linear('mlp.w12', slow_norm(token, weights['norm2.weight']) * (1 + m[4]) + m[3]).chunk(2)
        out[i] = token + m[5] * linear('mlp.w3', silu(a) * b)
    return out


@pytest.mark.parametrize(('qk_norm', 'heads'), [(False, 3), (True, 2)])
def test_a_block_equals_a_slow_second_implementation(qk_norm: bool, heads: int) -> None:
    block = randomised(LightningDiTBlock(24, heads, 4.0, qk_norm)).double()
    weights = {key: value.detach() * 2 for key, value in block.state_dict().items()}
    block.load_state_dict(weights)
    assert weights['mlp.w3.weight'].shape == (24, 64)
    generator = torch.Generator().manual_seed(1)
    x, c = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((2, 6, 24), (2, 24)))
    places = [(row, column) for row in range(2) for column in range(3)]
    with torch.no_grad():
        out = block(x, c, table((2, 3), 24 // heads, batch_size=2))
    for i in range(2):
        slow = slow_block(weights, x[i], c[i], places, heads)
        assert (slow - x[i]).std() > 0.1
        torch.testing.assert_close(out[i], slow, rtol=1e-6, atol=1e-6)


def test_qk_norm_adds_its_weights_only() -> None:
    plain, normed = random_net(LightningDiT), random_net(LightningDiT, qk_norm=True)
    more = normed.state_dict().keys() - plain.state_dict().keys()
    assert more == {f'blocks.{i}.attn.{name}_norm.weight' for i in range(3) for name in 'qk'}


def test_qk_norm_bounds_the_attention_of_large_queries() -> None:
    """The cure for losses that become nan: what the norm takes in may be of any size."""
    model = random_net(LightningDiT, qk_norm=True)
    expected = model(*inputs())
    for block in model.blocks:
        block.attn.qkv.weight.data[:48] *= 1e4  # queries and keys
        block.attn.qkv.bias.data[:48] *= 1e4
    torch.testing.assert_close(model(*inputs()), expected, rtol=1e-3, atol=1e-3)


def test_attention_scores_depend_on_differences_of_positions_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 12, 8, generator=generator, dtype=torch.float64) for _ in range(2))

    def scores(rope: Tensor) -> Tensor:
        return rotate(q, rope) @ rotate(k, rope).transpose(2, 3)

    here = scores(table((3, 4)))
    large = table((9, 9)).unflatten(1, (9, 9))
    for down, right in ((0, 5), (6, 0), (4, 3)):
        shifted = large[:, down : down + 3, right : right + 4].flatten(1, 2)
        torch.testing.assert_close(scores(shifted), here, rtol=1e-10, atol=1e-10)
    flipped = large[:, :4, :3].transpose(1, 2).flatten(1, 2)  # rows for columns is another geometry
    assert not torch.allclose(scores(flipped), here, atol=1e-2)
    torch.testing.assert_close(rotate(q, table((3, 4))).norm(dim=3), q.norm(dim=3))


def test_the_table_is_handed_out_once_for_all_samples_and_blocks_and_in_float32() -> None:
    seen = []
    model = random_net(LightningDiT).bfloat16()
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[2]))
    x, t, labels = inputs()
    model(x.bfloat16(), t, labels)
    assert [(tuple(rope.shape), rope.dtype) for rope in seen] == [((3, 16, 2, 4), torch.float32)] * 3
    assert {rope.data_ptr() for rope in seen} == {seen[0].data_ptr()} and seen[0].stride(0) == 0


def test_a_table_of_other_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match='1 samples x 7 tokens'):
        random_net(LightningDiT).blocks[0](torch.randn(2, 7, 24), torch.randn(2, 24), table((1, 7)).float())
    with pytest.raises(ValueError, match='width 6'):
        table((2, 2), head_size=6)


@pytest.mark.parametrize(
    ('name', 'latent_size', 'channels', 'learn_sigma', 'count'),
    [
        ('LightningDiT-XL/1', 16, 32, False, 675_256_736),  # the authors' class has as many
        ('LightningDiT-XL/2', 32, 4, False, 675_219_856),
        ('LightningDiT-B/1', 16, 32, True, 130_580_800),
    ],
)
def test_parameter_counts(name: str, latent_size: int, channels: int, learn_sigma: bool, count: int) -> None:
    model = on_meta(LightningDiT, name, latent_size, channels, learn_sigma=learn_sigma)
    sizes = LightningDiT.presets[name]
    d, depth, p, h = sizes['hidden_size'], sizes['depth'], sizes['patch_size'], sizes['hidden_size'] * 8 // 3
    out = p * p * channels * (1 + learn_sigma)
    block = (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 2 * h + (h + 1) * d + (d + 1) * 6 * d + 2 * d
    ends = (p * p * channels + 1) * d + 257 * d + (d + 1) * d + 1001 * d + (d + 1) * out + (d + 1) * 2 * d + d
    assert sum(q.numel() for q in model.parameters()) == count == depth * block + ends + (latent_size // p) ** 2 * d


def test_names_and_shapes_of_a_block_are_those_of_the_published_files() -> None:
    model = on_meta(LightningDiT, 'LightningDiT-XL/1', 16, 32)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    layers = {
        'attn.qkv': (3456, 1152), 'attn.proj': (1152, 1152), 'mlp.w12': (6144, 1152), 'mlp.w3': (1152, 3072),
        'adaLN_modulation.1': (6912, 1152),
    }  # fmt: skip
    expected = {f'blocks.27.{name}.weight': shape for name, shape in layers.items()}
    expected |= {f'blocks.27.{name}.bias': shape[:1] for name, shape in layers.items()}
    expected |= {'blocks.27.norm1.weight': (1152,), 'blocks.27.norm2.weight': (1152,)}
    assert {key: shape for key, shape in shapes.items() if key.startswith('blocks.27.')} == expected
    rest = {key for key in shapes if not key.startswith('blocks.')}
    assert rest == {
        'pos_embed', 'x_embedder.proj.weight', 'x_embedder.proj.bias', 't_embedder.mlp.0.weight',
        't_embedder.mlp.0.bias', 't_embedder.mlp.2.weight', 't_embedder.mlp.2.bias',
        'y_embedder.embedding_table.weight', 'final_layer.norm_final.weight', 'final_layer.linear.weight',
        'final_layer.linear.bias', 'final_layer.adaLN_modulation.1.weight', 'final_layer.adaLN_modulation.1.bias',
    }  # fmt: skip


@pytest.mark.parametrize('rate', [None, 0.5])
def test_forward_cost_is_that_of_the_flop_model(rate: float | None) -> None:
    model = on_meta(LightningDiT, 'LightningDiT-XL/1', 16, 32)
    if rate is not None:
        routing = apply_tread(model, Route(2, -4, rate), token_arguments=model.token_arguments)
        routing.arm([torch.empty(1, 128, dtype=torch.int64, device='meta')], num_tokens=256)
    d, sparse = 1152, 0 if rate is None else 23
    blocks = sum(12 * n * d**2 + 2 * n**2 * d + 6 * d**2 for n in [256] * (28 - sparse) + [128] * sparse)
    expected = blocks + 3 * d**2 + 256 * d + 2 * 32 * 256 * d  # 16 and 32 channels of p = 2 become 32 and 32
    assert macs(model) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(('height', 'width'), [(12, 12), (4, 14), (16, 6)])
def test_other_grids_work_and_agree_with_the_grid_of_training_where_they_overlap(height: int, width: int) -> None:
    model = random_net(LightningDiT).eval()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args[::2]))
    x, t, labels = inputs(height=height, width=width)
    out = model(x, t, labels)
    assert out.shape == (3, 3, height, width) and out.isfinite().all()
    square = torch.zeros(3, 3, 8, 8)
    square[:, :, :height, :width] = x[:, :, :8, :8]
    model(square, t, labels)
    tokens, rope, tokens_there, rope_there = seen
    rows, columns = min(height // 2, 4), min(width // 2, 4)
    for one, there in ((tokens, tokens_there), (rope, rope_there)):
        here = one.unflatten(1, (height // 2, width // 2))
        torch.testing.assert_close(here[:, :rows, :columns], there.unflatten(1, (4, 4))[:, :rows, :columns])


def test_positions_beyond_the_grid_of_training_go_on_counting() -> None:
    """A network for the larger grid, with the same weights, says the same: nothing is stretched."""
    small, large = random_net(LightningDiT).eval(), random_net(LightningDiT, latent_size=12).eval()
    weights = {name: value for name, value in small.state_dict().items() if name != 'pos_embed'}
    large.load_state_dict(weights, strict=False)
    torch.testing.assert_close(small(*inputs(height=12, width=12)), large(*inputs(height=12, width=12)))
    torch.testing.assert_close(large(*inputs(height=8, width=8)), small(*inputs()))
