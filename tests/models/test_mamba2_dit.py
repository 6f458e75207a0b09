"""Mamba2DiT: its parts put together, routes, precision, sizes and cost. Its scans and its block are in ``test_ssd``."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import randomised
from tread_composer.core.errors import UserError
from tread_composer.models import PRESETS, DiT, Mamba2DiT
from tread_composer.models.base import unpatchify
from tread_composer.models.mamba2_dit import Mamba2Block, scan_positions
from tread_composer.routing import Route, RoutingError, apply_tread

SMALL = {'latent_size': 8, 'in_channels': 3, 'patch_size': 2, 'hidden_size': 24, 'depth': 4}
MIXER = {'head_size': 8, 'state_size': 5}
SCANS = ('raster', 'alternate')


def random_model(num_classes: int = 5, **changes: Any) -> Mamba2DiT:
    """A small network with no zero weight left: a fresh one predicts 0 whatever its blocks do."""
    model = Mamba2DiT(**{**SMALL, **MIXER, **changes}, num_classes=num_classes)
    randomised(model, seed=3)
    return model


def inputs(batch_size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch_size, 3, 8, 8, generator=generator)
    return x, torch.linspace(-1.5, 0.9, batch_size), torch.arange(batch_size)


def on_meta(name: str, latent_size: int = 32, **changes: Any) -> Mamba2DiT:
    with torch.device('meta'):
        sizes: dict[str, Any] = {**Mamba2DiT.presets[name], **changes}
        return Mamba2DiT(latent_size=latent_size, in_channels=4, num_classes=1000, **sizes)


# ---- the network


def test_scan_orders_equal_loops() -> None:
    assert scan_positions((3, 5), 'raster').tolist() == list(range(15))
    columns = scan_positions((3, 5), 'column').tolist()
    visited = [columns.index(step) for step in range(15)]
    assert visited == [row * 5 + column for column in range(5) for row in range(3)]


@pytest.mark.parametrize('scan', SCANS)
def test_the_network_is_its_parts_and_alternates_its_scans(scan: str) -> None:
    model = random_model(scan=scan).double().eval()
    x, t, labels = inputs()
    x = torch.cat([x, x], dim=3).double()  # a grid of 4 x 8
    tokens = model.x_embedder(x)
    row, column = (torch.arange(32) // 8).tolist(), (torch.arange(32) % 8).tolist()
    for n in range(32):
        angles = [[at / 10000 ** (k / 6) for k in range(6)] for at in (column[n], row[n])]
        parts = [function(a) for axis in angles for function in (math.sin, math.cos) for a in axis]
        tokens[:, n] += torch.tensor(parts).float().double()
    c = model.t_embedder(t) + model.y_embedder(labels)
    for index, block in enumerate(model.blocks):
        by_column = scan == 'alternate' and index % 2
        places = [column[n] * 4 + row[n] if by_column else n for n in range(32)]
        tokens = block(tokens, c, torch.tensor(places).expand(3, -1))
    expected = unpatchify(model.final_layer(tokens, c), (4, 8), 2, 3)
    torch.testing.assert_close(model(x, t, labels), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('scan', SCANS)
def test_a_routed_network_equals_a_loop_over_gathered_tokens_and_positions(scan: str) -> None:
    model = random_model(scan=scan).double().train()
    x, t, labels = inputs()
    x = x.double()
    kept = torch.tensor([[0, 3, 4, 9, 15], [1, 2, 7, 8, 14], [5, 6, 10, 11, 12]])

    tokens = model.x_embedder(x) + model.pos_embed
    c = model.t_embedder(t) + model.y_embedder(labels)
    for index, block in enumerate(model.blocks):
        order = 'column' if scan == 'alternate' and index % 2 else 'raster'
        places = scan_positions((4, 4), order)
        if index in (1, 2):
            tokens = tokens.clone()
            for sample, ids in enumerate(kept):
                part = torch.stack([tokens[sample, n] for n in ids.tolist()])
                where = torch.tensor([[int(places[n]) for n in ids.tolist()]])
                part = block(part[None], c[sample : sample + 1], where)[0]
                for place, n in enumerate(ids.tolist()):
                    tokens[sample, n] = part[place]
        else:
            tokens = block(tokens, c, places.expand(3, -1))
    expected = unpatchify(model.final_layer(tokens, c), (4, 4), 2, 3)

    seen: list[tuple[int, ...]] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape)))
    dense = model(x, t, labels)
    routing = apply_tread(model, Route(1, 2), token_arguments=model.token_arguments)
    routing.arm([kept], num_tokens=16)
    seen.clear()
    routed = model(x, t, labels)
    assert [shape[1] for shape in seen] == [16, 5, 5, 16]
    torch.testing.assert_close(routed, expected, rtol=1e-10, atol=1e-10)
    assert (routed - dense).abs().max() > 1e-3


def test_a_route_that_forgets_the_positions_is_refused() -> None:
    model = random_model().train()
    apply_tread(model, Route(1, 2), token_arguments=())
    with pytest.raises(RoutingError, match=r'token_arguments: \[positions\]'):
        model(*inputs())


def test_routed_gradients_reach_every_parameter() -> None:
    model = random_model(scan='alternate').train()
    routing = apply_tread(model, Route(1, 2), token_arguments=model.token_arguments)
    routing.arm([torch.tensor([[0, 5, 6, 11], [1, 2, 3, 4], [7, 9, 13, 15]])], num_tokens=16)
    model(*inputs()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


def test_a_fresh_model_predicts_zero_and_its_blocks_are_the_identity() -> None:
    torch.manual_seed(0)
    model = Mamba2DiT(**SMALL, **MIXER, num_classes=5)
    assert torch.equal(model(*inputs()), torch.zeros(3, 3, 8, 8))
    tokens, positions = torch.randn(2, 16, 24), torch.arange(16).expand(2, -1)
    assert torch.equal(model.blocks[1](tokens, torch.randn(2, 24), positions), tokens)
    assert all(block.mixer.in_proj.weight.std() > 0.05 for block in model.blocks)


def test_labels_times_and_the_unconditional_network() -> None:
    model, (x, t, labels) = random_model(), inputs()
    out = model(x, t, labels)
    assert not torch.allclose(model(x, t, labels + 1)[0], out[0], atol=1e-3)
    assert not torch.allclose(model(x, t + 0.5, labels)[0], out[0], atol=1e-3)
    assert model.null_label == 5 and model(x, t, torch.full((3,), 5)).isfinite().all()
    with pytest.raises(ValueError, match='null label 5'):
        model(x, t)
    free = random_model(num_classes=0)
    assert torch.equal(free(x, t, labels), free(x, t))
    assert random_model(learn_sigma=True)(x, t, labels).shape == (3, 6, 8, 8)


def test_other_grids_work_and_other_channels_do_not() -> None:
    model, (x, t, labels) = random_model(), inputs()
    model.eval()
    assert model(torch.randn(3, 3, 4, 12), t, labels).shape == (3, 3, 4, 12)
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\].*divisible by 2, got \[3, 3, 7, 8\]'):
        model(x[:, :, :7], t, labels)
    with pytest.raises(ValueError, match=r'\[B, 3, H, W\]'):
        model(x[:, :2], t, labels)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'head_size': 7}, 'head_size=7 does not divide the inner width 48'),
        ({'state_size': 0}, 'state_size=0'),
        ({'chunk_size': 0}, 'chunk_size=0'),
        ({'expand': 0}, 'expand=0'),
        ({'latent_size': 9}, 'latent_size=9'),
        ({'hidden_size': 30}, 'hidden_size=30 is not divisible by 4'),
        ({'mlp_ratio': 0.0}, 'mlp_ratio=0.0'),
        ({'scan': 'spiral'}, "scan='spiral'"),
        ({'kernel': 'cuda'}, "kernel='cuda'"),
    ],
)
def test_sizes_and_names_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2DiT(**{**SMALL, **MIXER, 'num_classes': 5, **changes})


def test_state_dict_round_trip_and_wrapping() -> None:
    model, other = random_model(scan='alternate'), Mamba2DiT(**SMALL, **MIXER, num_classes=5, scan='alternate')
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other(*inputs()), model(*inputs()))
    blocks = [module for module in model.modules() if isinstance(module, Mamba2Block)]
    assert [module for module in model.modules() if model.fsdp_wrap_fn(module)] == blocks
    assert [module for module in model.modules() if model.activation_checkpointing_fn(module)] == blocks
    assert len(blocks) == 4 and [n for n, p in model.named_parameters() if not p.requires_grad] == ['pos_embed']


def test_fullgraph_export_has_no_data_dependent_branch() -> None:
    model = random_model(scan='alternate', depth=2)
    program = torch.export.export(model, inputs())
    torch.testing.assert_close(program.module()(*inputs()), model(*inputs()))


# ---- precision


@pytest.mark.parametrize('chunk_size', [8, 256])
def test_bfloat16_autocast_and_weights(chunk_size: int) -> None:
    model = random_model(chunk_size=chunk_size)
    exact = model(*inputs()).detach()
    with torch.autocast('cpu', torch.bfloat16):
        out = model(*inputs())
    out.float().square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []
    narrow = random_model(chunk_size=chunk_size).bfloat16()(*inputs())
    assert out.dtype == narrow.dtype == torch.bfloat16
    for other in (out, narrow):
        assert (other.float() - exact).square().mean() < 1e-3 * exact.square().mean()


# ---- sizes and cost


@pytest.mark.parametrize(
    ('name', 'parameters'), [('S', 34_234_336), ('B', 133_275_568), ('L', 465_880_848), ('XL', 685_599_424)]
)
def test_parameter_counts_are_near_those_of_the_dit_of_the_same_letter(name: str, parameters: int) -> None:
    count = sum(p.numel() for p in on_meta(f'Mamba2-DiT-{name}/2').parameters())
    assert count == parameters
    with torch.device('meta'):
        dit = DiT(latent_size=32, in_channels=4, num_classes=1000, **PRESETS[f'DiT-{name}/2'])
    assert 1 < count / sum(p.numel() for p in dit.parameters()) < 1.04


def block_macs(n: int, d: int, chunk_size: int, *, expand: int = 2, head: int = 64, state: int = 64) -> int:
    """Multiply-adds of a block for one sample of n tokens, adaLN included."""
    e = expand * d
    linear = n * d * (2 * e + 4 * state + 2 * e // head) + n * e * d + 2 * n * d * 3 * d + 6 * d * d
    if n <= chunk_size:  # C B^T of each direction; one matrix per head on x
        return linear + 2 * n * n * state + n * n * e
    chunks = -(-n // chunk_size)
    within = chunks * chunk_size**2 * (state + e)
    between = 2 * chunks * chunk_size * state * e  # written to the states, and read from them
    return linear + 2 * (within + between)


@pytest.mark.parametrize(
    ('name', 'latent_size', 'kept'),
    [('S', 32, None), ('B', 32, 128), ('S', 64, 300)],
)
def test_forward_cost_is_that_of_the_formula(name: str, latent_size: int, kept: int | None) -> None:
    # Shapes alone: what is to run as the fused kernel is counted as the torch form.
    model = on_meta(f'Mamba2-DiT-{name}/2', latent_size, depth=4, kernel='fused')
    n, d, depth = model.num_tokens, model.hidden_size, model.depth
    counts = [n] * depth
    if kept:
        routing = apply_tread(model, Route(1, 2), token_arguments=model.token_arguments)
        routing.arm([torch.empty(1, kept, dtype=torch.int64, device='meta')], num_tokens=n)
        counts[1:3] = [kept] * 2
    x = torch.empty(1, 4, latent_size, latent_size, device='meta')
    with FlopCounterMode(display=False) as counter:
        model(x, torch.empty(1, device='meta'), torch.empty(1, dtype=torch.long, device='meta'))
    rest = 2 * d**2 + 256 * d + d**2 + (16 + 16) * n * d
    expected = sum(block_macs(count, d, 256) for count in counts) + rest
    assert counter.get_total_flops() == 2 * expected


# ---- the fused kernel


def test_the_fused_kernel_is_refused_on_the_cpu_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"kernel: 'fused' cannot run: .*'cpu'.*written for CUDA; take kernel='torch'"):
        random_model(kernel='fused')(*inputs())


@pytest.mark.gpu
def test_the_fused_kernel_equals_the_matrix() -> None:
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    pytest.importorskip('mamba_ssm')
    sizes = {'hidden_size': 64, 'head_size': 32, 'state_size': 32, 'chunk_size': 16}
    model, fused = random_model(**sizes).cuda(), random_model(**sizes, kernel='fused').cuda()
    arguments = [value.cuda() for value in inputs()]
    results = []
    for network in (model, fused):
        out = network(*arguments)
        out.square().mean().backward()
        results.append((out.detach(), network.get_parameter('blocks.1.mixer.in_proj.weight').grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)
