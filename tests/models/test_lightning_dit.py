"""LightningDiT: sizes, cost, grids, refusals and precision; its blocks are in test_lightning_blocks.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.models.lightning import SMALL, inputs, random_net, table
from tread_composer.models import LightningDiT
from tread_composer.routing import Route, apply_tread

# ---- sizes and cost


@pytest.mark.parametrize(
    ('name', 'latent_size', 'channels', 'learn_sigma', 'count'),
    [
        ('LightningDiT-XL/1', 16, 32, False, 675_256_736),  # the authors' class has as many
        ('LightningDiT-XL/2', 32, 4, False, 675_219_856),
        ('LightningDiT-B/1', 16, 32, True, 130_580_800),
    ],
)
def test_parameter_counts(name: str, latent_size: int, channels: int, learn_sigma: bool, count: int) -> None:
    sizes = LightningDiT.presets[name]
    with torch.device('meta'):
        model = LightningDiT(
            latent_size=latent_size, in_channels=channels, num_classes=1000, learn_sigma=learn_sigma, **sizes
        )
    d, depth, p, h = sizes['hidden_size'], sizes['depth'], sizes['patch_size'], sizes['hidden_size'] * 8 // 3
    out = p * p * channels * (1 + learn_sigma)
    block = (d + 1) * 3 * d + (d + 1) * d + (d + 1) * 2 * h + (h + 1) * d + (d + 1) * 6 * d + 2 * d
    ends = (p * p * channels + 1) * d + 257 * d + (d + 1) * d + 1001 * d + (d + 1) * out + (d + 1) * 2 * d + d
    assert sum(q.numel() for q in model.parameters()) == count == depth * block + ends + (latent_size // p) ** 2 * d
    assert [n for n, q in model.named_parameters() if not q.requires_grad] == ['pos_embed']


def test_names_and_shapes_of_a_block_are_those_of_the_published_files() -> None:
    with torch.device('meta'):
        model = LightningDiT(
            latent_size=16, in_channels=32, num_classes=1000, **LightningDiT.presets['LightningDiT-XL/1']
        )  # fmt: skip
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
    with torch.device('meta'):
        model = LightningDiT(
            latent_size=16, in_channels=32, num_classes=1000, **LightningDiT.presets['LightningDiT-XL/1']
        )  # fmt: skip
        if rate is not None:
            routing = apply_tread(model, Route(2, -4, rate), token_arguments=model.token_arguments)
            routing.arm([torch.empty(1, 128, dtype=torch.int64)], num_tokens=256)
        x, t, labels = torch.empty(1, 32, 16, 16), torch.empty(1), torch.empty(1, dtype=torch.long)
        with FlopCounterMode(display=False) as counter:
            model(x, t, labels)
    d, sparse = 1152, 0 if rate is None else 23
    blocks = sum(12 * n * d**2 + 2 * n**2 * d + 6 * d**2 for n in [256] * (28 - sparse) + [128] * sparse)
    expected = blocks + 3 * d**2 + 256 * d + 2 * 32 * 256 * d  # 16 and 32 channels of p = 2 become 32 and 32
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=1e-12)


# ---- behaviour


def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = LightningDiT(**SMALL, num_classes=5, qk_norm=True)
    assert torch.equal(model(*inputs()), torch.zeros(3, 3, 8, 8))
    tokens = torch.randn(2, 16, 24)
    assert torch.equal(model.blocks[1](tokens, torch.randn(2, 24), table((4, 4), batch_size=2).float()), tokens)
    assert all(torch.equal(q, torch.ones_like(q)) for n, q in model.named_parameters() if 'norm' in n)


@pytest.mark.parametrize(('height', 'width'), [(12, 12), (4, 14), (16, 6)])
def test_other_grids_work_and_agree_with_the_grid_of_training_where_they_overlap(height: int, width: int) -> None:
    model = random_net().eval()
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
    small, large = random_net().eval(), random_net(latent_size=12).eval()
    weights = {name: value for name, value in small.state_dict().items() if name != 'pos_embed'}
    large.load_state_dict(weights, strict=False)
    torch.testing.assert_close(small(*inputs(height=12, width=12)), large(*inputs(height=12, width=12)))
    torch.testing.assert_close(large(*inputs(height=8, width=8)), small(*inputs()))


def test_state_dict_round_trip() -> None:
    model, other = random_net(qk_norm=True), LightningDiT(**SMALL, num_classes=5, qk_norm=True)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs()), model(*inputs()))
    other.pos_embed.data.zero_()  # it is read, not made anew
    assert not torch.allclose(other(*inputs()), model(*inputs()), atol=1e-3)


def test_weights_can_be_assigned_to_a_network_without_memory() -> None:
    """As trained runs are loaded: nothing that the forward pass needs may lie outside of the weights."""
    model = random_net()
    with torch.device('meta'):
        other = LightningDiT(**SMALL, num_classes=5)
    other.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(other(*inputs()), model(*inputs()))


def test_labels_and_times_change_the_output() -> None:
    model = random_net()
    x, t, labels = inputs()
    out = model(x, t, labels)
    assert not torch.allclose(model(x, t, labels + 1)[0], out[0], atol=1e-3)
    assert not torch.allclose(model(x, t + 0.5, labels)[0], out[0], atol=1e-3)
    with pytest.raises(ValueError, match='null label 5'):
        model(x, t)


def test_unconditional_ignores_labels() -> None:
    model = random_net(num_classes=0)
    x, t, labels = inputs()
    assert not any(key.startswith('y_embedder') for key in model.state_dict())
    assert torch.equal(model(x, t, labels), model(x, t))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'num_heads': 4}, 'hidden_size=24 over num_heads=4 is 6, not divisible by 4'),
        ({'num_heads': 5}, 'num_heads=5'),
        ({'latent_size': 9}, 'latent_size=9'),
        ({'mlp_ratio': 0.01}, 'mlp_ratio=0.01: leaves no inner width'),
        ({'depth': 0}, 'depth=0'),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LightningDiT(**{**SMALL, 'num_classes': 5, **changes})


def test_latents_that_patches_do_not_tile_are_refused() -> None:
    x, t, labels = inputs(height=7)
    with pytest.raises(ValueError, match=r'divisible by 2, got \[3, 3, 7, 8\]'):
        random_net()(x, t, labels)
    with pytest.raises(ValueError, match=r'latents \[B, 3, H, W\]'):
        random_net()(x[:, :2, :6], t, labels)


def test_composer_is_told_to_wrap_the_blocks_and_nothing_else() -> None:
    model = random_net()
    blocks = list(model.blocks)
    assert [module for module in model.modules() if model.fsdp_wrap_fn(module)] == blocks
    assert [module for module in model.modules() if model.activation_checkpointing_fn(module)] == blocks


# ---- precision


@pytest.mark.parametrize('qk_norm', [False, True])
def test_bfloat16_autocast_runs_forward_and_backward(qk_norm: bool) -> None:
    model = random_net(qk_norm=qk_norm)
    with torch.autocast('cpu', torch.bfloat16):
        out = model(*inputs())
        loss = out.float().square().mean()
    loss.backward()
    torch.testing.assert_close(out.float(), model(*inputs()), rtol=0.1, atol=0.3)
    missing = [name for name, q in model.named_parameters() if q.requires_grad and q.grad is None]
    assert missing == []


@pytest.mark.parametrize('qk_norm', [False, True])
def test_a_network_cast_to_bfloat16_runs_and_turns_in_float32(qk_norm: bool) -> None:
    model = random_net(qk_norm=qk_norm)
    expected = model(*inputs())
    seen: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: seen.extend(args))
    x, t, labels = inputs()
    out = model.to(torch.bfloat16)(x.to(torch.bfloat16), t, labels)
    assert [one.dtype for one in seen] == [torch.bfloat16, torch.bfloat16, torch.float32]
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.4)


def test_fullgraph_export_has_no_data_dependent_branch() -> None:
    model = random_net(depth=1)
    program = torch.export.export(model, inputs())
    torch.testing.assert_close(program.module()(*inputs()), model(*inputs()))
