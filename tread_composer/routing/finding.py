"""``find_settings``: the arguments of ``apply_tread`` for a model, found by running it.

The decisive trial keeps *all* tokens, in another order: the model's output is then the dense one if and only if
everything that belongs to a token follows it and the blocks treat tokens as a set. No guess survives it unnoticed.
Shapes: B samples, N tokens, D width.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.core.inference import evaluating
from tread_composer.routing.arguments import FAILURES, RoutingError, bare, tensors_in
from tread_composer.routing.route import Route
from tread_composer.routing.surgery import apply_tread, find_blocks, remove_tread

__all__ = ['FoundSettings', 'find_settings']

_TRIALS = 200  # combinations of what several arguments may mean


@dataclasses.dataclass(frozen=True)
class FoundSettings:
    """How to route a model, or why not."""

    settings: dict[str, Any]  # arguments of ``apply_tread`` and ``Tread`` beside the route
    notes: tuple[str, ...] = ()  # what a person must decide or should know
    fault: str | None = None  # why the model cannot be routed so; None if it can
    route: tuple[int, int] = (2, -4)  # first and last block of one that fits: the paper's, if the model is deep enough

    def __str__(self) -> str:
        written = ''.join(f', {name}={value!r}' for name, value in self.settings.items())
        call = f'Tread(start={self.route[0]}, end={self.route[1]}{written})'
        lines = [f'cannot be routed: {self.fault}'] if self.fault else [call]
        return '\n'.join([*lines, *(f'- {note}' for note in self.notes)])


def find_settings(model: nn.Module, run: Callable[[nn.Module], Any], *, blocks: str | None = None) -> FoundSettings:
    """Find the settings of one block list by running the model densely and routed, on real tensors.

    Args:
        model: The model, plain; it is plain again afterwards. Small is enough: a few blocks, a few tokens, but sizes
            that differ (samples, tokens, text, width), and weights at random where gates would start at zero.
        run: ``run(model)`` makes one forward pass and returns its output, or tensors in tuples and dicts. The same
            in each call, but for what ``torch.manual_seed`` decides.
        blocks: Path of the block list; if None, the only candidate (see ``find_blocks``).

    Raises:
        ValueError: The list is not found, is empty, or the forward pass does not go through it.
    """
    path, container = find_blocks(model, blocks)
    depth = len(container)
    inner = (1, -2) if depth > 2 else (0, -1)  # all blocks but the first and the last, where others are left
    with evaluating(model):
        try:
            calls, dense = _observed(model, run, container)
            if not calls:
                raise ValueError(f'blocks: the forward pass does not go through {path!r}')
            outcome = _searched(_Trials(model, run, path, depth, inner, dense), *calls[0])
        finally:
            remove_tread(model)
    route, notes = (2, -4), outcome.notes
    if depth < 7:  # with 7, the paper's route has two blocks to skip
        start, end = route = inner
        note = f"{depth} blocks are too few for the paper's route, start=2 and end=-4, so this is from {start} to {end}"
        notes = notes if outcome.fault else (*notes, note)
    return FoundSettings({'blocks': path, **outcome.settings}, notes, outcome.fault, route)


def _searched(trials: '_Trials', values: dict[str, Any], out: Any) -> FoundSettings:
    """The first settings that pass the trials, given the named arguments and the output of a block."""
    tokens = _tokens(values, out)
    if tokens is None:
        return FoundSettings({}, fault='no argument [B, N, D] of its blocks comes back in the same shape')
    name, position, notes = tokens
    settings: dict[str, Any] = {} if name == next(iter(values)) else {'tokens': name}
    settings |= {} if position is None else {'tokens_out': position}
    shape = values.pop(name).shape
    # Arguments [B, M, ...] that may be tokens of text: M of each.
    streams = {key: value.shape for key, value in values.items() if isinstance(value, Tensor) and value.dim() == 3}
    texts = {key: size[1] for key, size in streams.items() if size[0] == shape[0]}
    choices = {key: list(_meanings(value, shape[1], texts)) for key, value in values.items()}
    choices = {key: [*meanings, None] for key, meanings in choices.items() if meanings}  # None: it follows nothing
    fault = 'the tokens in another order give another result, whatever follows them'
    for combination in itertools.islice(itertools.product(*choices.values()), _TRIALS):
        chosen = {key: meaning for key, meaning in zip(choices, combination, strict=True) if meaning is not None}
        trial = settings | _written(chosen)
        try:
            if trials.move_together(shape, trial):
                return FoundSettings(trial, notes + _questions(shape[1], trial), trials.fault_in_training(trial))
        except FAILURES as error:
            fault = str(error).partition('\n')[0]
    return FoundSettings(settings, notes, fault)


def _observed(
    model: nn.Module, run: Callable[[nn.Module], Any], container: nn.ModuleList | nn.Sequential
) -> tuple[list[tuple[dict[str, Any], Any]], list[Tensor]]:
    """The named arguments and the output of each call of an inner block, and the model's output."""
    calls: list[tuple[dict[str, Any], Any]] = []
    block = container[min(1, len(container) - 1)]
    signature = inspect.signature(bare(block).forward)

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        bound = signature.bind(*args, **kwargs).arguments
        calls.append(({name: value for name, value in bound.items() if value is not None}, out))

    handle = block.register_forward_hook(note, with_kwargs=True)
    try:
        return calls, _run(model, run)
    finally:
        handle.remove()


