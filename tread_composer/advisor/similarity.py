"""How alike a model's tokens are from block to block: TREAD's motivation figure, for any model with a list of blocks.

Shapes: B samples, N tokens, D width, L blocks. Depth 0 is behind the embedding, depth k behind block k - 1.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tread_composer.core.inference import evaluating
from tread_composer.routing import find_blocks
from tread_composer.routing.arguments import find_argument

__all__ = ['token_similarity']


@torch.no_grad()
def token_similarity(
    model: nn.Module,
    calls: Iterable[Callable[[], Any]],
    *,
    blocks: str | None = None,
    tokens: str | None = None,
    tokens_out: int | None = None,
) -> Tensor:
    """The mean cosine between a token at one depth and the same token at another (TREAD, arXiv 2501.04765).

    The model runs in evaluation mode, so densely, and without gradients, and is afterwards as it was. Tokens of one
    batch at all depths are held at a time. A token that is all zeros counts as similarity 0. The cosine is that of the
    whole vector: what all tokens have in common counts too and makes values high.

    Args:
        model: Any module with a list of blocks that it calls one after the other.
        calls: Each runs the model once, on one batch: ``lambda: model(x, t, labels)``.
        blocks: Path of the block list; found if there is only one candidate (``routing.find_blocks``).
        tokens: Name of the first block's argument with the tokens ``[B, N, ...]``; the first one if None.
        tokens_out: Position of the tokens where a block returns a tuple.

    Returns:
        Float64 ``[L + 1, L + 1]`` on the CPU, the mean over tokens and samples.

    Raises:
        ValueError: The list is not found, a call does not run each block once and in order, the tokens are not where
            they should be, change their shape on the way, or are not finite; or there was no call.
    """
    _, container = find_blocks(model, blocks)
    block_list = [container[index] for index in range(len(container))]  # not by iterating: that may yield a route
    total, count = torch.zeros(len(block_list) + 1, len(block_list) + 1, dtype=torch.float64), 0
    with evaluating(model), _recording(block_list, tokens, tokens_out) as depths:
        for call in calls:
            depths.clear()
            call()
            _check(depths, len(block_list))
            for sample in range(len(depths[0])):
                total += _cosines(torch.stack([tokens_BND[sample] for tokens_BND in depths]))  # [L + 1, L + 1]
            count += len(depths[0])
        depths.clear()
    if not count:
        raise ValueError('there was no sample to look at: calls is empty')
    return total / count


def _cosines(tokens_LND: Tensor) -> Tensor:
    """Of one sample, float64: sums do not depend on how samples were put into batches."""
    units = functional.normalize(tokens_LND.flatten(2).double(), dim=2).flatten(1)
    return (units @ units.T / tokens_LND.shape[1]).cpu()


def _check(depths: list[Tensor], num_blocks: int) -> None:
    if len(depths) != num_blocks + 1:
        raise ValueError(
            f'a call ran {max(0, len(depths) - 1)} of {num_blocks} blocks: it must run the whole model, and the model '
            'must call its blocks as modules (not only their methods)'
        )
    shapes = [tuple(tokens_BND.shape) for tokens_BND in depths]
    if len(set(shapes)) > 1 or len(shapes[0]) < 3:
        raise ValueError(f'the tokens are {shapes} from depth to depth; one shape [B, N, D] is needed to compare them')
    if not all(bool(tokens_BND.isfinite().all()) for tokens_BND in depths):
        raise ValueError('the activations are not finite: these weights do not work on these inputs')


@contextlib.contextmanager
def _recording(blocks: list[nn.Module], tokens: str | None, tokens_out: int | None) -> Iterator[list[Tensor]]:
    """The tokens at each depth, in order, of one call after the other; the reader clears the list in between."""
    depths: list[Tensor] = []
    argument = find_argument(blocks[0], tokens, 'tokens')

    def keep(value: Any, depth: int) -> None:  # tokens [B, N, D]
        if not isinstance(value, Tensor):
            raise ValueError(
                f'at depth {depth} the tokens are a {type(value).__name__}, not a tensor [B, N, D]: say tokens= (the '
                'argument) or tokens_out= (their position where a block returns a tuple)'
            )
        if len(depths) != depth:
            raise ValueError(
                f'block {max(0, depth - 1)} was not called in its turn, or twice: depths mean nothing then'
            )
        depths.append(value.detach().clone())  # a copy: the next block may change it in place

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(argument.value(args, kwargs), 0)

    def after(depth: int, _: nn.Module, __: Any, out: Any) -> None:
        keep(out[tokens_out] if isinstance(out, tuple) and tokens_out is not None else out, depth)

    with contextlib.ExitStack() as hooks:  # a handle removes its hook where it is left
        hooks.enter_context(blocks[0].register_forward_pre_hook(before, with_kwargs=True))
        for depth, block in enumerate(blocks, 1):
            hooks.enter_context(block.register_forward_hook(functools.partial(after, depth)))
        yield depths
