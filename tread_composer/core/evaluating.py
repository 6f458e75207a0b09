"""A network for a while in evaluation mode. Pure torch; used by whatever samples, measures or looks inside."""

import contextlib
from collections.abc import Iterator

from torch import nn

__all__ = ['evaluating']


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