def _run(model: nn.Module, run: Callable[[nn.Module], Any]) -> list[Tensor]:
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # Torch's layers have another way without gradients, which takes a float mask for a bool one.
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return [tensor.detach().float() for tensor in tensors_in(run(model)) if tensor.is_floating_point()]
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _tokens(values: dict[str, Any], out: Any) -> tuple[str, int | None, tuple[str, ...]] | None:
    """The argument with the tokens, their position in the output, and a note where several arguments fit."""
    places = list(enumerate(out)) if isinstance(out, tuple) else [(None, out)]
    fits = [
        (value.shape[1], name, position)
        for name, value in values.items()
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point()
        for position, member in places
        if isinstance(member, Tensor) and member.shape == value.shape
    ]
    if not fits:
        return None
    # Image tokens outnumber text in nearly every model; a person sees the note where both fit.
    most, name, position = max(fits, key=lambda fit: fit[0])
    rivals = ', '.join(repr(rival) for rival in sorted({rival for _, rival, _ in fits if rival != name}))
    return name, position, (f'{name!r} holds the tokens: {most} of them; {rivals} would fit too',) if rivals else ()


def _meanings(value: Any, num_tokens: int, texts: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What an argument may say of tokens, as options of ``token_arguments``; nothing for one without such a length."""
    if isinstance(value, Tensor):
        yield from _meanings_of_tensor(value, num_tokens, texts)
    elif type(value) in (tuple, list, dict):
        members = value if isinstance(value, dict) else dict(enumerate(value))
        tensors = {key: member for key, member in members.items() if isinstance(member, Tensor)}
        meanings = {key: list(_meanings_of_tensor(member, num_tokens, texts)) for key, member in tensors.items()}
        follow = [key for key in meanings if meanings[key]]
        is_all = len(follow) == sum(member is not None for member in members.values())
        for meaning in meanings[follow[0]] if follow else ():  # all members that follow do so alike
            yield meaning if is_all else {**meaning, 'members': follow}


def _meanings_of_tensor(value: Tensor, num_tokens: int, texts: dict[str, int]) -> Iterator[dict[str, Any]]:
    def dims_of(length: int) -> list[int]:
        return [dim if dim < 2 else dim - value.dim() for dim, size in enumerate(value.shape) if size == length]

    dims = dims_of(num_tokens)
    for count in range(len(dims), 0, -1):  # all of them first: a mask [N, N]
        for subset in itertools.combinations(dims, count):
            yield {'dims': list(subset)}
    for text, length in texts.items():  # tables of text and image together, in either order
        for dim, side in itertools.product(dims_of(num_tokens + length), ('after', 'before')):
            yield {'dims': [dim], side: text}
    for missing in range(1, min(6, num_tokens)):  # class token and up to four registers have no position
        for dim in dims_of(num_tokens - missing):
            yield {'dims': [dim], 'without_first': missing}


def _written(chosen: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Settings of ``apply_tread`` for these token arguments, as a person would write them."""
    short: dict[str, Any] = {}
    for key, options in chosen.items():
        dims = options['dims'] if len(options['dims']) > 1 else options['dims'][0]
        short[key] = {**options, 'dims': dims} if len(options) > 1 else dims
    names = list(short) if all(meaning == 1 for meaning in short.values()) else short
    settings: dict[str, Any] = {'token_arguments': names} if chosen else {}
    missing = max((options.get('without_first', 0) for options in chosen.values()), default=0)
    settings |= {'always_keep': missing} if missing else {}
    # A table without a dimension for the samples cannot follow several routes.
    return settings | ({'shared': True} if any(0 in options['dims'] for options in chosen.values()) else {})


@dataclasses.dataclass
class _Trials:
    """Runs of the model with settings that may be right, compared with its ``dense`` output."""

    model: nn.Module
    run: Callable[[nn.Module], Any]
    path: str
    depth: int
    inner: tuple[int, int]
    dense: list[Tensor]

    def move_together(self, shape: torch.Size, settings: dict[str, Any]) -> bool:
        """Whether all tokens, in another order on the route, give the dense output."""
        fixed, samples = settings.get('always_keep', 0), 1 if settings.get('shared') else shape[0]
        generator = torch.Generator().manual_seed(0)
        # A permutation of the tokens that may move, another for each sample.
        orders = [torch.randperm(shape[1] - fixed, generator=generator) + fixed for _ in range(samples)]
        kept = torch.stack([torch.cat([torch.arange(fixed), order]) for order in orders])  # [B, N] or [1, N]
        kept = kept.to(next(self.model.parameters()).device)
        remove_tread(self.model)
        routing = apply_tread(self.model, Route(0, self.depth - 1), blocks=self.path, ordered=True, **settings)
        with routing.forced([kept], num_tokens=shape[1]):
            moved = _run(self.model, self.run)
        # Float32 sums in another order; a wrong setting is off by orders of magnitude more.
        close = [
            x.shape == y.shape and torch.allclose(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())
            for x, y in zip(moved, self.dense, strict=True)
        ]
        return bool(close) and all(close)

    def fault_in_training(self, settings: dict[str, Any]) -> str | None:
        """What a routed forward pass in training mode, with all its checks, says against the settings."""
        remove_tread(self.model)
        # Half of the tokens, so that whatever counts them fails.
        apply_tread(self.model, Route(*self.inner, 0.5), blocks=self.path, **settings)
        self.model.train()
        try:
            _run(self.model, self.run)
        except RoutingError as error:
            return str(error)
        finally:
            self.model.eval()
        return None


def _questions(num_tokens: int, settings: dict[str, Any]) -> tuple[str, ...]:
    """What no trial can tell: whether the first tokens are part of the image."""
    side = math.isqrt(num_tokens)
    extra = num_tokens - side**2
    text = (
        f'{num_tokens} tokens are {side} x {side} and {extra}: if these are a class token, registers or text, they '
        f'should not skip: always_keep={extra}, or [0, {extra}] where they come last'
    )
    return (text,) if extra and not settings.get('always_keep') else ()
