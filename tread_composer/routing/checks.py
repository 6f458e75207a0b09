"""Whether a block can work on some of its tokens: found out by trying, for no class name tells.

A block is sound on a route if it treats tokens as a set: their order says nothing that their contents and the token
arguments do not say. Attention and MLPs do so; windows, convolutions, causal masks and scans do not. ``probe`` gives
the block the same tokens in another order, and one sample with other contents, and compares.

Shapes: B samples, K kept tokens, D width.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import RoutingError, kind

__all__ = [
    'PROBED_FORWARDS',
    'Verdict',
    'copied',
    'explained',
    'explained_behind',
    'hooks_of_users',
    'probe',
    'undisturbed',
]

PROBED_FORWARDS = frozenset({1, 2, 16, 128})
"""Which training forwards are probed: several, for gates that start at zero hide what a block does. The numbers do not
depend on what was found, for under FSDP all ranks must call a block equally often."""


class Verdict(NamedTuple):
    """What a probe found: a fault in words, or none; and whether rounding left anything to be seen."""

    fault: str | None
    conclusive: bool


def probe(run: Callable[[Tensor | None, bool], Tensor | None], x_BKD: Tensor, fixed: tuple[int, int]) -> Verdict:
    """Compare a block with itself on the same tokens in another order, and with one sample changed.

    Args:
        run: ``run(order, changed)`` gives the block's output tokens, for the kept tokens in the order ``order [K]`` or
            as they are, and with the first sample's contents changed if asked; None if there was no memory for that.
            Without trace: see ``undisturbed``.
        x_BKD: The block's kept tokens.
        fixed: Number of leading and of trailing tokens that keep their places.
    """
    batch_size, num_kept = x_BKD.shape[:2]
    out = run(None, False)
    if out is not None and (out.shape[:2] != x_BKD.shape[:2] or not out.is_floating_point()):
        return Verdict(f'it returns {kind(out)} for {batch_size} samples x {num_kept} tokens', True)
    order = _reordered(num_kept, *fixed).to(x_BKD.device)
    # Always all three calls: what follows from values, or from memory, may differ between ranks.
    moved, changed = run(order, False), run(None, True)
    if out is None or moved is None or changed is None:
        return Verdict(None, False)
    # Tolerance: a sum over tokens in another order is off by some hundred roundings of the block's own contribution,
    # out - x, and a residual stream adds some roundings of itself.
    eps = _rounding(x_BKD, out.dtype)
    out, moved, changed = out.float(), moved.float(), changed.float()
    scale = (out - x_BKD if out.shape == x_BKD.shape else out).abs().max().item()
    tolerance = min(1000 * eps, 0.1) * scale + 4 * eps * out.abs().max().item()
    if num_kept - sum(fixed) < 2 or not tolerance < 0.25 * scale:  # too small a share of the sum, or nan
        return Verdict(None, False)
    # f(P x) = P f(x) for every permutation P of the tokens.
    if (moved - out[:, order]).abs().max().item() > tolerance:
        return Verdict(_BY_POSITION, True)
    # Only the first sample was changed, so the others must not move.
    if batch_size > 1 and (changed - out)[1:].abs().max().item() > tolerance:
        return Verdict(_ACROSS_SAMPLES, True)
    return Verdict(None, True)


_BY_POSITION = (
    'the same tokens in another order give another result, so it mixes them by position (windows, convolution, causal '
    'mask, scan), or a table or mask with one entry per token is not named in token_arguments. If the ascending order '
    'of the kept tokens is all that it needs, as in a state-space model, say ordered=True; else it cannot be routed'
)
_ACROSS_SAMPLES = (
    'the outputs of a sample change with the contents of another one. Tokens must be [B, N, ...], samples first: for '
    "torch's own transformer layers that is batch_first=True. If samples shall mix, ordered=True leaves this check away"
)


def _reordered(num_kept: int, leading: int, trailing: int) -> Tensor:
    """A permutation of the tokens between the fixed ones, always the same, that is not the identity."""
    moved = torch.randperm(num_kept - leading - trailing, generator=torch.Generator().manual_seed(0))
    if torch.equal(moved, torch.arange(len(moved))):
        moved = moved.flip(0)  # few tokens: the drawn order may be the identity
    places = torch.arange(num_kept)
    return torch.cat([places[:leading], moved + leading, places[num_kept - trailing :]])


def _rounding(x_BKD: Tensor, dtype: torch.dtype) -> float:
    """Relative rounding error of what the block computes with, as far as it can be known from outside."""
    device = x_BKD.device.type
    eps = max(torch.finfo(x_BKD.dtype).eps, torch.finfo(dtype).eps)
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if x_BKD.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != 'highest'):
        eps = max(eps, 2.0**-10)  # TF32 keeps 10 bits of each factor
    return eps


@contextlib.contextmanager
def undisturbed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, calls of the block leave no trace: on gradients, random numbers, buffers, train flags, hooks, graphs.

    Dropout is off. Hooks of torch's own (FSDP, weight norm) and those by which Composer's ranks tell each other that
    one ran out of memory stay, the user's do not see the calls. What a block keeps outside of buffers, such as a cache
    object among its arguments or a list of its own, is not covered.
    """
    modules = list(block.modules())
    before = [(m, m.training, m._forward_pre_hooks, m._forward_hooks) for m in modules]
    fast, cached = torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_cache_enabled()
    buffers = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter('ignore')
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []))
        if 'torch._dynamo' in sys.modules:  # a block that is compiled in place must not get a graph for this
            stack.enter_context(torch.compiler.set_stance('force_eager'))
        try:
            # Autocast's cache would hand weights that were cast here, without a gradient, to the true call; and a block
            # may switch autocast on by itself.
            torch.set_autocast_cache_enabled(False)
            # Torch's layers have another way without gradients, which takes a float mask for a bool one.
            torch.backends.mha.set_fastpath_enabled(False)
            for module in modules:
                module.training = False
                module._forward_pre_hooks = _of_torch(module._forward_pre_hooks)
                module._forward_hooks = _of_torch(module._forward_hooks)
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, training, pre_hooks, hooks in before:
                module.training, module._forward_pre_hooks, module._forward_hooks = training, pre_hooks, hooks
            for module, name, buffer, copy in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


