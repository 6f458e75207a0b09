"""Whether a block can work on some of its tokens: found out by trying, for no class name tells.

A block is sound on a route if it treats tokens as a set: their order says nothing that their contents and the token
arguments do not say. Attention and MLPs do so; windows, convolutions, causal masks and scans do not. ``Probe`` runs
each block of one forward pass three times more, and watches what the model does between them: it vouches that the pass
equals the plain loop over the blocks with an explicit gather before and an explicit put-back behind it.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import collections
import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from tread_composer.routing.arguments import Call, ListSettings, RoutingError, kind, output_tokens
from tread_composer.routing.tokens import with_ends

__all__ = ['PROBED_FORWARDS', 'Probe']

PROBED_FORWARDS = frozenset({1, 2, 16, 128})
"""Which training forwards are probed: several, for gates that start at zero hide what a block does. The numbers do not
depend on the findings, for under FSDP all ranks must call a block equally often."""


class Probe:
    """The checks of one pass along a route within one list: from the tokens of its first block, and the kept ids."""

    def __init__(self, settings: ListSettings, full_BND: Tensor, kept: Tensor) -> None:
        self.settings, self.device = settings, full_BND.device
        self.kept_BK, self.num_tokens = kept.expand(len(full_BND), -1), full_BND.shape[1]
        self.conclusive = True
        self.full = self._copy(full_BND)
        self.previous: Tensor | None = None  # a copy of what the block before returned
        self.outputs: list[Tensor] = []  # of the blocks so far, [B, K, D]
        self.shares: list[list[Tensor]] = []  # for each output, the gradients that blocks have sent back to it
        self.hooks: collections.Counter[str] = collections.Counter()  # of users, by name: on how many blocks

    def check(self, index: int, block: nn.Module, call: Callable[..., Any], reduced: Callable[..., Call]) -> None:
        """Try block ``index`` before the call that counts; ``reduced(order=...)`` are its arguments on the route.

        Raises:
            RoutingError: It cannot be routed, or the model itself has changed the tokens since the block before.
        """
        tokens = self.settings.tokens
        self.hooks.update(_hooks_of_users(block))

        def outcome(order: Tensor | None = None, *, changed: bool = False) -> Tensor | None:
            try:
                arguments = self._in_order(reduced(order=order), order)
                args, kwargs = tree_map_only(Tensor, lambda x: x.detach().clone(), arguments)  # it may write into them
                if changed:
                    x = tokens.value(args, kwargs)
                    x[0] = 1 - x[0]  # other contents of the same size; x = 1/2 everywhere would be the one fixed point
                return output_tokens(call(*args, **kwargs), self.settings.tokens_out)
            except torch.OutOfMemoryError:
                return None  # the call that counts may have the memory that this one lacked

        # Nothing before: a model that checkpoints its own blocks counts the tensors saved for the backward pass.
        with _undisturbed(block, self.device):
            fault, conclusive = _compared(outcome, tokens.value(*reduced()), self.settings.always_keep)
        # One block whose work rounding hides, and the pass as a whole vouches for nothing.
        self.conclusive = self.conclusive and conclusive
        if fault:
            raise RoutingError(f'block {index} of {self.settings.path!r} cannot be routed: {fault}')

    def note(self, x_BKD: Tensor, index: int, *, read: bool) -> None:
        """Keep what block ``index`` returned, for comparison with what the next one is given.

        ``read``: something is known to read it besides the blocks, or it is the last one's; else such a reader is named
        in the backward pass.
        """
        self.previous = self._copy(x_BKD)
        self.outputs.append(x_BKD)
        shares: list[Tensor] = []  # its gradient, as far as it comes from blocks
        self.shares.append(shares)
        if not read and x_BKD.requires_grad:
            x_BKD.register_hook(_strangers(shares, f'block {index} of {self.settings.path!r}', self._present))

    def traced(self, arguments: Call) -> Call:
        """The arguments of a block, such that its share of the gradients of earlier blocks' outputs is known."""

        def alias(x: Tensor) -> Tensor:
            place = next((place for place, output in enumerate(self.outputs) if x is output), None)
            if place is None or not x.requires_grad or not torch.is_grad_enabled():
                return x
            view = x.view_as(x)
            view.register_hook(self.shares[place].append)
            return view

        return tree_map_only(Tensor, alias, arguments)

    def _in_order(self, arguments: Call, order: Tensor | None) -> Call:
        """Arguments in which what earlier blocks of this pass returned is in another order too.

        Long skip connections between two blocks of a route (U-ViT, HunyuanDiT) hand over kept tokens.
        """

        def moved(x: Tensor) -> Tensor:
            return x[:, order] if any(x is output for output in self.outputs) else x

        return arguments if order is None else tree_map_only(Tensor, moved, arguments)

    def between(self, index: int, x: Any) -> None:
        """Refuse a model that has itself worked on the tokens between the block before and block ``index``."""
        # A copy is compared, not the tensor itself, which may have been written to in place.
        before = self.previous
        if before is None or not isinstance(x, Tensor) or (x.shape == before.shape and _equal(x, before)):
            return
        place = f'between block {index - 1} and block {index} of {self.settings.path!r} the model itself'
        remedy = f'End the route at block {index - 1}, or begin it at block {index}'
        present = f'On the route only {self._present} are present'
        if x.shape != before.shape:
            raise RoutingError(
                f'{place} makes {kind(x)} of the tokens, {kind(before)}: it folds, adds or drops them there. '
                f'{present}. {remedy}'
            )
        raise RoutingError(
            f'{place} changes the tokens. {present}, and whether that work counts positions cannot be seen from the '
            f'list. {remedy}. If it treats each token alone (a norm, one vector for all tokens of a sample), say '
            'ordered=True, which leaves these checks away'
        )

    @property
    def _present(self) -> str:
        return f'{self.kept_BK.shape[1]} of {self.num_tokens}'

    def end(self, restored_BND: Tensor) -> None:
        """Refuse a sequence behind the route that is not the full one with its kept places replaced."""
        if self.full is None or self.previous is None or self.previous.shape[2:] != restored_BND.shape[2:]:
            return
        with torch.no_grad():
            samples = torch.arange(len(restored_BND), device=self.device)[:, None]  # [B, 1], beside ids [B, K]
            # By indexing, so that put_back's scatter is not held against itself.
            expected = self.full.to(restored_BND.dtype)
            expected[samples, self.kept_BK] = self.previous.to(restored_BND.dtype)
            if not _equal(restored_BND, expected):
                raise RoutingError(
                    f'{self.settings.path}: the route cannot be vouched for: the tokens that skip it were changed in '
                    'place while they waited for its end'
                )

    def _copy(self, x: Tensor) -> Tensor | None:
        try:
            return x.detach().clone()
        except torch.OutOfMemoryError:
            self.conclusive = False
            return None


