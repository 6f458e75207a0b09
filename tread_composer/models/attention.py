"""Softmax attention by another implementation than torch's ``scaled_dot_product_attention``: xformers or FlexAttention.

Which of them runs is a choice of the machine, not of the weights: they compute ``softmax(q k^T / sqrt(F)) v``, and
differ by rounding. A choice is made once, when the device is known, and only after a probe: a forward and backward
pass of the very head sizes and dtypes, held against ``scaled_dot_product_attention``. What cannot run is refused.

Shapes: B samples, A heads, N tokens, F width of a head.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tread_composer.core.errors import UserError

__all__ = ['ATTENTIONS', 'Attend', 'choose_attention', 'sdpa']

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values ``[B, A, N, F]`` to values of the same shape."""

ATTENTIONS = ('sdpa', 'xformers', 'flex')
"""What ``attention`` may be: torch's own choice of kernel, the package xformers, torch's FlexAttention."""

_REMEDY = 'or take attention: sdpa, which gives the same result'
_TOKENS = 33  # of the probe: not a power of 2, as what a route keeps need not be
# Largest difference over the largest value: some roundings of the dtype; those of TF32 for float32.
_TOLERANCES = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Torch's own attention, with the kernel that torch chooses for each call."""
    return scaled_dot_product_attention(q, k, v)


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``memory_efficient_attention``, which takes ``[B, N, A, F]``; xformers chooses an operator for each shape."""
    from xformers.ops import memory_efficient_attention  # type: ignore[reportMissingImports]

    return memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


@functools.cache
def choose_attention(
    name: str, device: torch.device, heads: tuple[tuple[int, int], ...], dtypes: tuple[torch.dtype, ...], training: bool
) -> tuple[Attend, str]:
    """An implementation that has been seen to work here. Probes once in a process, however often it is asked.

    Returns the function, and a line for people: what runs and how far it is from ``sdpa``. ``heads`` are the number of
    heads A and the width F of each attention layer of the network, without repetitions; with ``training`` the gradients
    are probed too.

    Raises:
        UserError: It is not installed, cannot run here, or gives something else than ``sdpa``.
    """
    if name == 'sdpa':
        return sdpa, "attention: sdpa, torch's own"
    attend, version = _xformers(device) if name == 'xformers' else _flex(device)
    rows: list[str] = []
    for dtype, (num_heads, head_size) in itertools.product(dtypes, heads):
        size = f'{str(dtype).removeprefix("torch.")}, heads of {head_size}'
        try:
            difference = _probe(attend, device, num_heads, head_size, dtype, training)
        except Exception as error:  # whatever a kernel that cannot run raises, it is an answer
            text = str(error).strip().partition('\n')[0] or type(error).__name__
            raise UserError(
                f'{name!r} cannot run on {device} ({size}): {text}; take another precision or size, {_REMEDY}'
            ) from error
        if not difference <= _TOLERANCES.get(dtype, 2e-3):  # nan too
            raise UserError(
                f'{name!r} gives another result than sdpa on {device} ({size}): off by {difference:.1e} of the largest '
                f'value; update it, {_REMEDY}'
            )
        rows.append(f'{size} (differs from sdpa by {difference:.0e} of the largest value)')
    return attend, f'attention: {name} {version} on {device}: {"; ".join(rows)}'


def _xformers(device: torch.device) -> tuple[Attend, str]:
    try:
        import xformers.ops  # type: ignore[reportMissingImports]
    except (ImportError, OSError) as error:
        raise UserError(
            f"'xformers' cannot run: the package is not installed here, or not for this torch ({error}); install the "
            f'release that was built for torch {torch.__version__} (0.0.30 for torch 2.7.0: pip install '
            f'xformers==0.0.30), {_REMEDY}'
        ) from error
    if device.type != 'cuda':  # `is_available` of its operators says True on a CPU, so it is not asked
        raise UserError(
            f"'xformers' cannot run on {device}: its kernels need a CUDA device; take device: gpu, {_REMEDY}"
        )
    return xformers_attention, xformers.__version__


def _flex(device: torch.device) -> tuple[Attend, str]:
    from torch.nn.attention.flex_attention import flex_attention

    # Inductor makes the kernel on a GPU; on a CPU it makes forward passes only, and the plain formulas have a backward.
    function: Any = torch.compile(flex_attention) if device.type == 'cuda' else flex_attention
    # Not compiled, FlexAttention holds all N x N scores.
    form = 'compiled' if device.type == 'cuda' else 'not compiled: all scores in memory'
    return function, f'of torch {torch.__version__}, {form}'


def _probe(
    attend: Attend, device: torch.device, num_heads: int, head_size: int, dtype: torch.dtype, training: bool
) -> float:
    """Largest difference from ``sdpa`` in float32 of the same numbers, over its largest value; gradients included."""
    generator = torch.Generator().manual_seed(0)  # the global one is the run's
    numbers = torch.randn(2, _TOKENS, 3, num_heads, head_size, generator=generator).to(device, dtype)
    weights = torch.randn(2, num_heads, _TOKENS, head_size, generator=generator).to(device)
    results: list[Sequence[Tensor]] = []
    with torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.set_grad_enabled(training):
        for function, x in ((attend, numbers), (sdpa, numbers.float())):
            x = x.detach().requires_grad_(training)
            out = function(*x.permute(2, 0, 3, 1, 4).unbind(0))  # views of one tensor, as in the networks
            if training:
                (out.float() * weights).sum().backward()
            results.append([out.detach().float(), *([x.grad.float()] if x.grad is not None else [])])
    return float(torch.stack([(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]).max())
