"""Mamba2DiT: its parts put together, routes, precision, sizes and cost. Its scans and its block are in ``test_ssd``."""

import pytest
import torch

from tests.models.networks import inputs, macs, on_meta, random_net, slow_position
from tread_composer.core.errors import UserError
from tread_composer.models import DiT, Mamba2DiT
from tread_composer.models.base import unpatchify
from tread_composer.models.mamba2_dit import scan_positions
from tread_composer.routing import Route, apply_tread

SCANS = ('raster', 'alternate')


def test_scan_orders_equal_loops() -> None:
    assert scan_positions((3, 5), 'raster').tolist() == list(range(15))
    columns = scan_positions((3, 5), 'column').tolist()
    visited = [columns.index(step) for step in range(15)]
    assert visited == [row * 5 + column for column in range(5) for row in range(3)]
    given = random_net(Mamba2DiT, scan='alternate').block_inputs(torch.zeros(2, 15, 24), (3, 5))
    assert [positions.tolist() for (positions,) in given] == [[list(range(15))] * 2, [columns] * 2]


@pytest.mark.parametrize(
    ('name', 'parameters'), [('S', 34_234_336), ('B', 133_275_568), ('L', 465_880_848), ('XL', 685_599_424)]
)
def test_parameter_counts_are_near_those_of_the_dit_of_the_same_letter(name: str, parameters: int) -> None:
    count = sum(p.numel() for p in on_meta(Mamba2DiT, f'Mamba2-DiT-{name}/2').parameters())
    assert count == parameters
    dit = on_meta(DiT, f'DiT-{name}/2')
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
    model = on_meta(Mamba2DiT, f'Mamba2-DiT-{name}/2', latent_size, depth=4, kernel='fused')
    n, d, depth = model.num_tokens, model.hidden_size, model.depth
    counts = [n] * depth
    if kept:
        routing = apply_tread(model, Route(1, 2), token_arguments=model.token_arguments)
        routing.arm([torch.empty(1, kept, dtype=torch.int64, device='meta')], num_tokens=n)
        counts[1:3] = [kept] * 2
    rest = 2 * d**2 + 256 * d + d**2 + (16 + 16) * n * d
    assert macs(model) == sum(block_macs(count, d, 256) for count in counts) + rest


def test_the_fused_kernel_is_refused_on_the_cpu_with_the_reason() -> None:
    with pytest.raises(UserError, match=r"kernel: 'fused' cannot run: .*'cpu'.*written for CUDA; take kernel='torch'"):
        random_net(Mamba2DiT, kernel='fused')(*inputs())


@pytest.mark.gpu
def test_the_fused_kernel_equals_the_matrix() -> None:
    pytest.importorskip('mamba_ssm')
    sizes = {'hidden_size': 64, 'head_size': 32, 'state_size': 32, 'chunk_size': 16}
    model, fused = random_net(Mamba2DiT, **sizes).cuda(), random_net(Mamba2DiT, **sizes, kernel='fused').cuda()
    arguments = [value.cuda() for value in inputs()]
    results = []
    for network in (model, fused):
        out = network(*arguments)
        out.square().mean().backward()
        results.append((out.detach(), network.get_parameter('blocks.1.mixer.in_proj.weight').grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize('scan', SCANS)
def test_the_network_is_its_parts_and_alternates_its_scans(scan: str) -> None:
    model = random_net(Mamba2DiT, scan=scan).double().eval()
    x, t, labels = inputs()
    x = torch.cat([x, x], dim=3).double()  # a grid of 4 x 8
    tokens = model.x_embedder(x)
    row, column = (torch.arange(32) // 8).tolist(), (torch.arange(32) % 8).tolist()
    for n in range(32):
        tokens[:, n] += slow_position(24, row[n], column[n]).float().double()
    c = model.t_embedder(t) + model.y_embedder(labels)
    for index, block in enumerate(model.blocks):
        by_column = scan == 'alternate' and index % 2
        places = [column[n] * 4 + row[n] if by_column else n for n in range(32)]
        tokens = block(tokens, c, torch.tensor(places).expand(3, -1))
    expected = unpatchify(model.final_layer(tokens, c), (4, 8), 2, 3)
    torch.testing.assert_close(model(x, t, labels), expected, rtol=1e-6, atol=1e-6)