def _strangers(shares: list[Tensor], block: str, present: str) -> Callable[[Tensor], None]:
    """A hook on what a block returned: whether its gradient is more than the later blocks have sent back."""

    def compare(gradient: Tensor) -> None:
        if not shares:  # the model handed on a copy of the tokens
            return
        total, tolerance = sum(shares), 8 * torch.finfo(gradient.dtype).eps * gradient.abs().max()  # sums in any order
        shares.clear()
        if (gradient - total).abs().max() > tolerance:
            warnings.warn(
                f'{block}: the model reads what it returned (a loss on features, a projection), and on the route those '
                f'are {present} tokens. tap_blocks hands them out together with the ids of the kept tokens',
                stacklevel=2,
            )

    return compare


def _compared(outcome: Callable[..., Tensor | None], x_BKD: Tensor, fixed: tuple[int, int]) -> tuple[str | None, bool]:
    """Compare a block on its kept tokens with itself on the same in another order, and with the first sample changed.

    ``outcome(order, changed=...)`` gives its output tokens, or None if memory was short. The ``fixed`` leading and
    trailing tokens keep their places. Returns a fault in words, or none; and whether rounding left anything to be seen.
    """
    (batch_size, num_kept), free = x_BKD.shape[:2], x_BKD.shape[1] - sum(fixed)
    out = outcome()
    if out is not None and (out.shape[:2] != x_BKD.shape[:2] or not out.is_floating_point()):
        return f'it returns {kind(out)} for {batch_size} samples x {num_kept} tokens', True
    # A permutation of the tokens between the fixed ones, always the same, that is not the identity.
    places = torch.randperm(free, generator=torch.Generator().manual_seed(0))
    if torch.equal(places, torch.arange(free)):
        places = places.flip(0)  # few tokens: the drawn order may be the identity
    order = with_ends(places[None] + fixed[0], num_kept, *fixed)[0].to(x_BKD.device)  # [K]
    # Always all three calls: what follows from values, or from memory, may differ between ranks.
    moved, changed = outcome(order), outcome(changed=True)
    if out is None or moved is None or changed is None:
        return None, False
    # Tolerance: a sum over tokens in another order is off by some hundred roundings of the block's own contribution,
    # out - x, and a residual stream adds some roundings of itself.
    eps = _rounding(x_BKD, out.dtype)
    out, moved, changed = out.float(), moved.float(), changed.float()
    scale = (out - x_BKD if out.shape == x_BKD.shape else out).abs().max().item()
    tolerance = min(1000 * eps, 0.1) * scale + 4 * eps * out.abs().max().item()
    if free < 2 or not tolerance < 0.25 * scale:  # too small a share of the sum, or nan
        return None, False
    # f(P x) = P f(x) for every permutation P of the tokens.
    if (moved - out[:, order]).abs().max().item() > tolerance:
        return _BY_POSITION, True
    # Only the first sample was changed, so the others must not move.
    if batch_size > 1 and (changed - out)[1:].abs().max().item() > tolerance:
        return _ACROSS_SAMPLES, True
    return None, True


