"""Small models of our own that are routed, and the loop that they are held against."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tread_composer.routing import put_back, take_kept

N = 16


class Chain(nn.Module):
    """Calls its blocks one after the other."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x, **more):
        for block in self.blocks:
            x = block(x, **more)
        return x


class AddOne(Chain):
    """``depth`` blocks that each add one."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Parameter(torch.ones(()))

        def forward(self, x_BND):
            return x_BND + self.one

    def __init__(self, depth: int):
        super().__init__(*(self.Block() for _ in range(depth)))


class Block(nn.Module):
    """Attention and a linear layer; ``skip`` is another block's output."""

    def __init__(self, skips: bool = False):
        super().__init__()
        self.mix, self.linear = nn.Linear(8, 24), nn.Linear(16 if skips else 8, 8)

    def forward(self, x, skip=None):
        q, k, v = self.mix(x).chunk(3, dim=-1)
        h = x + functional.scaled_dot_product_attention(q, k, v)
        return h + self.linear(h if skip is None else torch.cat([h, skip], dim=-1))


class Busy(nn.Module):
    """Six blocks, and work of the model's own before block ``at``."""

    def __init__(self, work: Callable[..., Tensor] | None = None, at: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.norm, self.work, self.at = nn.LayerNorm(8), work, at

    def forward(self, x):
        return self.walk(self.blocks, x)

    def walk(self, blocks: Iterable[Any], x: Tensor) -> Tensor:
        for index, block in enumerate(blocks):
            if index == self.at and self.work is not None:
                x = self.work(self, x)
            x = block(x)
        return x


class Loop(Busy):
    """A model whose loop is written or checkpointed in the given way; any other word is the plain one."""

    def __init__(self, style: Any = 'plain'):
        super().__init__()
        self.style = style

    def forward(self, x):
        if self.style == 'enumerate':
            for _, block in enumerate(self.blocks):
                x = block(x, skip=None)
        elif self.style == 'zip':
            for block, _ in zip(self.blocks, range(6), strict=True):
                x = block(x=x, skip=None)
        elif self.style == 'checkpoint':
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=False)
        elif self.style == 'whole':
            x = checkpoint(super().forward, x, use_reentrant=False)
        else:
            x = self.walk(self.blocks, x)
        return x


def tokens(samples: int = 4) -> Tensor:
    return torch.randn(samples, N, 8, generator=torch.Generator().manual_seed(1))


def inputs(batch_size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, times and labels for ``tiny_dit``."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(batch_size, 1, 8, 8, generator=generator, requires_grad=True)
    return x, torch.rand(batch_size, generator=generator), torch.arange(batch_size)


def explicit(
    blocks: Sequence[Callable[..., Tensor]],
    x: Tensor,
    spans: Sequence[tuple[int, int]],
    kept: Sequence[Tensor],
    outputs: list[Tensor] | None = None,
    between: Callable[[int, Tensor], Tensor] = lambda index, x: x,
) -> Tensor:
    """The loop over the blocks with its routes written out; ``outputs`` gets what each block returned."""
    routes, full = dict(zip(spans, kept, strict=True)), x
    for index in range(len(blocks)):
        for (start, _), ids in routes.items():
            if index == start:
                full, x = x, take_kept(x, ids)
        x = blocks[index](between(index, x))
        if outputs is not None:
            outputs.append(x)
        for (_, end), ids in routes.items():
            if index == end:
                x = put_back(full, x, ids)
    return x
