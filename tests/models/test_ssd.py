"""The scans of Mamba2DiT and its block against the recurrence written as loops.

Shapes: B samples, N tokens, H heads, P width of a head, S state size, 2 directions.
"""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.helpers import randomised
from tests.models.networks import gelu, linear_of, silu
from tread_composer.models.mamba2_dit import Mamba2Block
from tread_composer.models.ssd import BidirectionalSSD, bidirectional_ssd


def scan_terms(num_tokens: int, *, heads: int = 3, width: int = 4, state: int = 5, seed: int = 0) -> list[Tensor]:
    """x, dt, A, B and C of two samples in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        normal(2, num_tokens, heads, width),
        normal(2, num_tokens, 2, heads).exp() / 3,
        -normal(2, heads).exp(),
        normal(2, num_tokens, 2, state),
        normal(2, num_tokens, 2, state),
    ]


def slow_scan(x_NHP: Tensor, dt_NH: Tensor, A_H: Tensor, B_NS: Tensor, C_NS: Tensor) -> Tensor:
    """One sample in one direction, token by token: ``h = exp(dt A) h + dt B x``, ``y = C h``."""
    num_tokens, heads, width = x_NHP.shape
    y_NHP = torch.zeros_like(x_NHP)
    for head in range(heads):
        for p in range(width):
            h_S = torch.zeros_like(B_NS[0])
            for i in range(num_tokens):
                h_S = torch.exp(dt_NH[i, head] * A_H[head]) * h_S + dt_NH[i, head] * B_NS[i] * x_NHP[i, head, p]
                y_NHP[i, head, p] = (C_NS[i] * h_S).sum()
    return y_NHP


def slow_both(x_NHP: Tensor, dt_N2H: Tensor, A_2H: Tensor, B_N2S: Tensor, C_N2S: Tensor) -> Tensor:
    """One sample, there and back."""
    ahead = slow_scan(x_NHP, dt_N2H[:, 0], A_2H[0], B_N2S[:, 0], C_N2S[:, 0])
    last_first = slow_scan(
        x_NHP.flip(0), dt_N2H[:, 1].flip(0), A_2H[1], B_N2S[:, 1].flip(0), C_N2S[:, 1].flip(0)
    )  # fmt: skip
    return ahead + last_first.flip(0)


@pytest.mark.parametrize('chunk_size', [1, 2, 3, 4, 7, 100])
def test_matrix_and_chunks_equal_the_recurrence(chunk_size: int) -> None:
    x, dt, A, B, C = scan_terms(7)
    y = bidirectional_ssd(x, dt, A, B, C, chunk_size=chunk_size)
    for sample in range(2):
        slow = slow_both(x[sample], dt[sample], A, B[sample], C[sample])
        assert slow.std() > 1
        torch.testing.assert_close(y[sample], slow, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('chunk_size', [2, 8])
def test_gradients(chunk_size: int) -> None:
    terms = [term.requires_grad_() for term in scan_terms(5, heads=2, width=2, state=2)]
    assert torch.autograd.gradcheck(lambda *all_: bidirectional_ssd(*all_, chunk_size=chunk_size), terms)


@pytest.mark.parametrize('chunk_size', [64, 512])
def test_long_sequences_and_large_steps_stay_finite_and_exact(chunk_size: int) -> None:
    x, dt, A, B, C = (term.abs() for term in scan_terms(512, heads=1, width=2, state=3))  # no sum comes out near 0
    # Behind a stretch of large steps, the running sum of logarithms is so large that float32 knows it to 0.01 only.
    dt = torch.full_like(dt, 0.01)
    dt[:, 100:300] = 500.0
    A = torch.full_like(A, -1.0)
    narrow = [term.float().requires_grad_() for term in (x, dt, A, B, C)]
    y = bidirectional_ssd(*narrow, chunk_size=chunk_size)
    exact = bidirectional_ssd(x, dt, A, B, C, chunk_size=chunk_size)
    assert (y.double() / exact - 1).abs().max() < 1e-5
    y.square().mean().backward()
    assert all(term.grad is not None and term.grad.isfinite().all() for term in narrow)
    for extreme in (0.0, 1e-20, 1e8, 1e18):
        y = bidirectional_ssd(narrow[0], torch.full_like(narrow[1], extreme), *narrow[2:], chunk_size=chunk_size)
        assert y.isfinite().all()


def test_first_values_of_the_scans_are_those_of_mamba2() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalSSD(1024)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3 and 0.05 < steps.max() <= 1e-1 * 1.001
    assert float(steps.log().mean()) == pytest.approx(math.log(1e-2), abs=0.5)
    rates = mixer.A_log.exp()
    assert 1 <= rates.min() < 3 and 14 < rates.max() <= 16.001 and torch.equal(mixer.D, torch.ones(32))


class DtypesOfSums(TorchFunctionMode):
    """Notes in which dtype running sums and exponentials are taken."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.cumsum, Tensor.exp, torch.nn.functional.softplus):
            self.seen.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('chunk_size', [4, 16])
