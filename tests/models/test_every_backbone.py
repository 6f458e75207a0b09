"""What all backbones do alike: first weights, labels, refusals, routes, precision, units for FSDP."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.helpers import Lengths
from tests.models.networks import MORE, SMALL, fresh_net, inputs, random_net
from tread_composer.models import DiT, LightningDiT, Mamba2DiT
from tread_composer.models.base import unpatchify
from tread_composer.models.lightning_dit import rotary_table
from tread_composer.models.mamba2_dit import scan_positions
from tread_composer.routing import Route, RoutingError, apply_tread

BACKBONES = pytest.mark.parametrize('backbone', [DiT, LightningDiT, Mamba2DiT])
SETTINGS = {DiT: {'qk_norm': 'layer'}, LightningDiT: {'qk_norm': True}, Mamba2DiT: {'scan': 'alternate'}}


@BACKBONES
def test_a_fresh_network_predicts_zero_and_its_blocks_are_the_identity(backbone: type) -> None:
    torch.manual_seed(0)
    model = fresh_net(backbone, **SETTINGS[backbone])
    assert torch.equal(model(*inputs()), torch.zeros(3, 3, 8, 8))
    tokens = torch.randn(2, 16, 24)
    per_block = model.block_inputs(tokens, (4, 4))
    assert torch.equal(model.blocks[1](tokens, torch.randn(2, 24), *per_block[1 % len(per_block)]), tokens)
    norms = [p for name, p in model.named_parameters() if 'norm' in name and name.endswith('weight')]
    assert norms and all(torch.equal(weight, torch.ones_like(weight)) for weight in norms)
    drawn = [p for name, p in model.named_parameters() if name.endswith(('qkv.weight', 'in_proj.weight'))]
    assert drawn and all(weight.std() > 0.05 for weight in drawn)


@BACKBONES
def test_weights_are_all_that_a_network_has(backbone: type) -> None:
    model, other = random_net(backbone, **SETTINGS[backbone]), fresh_net(backbone, **SETTINGS[backbone])
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs()), model(*inputs()))
    other.pos_embed.data.zero_()  # it is read, not made anew
    assert not torch.allclose(other(*inputs()), model(*inputs()), atol=1e-3)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ['pos_embed']
    with torch.device('meta'):  # as trained runs are loaded
        empty = fresh_net(backbone, **SETTINGS[backbone])
    empty.load_state_dict(model.state_dict(), strict=True, assign=True)
    assert torch.equal(empty(*inputs()), model(*inputs()))


@BACKBONES
def test_labels_and_times_change_the_output(backbone: type) -> None:
    model, (x, t, labels) = random_net(backbone), inputs()
    out = model(x, t, labels)
    assert not torch.allclose(model(x, t, labels + 1)[0], out[0], atol=1e-3)
    assert not torch.allclose(model(x, t + 0.5, labels)[0], out[0], atol=1e-3)
    assert model.null_label == 5 and model(x, t, torch.full((3,), 5)).isfinite().all()
    for label in (6, -1):
        with pytest.raises(IndexError):
            model(x, t, torch.full((3,), label))
    with pytest.raises(ValueError, match='null label 5'):
        model(x, t)
    assert random_net(backbone, learn_sigma=True)(x, t, labels).shape == (3, 6, 8, 8)


@BACKBONES
def test_unconditional_ignores_labels(backbone: type) -> None:
    model, (x, t, labels) = random_net(backbone, num_classes=0), inputs()
    assert not any(key.startswith('y_embedder') for key in model.state_dict())
    assert torch.equal(model(x, t, labels), model(x, t, labels + 900))
    assert torch.equal(model(x, t), model(x, t, labels))


@pytest.mark.parametrize(
    ('backbone', 'height', 'channels', 'message'),
    [
        (DiT, 4, 3, r'\[B, 3, 8, 8\], got \[3, 3, 4, 8\]'),
        (DiT, 8, 2, r'\[B, 3, 8, 8\]'),
        (LightningDiT, 7, 3, r'\[B, 3, H, W\].*divisible by 2, got \[3, 3, 7, 8\]'),
        (LightningDiT, 6, 2, r'latents \[B, 3, H, W\]'),
        (Mamba2DiT, 7, 3, r'\[B, 3, H, W\].*divisible by 2, got \[3, 3, 7, 8\]'),
        (Mamba2DiT, 8, 2, r'\[B, 3, H, W\]'),
    ],
)
def test_latents_that_do_not_fit_are_refused(backbone: type, height: int, channels: int, message: str) -> None:
    x, t, labels = inputs()
    with pytest.raises(ValueError, match=message):
        random_net(backbone)(x[:, :channels, :height], t, labels)


COMMON = [
    ({'latent_size': 9}, 'latent_size=9'),
    ({'hidden_size': 30, 'num_heads': 3}, 'hidden_size=30 is not divisible by 4'),
    ({'depth': 0}, 'depth=0'),
    ({'patch_size': 0}, 'patch_size=0'),
    ({'in_channels': 0}, 'in_channels=0'),
    ({'mlp_ratio': 0.0}, 'mlp_ratio=0.0'),
    ({'num_classes': -1}, 'num_classes=-1'),
]


@pytest.mark.parametrize(
    ('backbone', 'changes', 'message'),
    [
        *((backbone, *case) for backbone in (DiT, LightningDiT, Mamba2DiT) for case in COMMON),
        (DiT, {'num_heads': 5}, 'num_heads=5'),
        (LightningDiT, {'num_heads': 5}, 'num_heads=5'),
        (LightningDiT, {'num_heads': 4}, 'hidden_size=24 over num_heads=4 is 6, not divisible by 4'),
        (LightningDiT, {'mlp_ratio': 0.01}, 'mlp_ratio=0.01: leaves no inner width'),
        (Mamba2DiT, {'head_size': 7}, 'head_size=7 does not divide the inner width 48'),
        (Mamba2DiT, {'state_size': 0}, 'state_size=0'),
        (Mamba2DiT, {'chunk_size': 0}, 'chunk_size=0'),
        (Mamba2DiT, {'expand': 0}, 'expand=0'),
        (Mamba2DiT, {'scan': 'spiral'}, "scan='spiral'"),
        (Mamba2DiT, {'kernel': 'cuda'}, "kernel='cuda'"),
    ],
)
def test_sizes_and_names_that_do_not_fit_are_refused(backbone: type, changes: dict[str, Any], message: str) -> None:
    if backbone is Mamba2DiT:
        changes = {name: value for name, value in changes.items() if name != 'num_heads'}
    with pytest.raises(ValueError, match=message):
        backbone(**{**SMALL, **MORE[backbone], 'num_classes': 5, **changes})


@BACKBONES
def test_composer_is_told_to_wrap_the_blocks_and_nothing_else(backbone: type) -> None:
    model = random_net(backbone)
    blocks = list(model.blocks)
    assert [module for module in model.modules() if model.fsdp_wrap_fn(module)] == blocks
    assert [module for module in model.modules() if model.activation_checkpointing_fn(module)] == blocks
    assert len(blocks) == model.depth == MORE[backbone]['depth']


@BACKBONES
def test_fullgraph_export_has_no_data_dependent_branch(backbone: type) -> None:
    # A look at a label's value would make the step wait for the device; a traced graph shows that there is none.
    model = random_net(backbone, **{**SETTINGS[backbone], 'depth': 2})
    program = torch.export.export(model, inputs())
    torch.testing.assert_close(program.module()(*inputs()), model(*inputs()))


def token_inputs(model: Any, index: int) -> list[Tensor]:
    """What block ``index`` gets for each of the 16 tokens beside them, ``[16, ...]`` each."""
    if isinstance(model, LightningDiT):
        return [rotary_table((4, 4), 8, device=torch.device('cpu'), dtype=torch.float64)]
    if isinstance(model, Mamba2DiT):
        return [scan_positions((4, 4), model.orders[index % len(model.orders)])]
    return []


@BACKBONES
def test_tokens_permuted_with_what_belongs_to_them_give_the_output_permuted(backbone: type) -> None:
    model = random_net(backbone, **SETTINGS[backbone]).double()
    x, c = torch.randn(2, 16, 24, dtype=torch.float64), torch.randn(2, 24, dtype=torch.float64)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    for index in range(2):
        extra = [rows.expand(2, *rows.shape) for rows in token_inputs(model, index)]
        block, moved = model.blocks[index], [rows[:, order] for rows in extra]
        out = block(x, c, *extra)[:, order]
        torch.testing.assert_close(block(x[:, order], c, *moved), out, rtol=1e-10, atol=1e-10)
        if extra:  # the order counts: without their rows, the same tokens give something else
            assert (block(x[:, order], c, *extra) - out).abs().max() > 1e-3


@pytest.mark.parametrize('routed', [False, True])
@pytest.mark.parametrize(
    ('backbone', 'settings'),
    [(DiT, {}), (LightningDiT, {}), (Mamba2DiT, {'scan': 'raster'}), (Mamba2DiT, {'scan': 'alternate'})],
)
def test_a_network_is_its_parts_and_a_route_a_loop_over_gathered_tokens(
    backbone: type, settings: dict[str, Any], routed: bool
) -> None:
    model = random_net(backbone, depth=4, **settings).double().train()
    x, t, labels = inputs()
    x = x.double()
    kept = torch.tensor([[0, 3, 4, 9, 15], [1, 2, 7, 8, 14], [5, 6, 10, 11, 12]])
    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(labels)
    for index, block in enumerate(model.blocks):
        rows = token_inputs(model, index)
        if routed and index in (1, 2):
            tokens = tokens.clone()
            for b, ids in enumerate(kept):
                tokens[b, ids] = block(tokens[b : b + 1, ids], c[b : b + 1], *(row[ids][None] for row in rows))[0]
        else:
            tokens = block(tokens, c, *(row.expand(3, *row.shape) for row in rows))
    expected = unpatchify(model.final_layer(tokens, c), (4, 4), 2, 3)

    dense, seen = model(x, t, labels), Lengths(model.blocks)
    if routed:
        routing = apply_tread(model, Route(1, 2), token_arguments=model.token_arguments)
        routing.arm([kept], num_tokens=16)
    out = model(x, t, labels)
    assert seen.seen == ([16, 5, 5, 16] if routed else [16] * 4)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    assert routed == ((out - dense).abs().max() > 1e-3)
    torch.testing.assert_close(model.eval()(x, t, labels), dense)
    out.square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


@pytest.mark.parametrize(
    ('backbone', 'message'),
    [
        (LightningDiT, r'3 samples x 16 tokens, the block got 3 x 8.*token_arguments: \[rope\]'),
        (Mamba2DiT, r'positions.*3 samples x 16 tokens, the block got 3 x 8.*token_arguments: \[positions\]'),
    ],
)
def test_a_route_that_forgets_what_belongs_to_tokens_is_refused(backbone: type, message: str) -> None:
    model = random_net(backbone, depth=4).train()
    apply_tread(model, Route(1, 2), token_arguments=())
    with pytest.raises((ValueError, RoutingError), match=message):
        model(*inputs())


@pytest.mark.parametrize(
    ('backbone', 'settings'),
    [
        (DiT, {}),
        *((LightningDiT, {'qk_norm': qk_norm}) for qk_norm in (False, True)),
        *((Mamba2DiT, {'chunk_size': chunk_size}) for chunk_size in (8, 256)),
    ],
)
def test_bfloat16_autocast_and_weights(backbone: type, settings: dict[str, Any]) -> None:
    model = random_net(backbone, **settings)
    exact = model(*inputs()).detach()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(*inputs())
    out.float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    narrow = random_net(backbone, **settings).bfloat16()
    x, t, labels = inputs()
    rounded, from_float32 = narrow(x.bfloat16(), t, labels), narrow(x, t, labels)
    assert out.dtype == rounded.dtype == from_float32.dtype == torch.bfloat16
    for other in (out, rounded, from_float32):
        torch.testing.assert_close(other.float(), exact, rtol=0.1, atol=0.3)
        assert (other.float() - exact).square().mean() < 1e-3 * exact.square().mean()


@BACKBONES
def test_times_that_bfloat16_would_merge_stay_apart(backbone: type) -> None:
    times = torch.tensor([0.9, 0.899])
    assert times[0].bfloat16() == times[1].bfloat16()
    x, labels = torch.zeros(2, 3, 8, 8), torch.zeros(2, dtype=torch.long)
    for model, autocast in ((random_net(backbone).bfloat16(), False), (random_net(backbone), True)):
        seen: list[Tensor] = []
        model.t_embedder.mlp[0].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
            model(x, times, labels)
        assert not torch.equal(*seen[0])
