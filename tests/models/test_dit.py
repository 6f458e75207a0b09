"""DiT against the published parameter tables, the FLOP model and a second, slow implementation."""

import math

import pytest
import torch
from torch import Tensor

from tests.models.networks import fresh_net, gelu, inputs, linear_of, macs, on_meta, random_net, silu, slow_position
from tread_composer.models import DiT, without_sigma
from tread_composer.models.layers import sincos_positions


@pytest.mark.parametrize(
    ('name', 'with_sigma', 'without'),
    [
        ('DiT-S/2', 32_963_360, 32_957_200),
        ('DiT-B/2', 130_512_416, 130_500_112),
        ('DiT-L/2', 458_102_816, 458_086_416),
        ('DiT-XL/2', 675_129_632, 675_111_184),
    ],
)
def test_parameter_counts_are_the_published_ones(name: str, with_sigma: int, without: int) -> None:
    assert sum(p.numel() for p in on_meta(DiT, name, learn_sigma=True).parameters()) == with_sigma
    assert sum(p.numel() for p in on_meta(DiT, name).parameters()) == without


def test_keys_and_shapes_of_xl2_are_those_of_the_published_checkpoint() -> None:
    expected = {
        'pos_embed': (1, 256, 1152),
        'x_embedder.proj.weight': (1152, 4, 2, 2),
        'x_embedder.proj.bias': (1152,),
        't_embedder.mlp.0.weight': (1152, 256),
        't_embedder.mlp.0.bias': (1152,),
        't_embedder.mlp.2.weight': (1152, 1152),
        't_embedder.mlp.2.bias': (1152,),
        'y_embedder.embedding_table.weight': (1001, 1152),
        'final_layer.linear.weight': (32, 1152),
        'final_layer.linear.bias': (32,),
        'final_layer.adaLN_modulation.1.weight': (2304, 1152),
        'final_layer.adaLN_modulation.1.bias': (2304,),
    }
    for i in range(28):
        for name, rows, columns in (
            ('attn.qkv', 3456, 1152),
            ('attn.proj', 1152, 1152),
            ('mlp.fc1', 4608, 1152),
            ('mlp.fc2', 1152, 4608),
            ('adaLN_modulation.1', 6912, 1152),
        ):
            expected[f'blocks.{i}.{name}.weight'] = (rows, columns)
            expected[f'blocks.{i}.{name}.bias'] = (rows,)
    weights = on_meta(DiT, 'DiT-XL/2', learn_sigma=True).state_dict()
    assert {key: tuple(value.shape) for key, value in weights.items()} == expected


def test_presets() -> None:
    assert len(DiT.presets) == 15
    assert DiT.presets['DiT-L/8'] == {'patch_size': 8, 'hidden_size': 1024, 'depth': 24, 'num_heads': 16}
    assert on_meta(DiT, 'DiT-B/4').num_tokens == 64
    assert on_meta(DiT, 'DiT-XL/2', latent_size=64).state_dict()['pos_embed'].shape == (1, 1024, 1152)


@pytest.mark.parametrize(
    ('name', 'latent_size', 'gmacs'),
    [
        ('DiT-S/2', 32, 6.06),
        ('DiT-B/2', 32, 23.01),
        ('DiT-L/2', 32, 80.70),
        ('DiT-XL/2', 32, 118.62),
        ('DiT-S/2', 64, 31.44),
        ('DiT-XL/2', 64, 524.54),
    ],
)
def test_forward_cost_is_that_of_the_flop_model(name: str, latent_size: int, gmacs: float) -> None:
    model = on_meta(DiT, name, latent_size, learn_sigma=True)
    counted = macs(model) / 1e9
    n, d, depth = model.num_tokens, model.hidden_size, model.depth
    formula = depth * (12 * n * d**2 + 2 * n**2 * d + 6 * d**2) + 2 * d**2 + 256 * d + d**2 + (16 + 32) * n * d
    assert counted == pytest.approx(formula / 1e9, rel=1e-12)
    assert counted == pytest.approx(gmacs, rel=5e-4, abs=0.005)  # the table has two decimals


