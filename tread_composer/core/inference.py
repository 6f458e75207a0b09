"""A network for a while as samples and measurements need it: in evaluation mode, in full float32. Pure torch."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ['evaluating', 'plain_float32']


@contextlib.contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module has its own mode again, as a part that its owner froze needs."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def plain_float32(device: str | torch.device) -> Iterator[None]:
    """Compute in float32 whatever training has chosen, and give its choice back afterwards.

    No autocast, no TF32 in matrix products and convolutions (it keeps 10 bits of a factor, and Composer switches it on
    for training on a GPU), and of cuDNN's algorithms a deterministic one that is not picked by a race.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with (
            torch.autocast(torch.device(device).type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
