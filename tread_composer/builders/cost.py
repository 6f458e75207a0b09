"""What a network costs: multiply-adds and parameters, found by running it with shapes alone on torch's meta device."""

import contextlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tread_composer.core.errors import UserError
from tread_composer.routing import find_blocks

__all__ = ['Savers', 'count_macs', 'run_with_shapes', 'depth_of', 'sampling_cost', 'tokens_per_block']

Savers = Mapping[str, Any]
"""Algorithms of a run by their names in the YAML, those alone that save work (``AlgorithmFacts.rehearse``)."""


def depth_of(denoiser: nn.Module) -> int:
    """How many blocks a network has: as it says (``depth``), else in its only list of blocks; 0 without such a list."""
    try:
        return getattr(denoiser, 'depth', None) or len(find_blocks(denoiser)[1])
    except ValueError:
        return 0


def tokens_per_block(savers: Iterable[Any], depth: int, num_tokens: int) -> list[int]:
    """How many tokens each block sees while the algorithms ``savers`` are on: the fewest that one of them leaves it."""
    counts = [[num_tokens] * depth]
    counts += [saver.tokens_per_block(depth, num_tokens) for saver in savers if hasattr(saver, 'tokens_per_block')]
    return [min(tokens) for tokens in zip(*counts, strict=True)]


def sampling_cost(denoiser: nn.Module, facts: dict[str, Any]) -> dict[str, Any]:
    """What sampling needs of a network on the meta device, with all that its algorithms have added to it.

    ``parameters`` (fixed positions included; without those that only training reads, such as a mask token) and
    ``gmacs`` of one call for one image, without guidance. ``facts``: ``channels`` and ``latent_size`` of its latents.
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


def count_macs(denoiser: nn.Module, facts: dict[str, Any], savers: Savers = MappingProxyType({})) -> int:
    """Multiply-adds of one forward pass for one image (what the DiT paper calls Gflops are 10^9 of these).

    In evaluation mode; in training mode where algorithms save work.
    """
    # It counts a multiplication and an addition as two.
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run_with_shapes(denoiser, facts, savers)
    return counter.get_total_flops() // 2


def run_with_shapes(denoiser: Any, facts: Mapping[str, Any], savers: Savers, batch_size: int = 1) -> Tensor:
    """The prediction, without arithmetic: its shape, and what autograd would save; ``UserError`` if one cannot fit."""
    weights, size = next(denoiser.parameters()), facts['latent_size']
    # [B, C, H, W] noisy latents, and [B] times and labels.
    x = torch.empty(batch_size, facts['channels'], size, size, device=weights.device, dtype=weights.dtype)
    t, labels = x[:, 0, 0, 0], torch.zeros(batch_size, dtype=torch.int64, device=weights.device)
    denoiser.train(bool(savers))  # routes and masks are off in evaluation mode
    with contextlib.ExitStack() as stack:
        for name, algorithm in savers.items():
            try:
                stack.enter_context(algorithm.rehearse(denoiser, batch_size))
            except ValueError as error:
                raise UserError(f'algorithms.{name}: {error}') from None
        return denoiser(x, t, labels)