def slow_dit(weights: dict[str, Tensor], x: Tensor, t: float, label: int | None, *, p: int, heads: int) -> Tensor:
    """One sample ``[C, H, W]`` through a DiT, written from the paper with loops; everything in float64."""
    side = x.shape[1] // p
    width, linear = weights['x_embedder.proj.bias'].shape[0], linear_of(weights)

    def norm(v: Tensor) -> Tensor:
        centred = v - v.mean(-1, keepdim=True)
        return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-6)

    tokens = []
    for row in range(side):
        for column in range(side):
            patch = x[:, row * p : (row + 1) * p, column * p : (column + 1) * p]
            token = torch.einsum('dcij,cij->d', weights['x_embedder.proj.weight'], patch)
            tokens.append(token + weights['x_embedder.proj.bias'] + slow_position(width, row, column))
    h = torch.stack(tokens)

    frequencies = [10000 ** (-k / 128) for k in range(128)]
    sinusoid = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
    c = linear('t_embedder.mlp.2', silu(linear('t_embedder.mlp.0', torch.tensor(sinusoid, dtype=torch.float64))))
    if label is not None:
        c = c + weights['y_embedder.embedding_table.weight'][label]

    block = 0
    while f'blocks.{block}.attn.qkv.weight' in weights:
        name = f'blocks.{block}'
        m = linear(f'{name}.adaLN_modulation.1', silu(c)).reshape(6, width)
        qkv = linear(f'{name}.attn.qkv', norm(h) * (1 + m[1]) + m[0])
        size = width // heads
        attended = []
        for head in range(heads):
            q, k, v = (qkv[:, part * width + head * size : part * width + (head + 1) * size] for part in range(3))
            scores = torch.exp(torch.einsum('nd,md->nm', q, k) / math.sqrt(size))
            attended.append(torch.einsum('nm,md->nd', scores / scores.sum(1, keepdim=True), v))
        h = h + m[2] * linear(f'{name}.attn.proj', torch.cat(attended, dim=1))
        inner = gelu(linear(f'{name}.mlp.fc1', norm(h) * (1 + m[4]) + m[3]))
        h = h + m[5] * linear(f'{name}.mlp.fc2', inner)
        block += 1

    shift, scale = linear('final_layer.adaLN_modulation.1', silu(c)).reshape(2, width)
    patches = linear('final_layer.linear', norm(h) * (1 + scale) + shift)
    channels = patches.shape[1] // p**2
    out = torch.zeros(channels, side * p, side * p, dtype=torch.float64)
    for n in range(side**2):
        for i in range(p):
            for j in range(p):
                for channel in range(channels):
                    value = patches[n, (i * p + j) * channels + channel]
                    out[channel, n // side * p + i, n % side * p + j] = value
    return out


@pytest.mark.parametrize(
    ('num_classes', 'learn_sigma', 'patch_size', 'num_heads'), [(5, True, 2, 3), (5, False, 4, 2), (0, False, 2, 6)]
)
def test_output_equals_a_slow_second_implementation(
    num_classes: int, learn_sigma: bool, patch_size: int, num_heads: int
) -> None:
    sizes = {'learn_sigma': learn_sigma, 'patch_size': patch_size, 'num_heads': num_heads}
    model = random_net(DiT, num_classes, **sizes).double()
    weights = {key: value.detach() for key, value in model.state_dict().items()}
    x, t, labels = inputs()
    with torch.no_grad():
        out = model(x, t, labels)
    assert out.shape == (3, 6 if learn_sigma else 3, 8, 8)
    for i in range(3):
        label = int(labels[i]) if num_classes else None
        slow = slow_dit(weights, x[i].double(), float(t[i]), label, p=patch_size, heads=num_heads)
        assert slow.std() > 0.3
        torch.testing.assert_close(out[i], slow, rtol=1e-5, atol=1e-5)


def test_positions_equal_a_loop() -> None:
    positions = sincos_positions(width=24, grid_size=5)
    slow = torch.stack([slow_position(24, row, column) for row in range(5) for column in range(5)])
    assert positions.dtype == torch.float32
    torch.testing.assert_close(positions, slow.float(), rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match='divisible by 4'):
        sincos_positions(width=6, grid_size=2)


def test_initial_weights_have_the_published_spread() -> None:
    torch.manual_seed(0)
    model = DiT(latent_size=8, in_channels=4, num_classes=500, hidden_size=128, depth=1, num_heads=2)
    weights = model.state_dict()
    for name in ('y_embedder.embedding_table.weight', 't_embedder.mlp.0.weight', 't_embedder.mlp.2.weight'):
        assert weights[name].std() == pytest.approx(0.02, rel=0.03)
    for name in ('blocks.0.attn.qkv.weight', 'blocks.0.mlp.fc2.weight', 'x_embedder.proj.weight'):
        rows, columns = weights[name].flatten(1).shape
        bound = math.sqrt(6 / (rows + columns))
        assert weights[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert weights[name].abs().max() <= bound
    assert all(not value.any() for name, value in weights.items() if name.endswith('.bias'))


def test_without_sigma_keeps_the_first_channels_and_refuses_other_heads() -> None:
    full, half = random_net(DiT, learn_sigma=True), fresh_net(DiT)
    weights = full.state_dict()
    half.load_state_dict(without_sigma(weights, in_channels=3, patch_size=2), strict=True)
    torch.testing.assert_close(half(*inputs()), full(*inputs())[:, :3])
    assert weights['final_layer.linear.bias'].shape == (24,)  # the dict that was passed in is left as it was
    with pytest.raises(ValueError, match='12 rows; a head with variance has 24'):
        without_sigma(half.state_dict(), in_channels=3, patch_size=2)
    with pytest.raises(ValueError, match='final_layer'):
        without_sigma({}, in_channels=3, patch_size=2)