_BY_POSITION = (
    'the same tokens in another order give another result, so it mixes them by position (windows, convolution, causal '
    'mask, scan), or a table or mask with one entry per token is not named in token_arguments. If the ascending order '
    'of the kept tokens is all that it needs, as in a state-space model, say ordered=True; else it cannot be routed'
)
_ACROSS_SAMPLES = (
    'the outputs of a sample change with the contents of another one. Tokens must be [B, N, ...], samples first: for '
    "torch's own transformer layers that is batch_first=True. If samples shall mix, ordered=True leaves this check away"
)


def _rounding(x_BKD: Tensor, dtype: torch.dtype) -> float:
    """Relative rounding error of what the block computes with, as far as it can be known from outside."""
    device = x_BKD.device.type
    eps = max(torch.finfo(x_BKD.dtype).eps, torch.finfo(dtype).eps)
    if torch.is_autocast_enabled(device):
        eps = max(eps, torch.finfo(torch.get_autocast_dtype(device)).eps)
    if x_BKD.is_cuda and (torch.backends.cuda.matmul.allow_tf32 or torch.get_float32_matmul_precision() != 'highest'):
        eps = max(eps, 2.0**-10)  # TF32 keeps 10 bits of each factor
    return eps


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values, up to the rounding of the narrower dtype; NaN equals NaN."""
    with torch.no_grad():
        if x.dtype == y.dtype:
            return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        # A cast between two blocks may change the dtype: one rounding each way.
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
        return torch.allclose(x.float(), y.float(), rtol=2 * eps, atol=0, equal_nan=True)


@contextlib.contextmanager
def _undisturbed(block: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, calls of the block leave no trace: on gradients, random numbers, buffers, train flags, hooks, graphs.

    Dropout is off. Hooks of torch's own (FSDP, weight norm) and those by which Composer's ranks tell each other that
    one ran out of memory stay, the user's do not see the calls.
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
                module._forward_pre_hooks = _without_users(module._forward_pre_hooks)
                module._forward_hooks = _without_users(module._forward_hooks)
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


def _home(hook: Any) -> str:
    hook = getattr(hook, 'func', hook)  # of a partial, the function
    return getattr(hook, '__module__', None) or type(hook).__module__


def _is_of_user(hook: Any) -> bool:
    """Whether a hook is neither torch's nor one of Composer's ranks."""
    return not f'{_home(hook)}.'.startswith(('torch.', 'composer.distributed.'))


def _without_users(hooks: Any) -> Any:
    return type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_user(hook))


def _hooks_of_users(block: nn.Module) -> set[str]:
    """Names of the forward hooks on a block that see fewer tokens on a route."""
    hooks = filter(_is_of_user, [*block._forward_pre_hooks.values(), *block._forward_hooks.values()])
    return {f'{_home(hook)}.{getattr(hook, "__qualname__", type(hook).__qualname__)}' for hook in hooks}