@pytest.mark.parametrize('autocast', [True, False])
def test_step_sizes_and_their_sums_are_float32_whatever_the_rest_is(chunk_size: int, autocast: bool) -> None:
    mixer = BidirectionalSSD(12, head_size=6, state_size=5, chunk_size=chunk_size)
    x = torch.randn(2, 9, 12)
    if not autocast:
        mixer, x = mixer.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast), DtypesOfSums() as sums:
        assert mixer(x).dtype == torch.bfloat16
    assert len(sums.seen) >= 4 and set(sums.seen) == {torch.float32}


def slow_block(weights: dict[str, Tensor], x: Tensor, c: Tensor, positions: Sequence[int], *, P: int, S: int) -> Tensor:
    """One sample ``[N, D]`` through a block, in float64, written from the description."""
    linear = linear_of(weights)

    def norm(v: Tensor) -> Tensor:
        return v / torch.sqrt((v**2).mean(-1, keepdim=True) + 1e-6)

    m = linear('adaLN_modulation.1', silu(c)).reshape(6, -1)
    order = sorted(range(len(x)), key=lambda token: positions[token])
    u = torch.stack([norm(x[token]) * (1 + m[1]) + m[0] for token in order])
    inner, heads = weights['mixer.norm.weight'].shape[0], weights['mixer.D'].shape[0]
    projected = linear('mixer.in_proj', u)
    z, values = projected[:, :inner], silu(projected[:, inner : 2 * inner]).reshape(-1, heads, P)
    at = 2 * inner
    B = silu(projected[:, at : at + 2 * S]).reshape(-1, 2, S)
    C = silu(projected[:, at + 2 * S : at + 4 * S]).reshape(-1, 2, S)
    dt = torch.log(1 + torch.exp(projected[:, at + 4 * S :].reshape(-1, 2, heads) + weights['mixer.dt_bias']))
    y = slow_both(values, dt, -torch.exp(weights['mixer.A_log']), B, C)
    y = (y + weights['mixer.D'][:, None] * values).reshape(-1, inner)
    mixed = linear('mixer.out_proj', norm(y * silu(z)) * weights['mixer.norm.weight'])
    out = x.clone()
    for place, token in enumerate(order):
        out[token] = x[token] + m[2] * mixed[place]
    return out + m[5] * linear('mlp.fc2', gelu(linear('mlp.fc1', norm(out) * (1 + m[4]) + m[3])))


def shuffled(num_tokens: int, seed: int) -> Tensor:
    return torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))


def test_a_block_equals_a_slow_second_implementation() -> None:
    torch.manual_seed(0)
    block = randomised(Mamba2Block(12, BidirectionalSSD(12, head_size=6, state_size=5), mlp_ratio=2.0)).double()
    weights = {key: value.detach() for key, value in block.state_dict().items()}
    x, c = torch.randn(2, 6, 12).double(), torch.randn(2, 12).double()
    positions = torch.stack([shuffled(6, 1) * 7, shuffled(6, 2) + 100])  # gaps, as on a route, say nothing
    with torch.no_grad():
        out = block(x, c, positions)
    for sample in range(2):
        slow = slow_block(weights, x[sample], c[sample], positions[sample].tolist(), P=6, S=5)
        assert (slow - x[sample]).abs().mean() > 0.01
        torch.testing.assert_close(out[sample], slow, rtol=1e-10, atol=1e-10)