_HOMES = 'torch.', 'composer.distributed.'


def _of_torch(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if f'{_home(hook)}.'.startswith(_HOMES))


def hooks_of_users(block: nn.Module) -> list[str]:
    """Names of the forward hooks on a block that are neither torch's nor those of Composer's ranks."""
    hooks = [*block._forward_pre_hooks.values(), *block._forward_hooks.values()]
    users = [hook for hook in hooks if not f'{_home(hook)}.'.startswith(_HOMES)]
    return sorted({f'{_home(hook)}.{getattr(hook, "__qualname__", type(hook).__qualname__)}' for hook in users})


def _home(hook: Any) -> str:
    hook = getattr(hook, 'func', hook)
    return getattr(hook, '__module__', None) or type(hook).__module__


def copied(value: Any) -> Any:
    """Arguments that a block may overwrite in place without harm."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(member) for member in value)
    return {key: copied(member) for key, member in value.items()} if type(value) is dict else value


def explained(error: Exception, name: str, counts: tuple[int, int], values: Sequence[tuple[str, Any]]) -> Exception:
    """The error of a block (``name``) on K of N tokens (``counts``), with what that may have to do with it.

    ``values`` are the call's arguments with their names.
    """
    if 'out of memory' in str(error) or isinstance(error, RoutingError) or counts[0] == counts[1]:
        return error  # Composer reads the first; the last has nothing to do with routing
    full = [f'{argument!r} ({kind(value)})' for argument, value in values if _has_length(value, counts[1])]
    hint = f' Arguments that still have {counts[1]} entries: {", ".join(full)}.' if full else ''
    return RoutingError(
        f'{name} failed on {counts[0]} of {counts[1]} tokens: {error}\n'
        f'An argument with one entry per token must be named in token_arguments.{hint} If there is none, and the block '
        'runs on all tokens, its work depends on their number or their grid (windows, a reshape to height x width, a '
        'position table of fixed size), or it receives tokens of a block before the route (a long skip connection, '
        'residuals of a ControlNet), and it cannot be routed; leave such blocks out of the route'
    )


def explained_behind(
    error: Exception, name: str, counts: Sequence[tuple[int, int]], values: Sequence[tuple[str, Any]]
) -> Exception:
    """The error of a block behind a route, which runs on all tokens, where an argument still has the kept ones only.

    ``counts`` are K and N of each route that was passed, ``values`` the call's arguments with their names.
    """
    if 'out of memory' in str(error) or isinstance(error, RoutingError):
        return error
    short = {
        f'{argument!r} ({kind(value)})': None
        for kept, total in counts
        for argument, value in values
        if kept != total and _has_length(value, kept) and not _has_length(value, total)
    }
    if not short:
        return error
    return RoutingError(
        f'{name}, behind the route, failed on all tokens: {error}\n'
        f'{", ".join(short)} has as many entries as tokens were kept on the route: it comes from a block there. Let '
        'the route hold both ends of such a connection or neither: where block i hands something to block depth - 1 '
        '- i, a route that begins as far from the start as it ends before the end (start=2, end=-3)'
    )


def _has_length(value: Any, length: int) -> bool:
    if type(value) in (tuple, list):
        return any(_has_length(member, length) for member in value)
    return isinstance(value, Tensor) and length in value.shape
