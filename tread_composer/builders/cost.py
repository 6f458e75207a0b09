"""What a network costs: multiply-adds and parameters, found by running it with shapes alone on torch's meta device."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tread_composer.algorithms.maskdit import Masking
from tread_composer.routing import Route, apply_tread, find_blocks
from tread_composer.routing.tokens import AlwaysKeep

__all__ = ['Savers', 'count_macs', 'run_with_shapes', 'depth_of', 'sampling_cost', 'tokens_per_block']

Savers = tuple[Sequence[Route], Masking | None, AlwaysKeep]
"""What a training forward saves tokens with, and how many positions it always keeps."""


def depth_of(denoiser: nn.Module) -> int:
    """How many blocks a network has: as it says (``depth``), else in its only list of blocks; 0 without such a list."""
    try:
        return getattr(denoiser, 'depth', None) or len(find_blocks(denoiser)[1])
    except ValueError:
        return 0


def tokens_per_block(routes: Sequence[Route], depth: int, num_tokens: int, always_keep: AlwaysKeep = 0) -> list[int]:
    """How many tokens each block sees while routing is on; ``always_keep`` of them never skip."""
    counts = [num_tokens] * depth
    for route in routes:
        start, end = route.span(depth)
        counts[start : end + 1] = [route.num_kept(num_tokens, always_keep)] * (end - start + 1)
    return counts


def sampling_cost(denoiser: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """What sampling needs of a network, with all that its algorithms have added to it.

    Args:
        denoiser: The network, on the meta device.
        facts: ``channels`` and ``latent_size`` of its latents.

    Returns:
        ``parameters`` (fixed positions included; without those that only training reads, such as a mask token) and
        ``gmacs`` of one call for one image, without guidance.
    """
    unused = {
        id(module.get_parameter(name))
        for module in denoiser.modules()
        for name in getattr(module, 'training_only', ())
    }  # fmt: skip
    return {
        'parameters': sum(p.numel() for p in denoiser.parameters() if id(p) not in unused),
        'gmacs': count_macs(denoiser, facts) / 1e9,
    }


def count_macs(
    denoiser: nn.Module,
    facts: dict[str, Any],
    routes: Sequence[Route] = (),
    masking: Masking | None = None,
    always_keep: AlwaysKeep = 0,
) -> int:
    """Multiply-adds of one forward pass for one image (what the DiT paper calls Gflops are 10^9 of these).

    In evaluation mode; in training mode where there are routes, or a masking (as it is armed).
    """
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_with_shapes(denoiser, facts, (routes, masking, always_keep))
    return counter.get_total_flops() // 2


def run_with_shapes(denoiser: Any, facts: dict[str, Any], savers: Savers, batch_size: int = 1) -> Tensor:
    """The prediction, without arithmetic: its shape, and what autograd would save."""
    routes, masking, always_keep = savers
    dtype = next(denoiser.parameters()).dtype
    size = facts['latent_size']
    x = torch.empty(batch_size, facts['channels'], size, size, device='meta', dtype=dtype)
    t, labels = x[:, 0, 0, 0], torch.zeros(batch_size, dtype=torch.int64, device='meta')
    denoiser.train(bool(routes) or masking is not None)
    if not routes:
        return denoiser(x, t, labels)
    routing = apply_tread(denoiser, routes, always_keep=always_keep)
    kept = [
        torch.empty(batch_size, route.num_kept(denoiser.num_tokens, always_keep), dtype=torch.int64, device='meta')
        for route in routes
    ]
    routing.arm(kept, num_tokens=denoiser.num_tokens)
    out = denoiser(x, t, labels)
    routing.disarm()
    return out
