"""``Probe``: tries the blocks of one routed forward pass, and watches what the model does between them.

Off the hot path: only the forward passes of ``checks.PROBED_FORWARDS`` have one. What it vouches for, step by step, is
that the pass equals the plain loop over the blocks with an explicit gather before and an explicit put-back behind it.
Shapes: B samples, N tokens, K kept tokens, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.arguments import kind, output_tokens
from tread_composer.routing.checks import copied, hooks_of_users, probe, undisturbed
from tread_composer.routing.settings import ListSettings

__all__ = ['Call', 'Probe']

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block's call, by position and by name."""


class Probe:
    """The checks of one pass along one segment of a route.

    Args:
        settings: How the blocks of the list take their tokens.
        full_BND: The tokens that the first block was given.
        kept: Kept ids ``[B, K]`` or ``[1, K]``.
    """

    def __init__(self, settings: ListSettings, full_BND: Tensor, kept: Tensor) -> None:
        self.settings, self.device = settings, full_BND.device
        self.kept_BK, self.num_tokens = kept.expand(len(full_BND), -1), full_BND.shape[1]
        self.conclusive = True
        self.full = self._copy(full_BND)
        self.previous: Tensor | None = None  # a copy of what the block before returned
        self.outputs: list[Tensor] = []
        self.hooks: dict[str, list[nn.Module]] = {}

    def fault(self, block: nn.Module, call: Callable[..., Any], reduced: Callable[[Tensor | None], Call]) -> str | None:
        """Why this block cannot be routed, as far as trying shows it; None if nothing speaks against it.

        ``reduced`` gives the call's arguments for the kept tokens, in another order ``[K]`` if one is given.
        """
        tokens = self.settings.tokens
        for name in hooks_of_users(block):
            self.hooks.setdefault(name, []).append(block)

        def run(order: Tensor | None, changed: bool) -> Tensor | None:
            try:
                return called(order, changed)
            except torch.OutOfMemoryError:
                return None  # the call that counts may have the memory that this one lacked

        def called(order: Tensor | None, changed: bool) -> Tensor:
            args, kwargs = reduced(order)
            args, kwargs = copied(args), copied(kwargs)  # a block may write into its arguments
            if changed:
                x = tokens.value(args, kwargs).clone()
                x[0] = 1 - x[0]  # other contents of the same size; x = 1/2 everywhere would be the one fixed point
                args, kwargs = tokens.replaced(args, kwargs, x)
            return output_tokens(call(*args, **kwargs), self.settings.tokens_out)

        # Nothing before: a model that checkpoints its own blocks counts the tensors saved for the backward pass.
        with undisturbed(block, self.device):
            verdict = probe(run, tokens.value(*reduced(None)), self.settings.always_keep)
        # One block whose work rounding hides, and the pass as a whole vouches for nothing.
        self.conclusive = self.conclusive and verdict.conclusive
        return verdict.fault

    def note(self, index: int, x_BKD: Tensor) -> None:
        """Keep what block ``index`` returned, for comparison with what the next one is given."""
        self.previous = self._copy(x_BKD)
        self.outputs.append(x_BKD)

    def in_order(self, values: Any, order: Tensor) -> Any:
        """Arguments of a call in which what earlier blocks of this pass returned is in another order too.

        Long skip connections between two blocks of a route (U-ViT, HunyuanDiT) hand over kept tokens.
        """
        if isinstance(values, Tensor):
            return values[:, order] if any(values is output for output in self.outputs) else values
        if type(values) in (tuple, list):
            return type(values)(self.in_order(value, order) for value in values)
        return {k: self.in_order(v, order) for k, v in values.items()} if type(values) is dict else values

    def between(self, index: int, x: Any) -> str | None:
        """What the model itself did with the tokens since the block before ``index``, if that is anything.

        A copy is compared, not the tensor itself, which may have been written to in place.
        """
        before, count = self.previous, self.kept_BK.shape[1]
        if before is None or not isinstance(x, Tensor) or (x.shape == before.shape and _equal(x, before)):
            return None
        place = f'between block {index - 1} and block {index} of {self.settings.path!r}'
        remedy = f'End the route at block {index - 1}, or begin it at block {index}'
        if x.shape != before.shape:
            return (
                f'{place} the model itself makes {kind(x)} of the tokens, {kind(before)}: it folds, adds or drops them '
                f'there, and on the route only {count} of {self.num_tokens} are present. {remedy}'
            )
        return (
            f'{place} the model itself changes the tokens. On the route only {count} of {self.num_tokens} are present, '
            f'and whether that work counts positions cannot be seen from the list. {remedy}. If it treats each token '
            'alone (a norm, one vector for all tokens of a sample), say ordered=True, which leaves these checks away'
        )

    def end(self, restored_BND: Tensor) -> str | None:
        """What speaks against the sequence behind the route: it must be the full one with the kept places replaced."""
        if self.full is None or self.previous is None or self.previous.shape[2:] != restored_BND.shape[2:]:
            return None
        with torch.no_grad():
            samples = torch.arange(len(restored_BND), device=self.device)[:, None]
            # By indexing, so that put_back's scatter is not held against itself.
            expected = self.full.to(restored_BND.dtype)
            expected[samples, self.kept_BK] = self.previous.to(restored_BND.dtype)
            if _equal(restored_BND, expected):
                return None
        return 'the tokens that skip it were changed in place while they waited for its end'

    def _copy(self, x: Tensor) -> Tensor | None:
        try:
            return x.detach().clone()
        except torch.OutOfMemoryError:
            self.conclusive = False
            return None


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same values, up to the rounding of the narrower dtype; NaN equals NaN."""
    with torch.no_grad():
        if x.dtype == y.dtype:
            return torch.equal(x, y) or torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)
        # A cast between two blocks may change the dtype: one rounding each way.
        eps = max(torch.finfo(x.dtype).eps, torch.finfo(y.dtype).eps)
        return torch.allclose(x.float(), y.float(), rtol=2 * eps, atol=0, equal_nan=True)
