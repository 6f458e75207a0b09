"""A block list that routes: the surgery behind TREAD, in plain torch.

The blocks stay as they are and know nothing. The *list* that holds them gets a class whose iterator, while training
with a route, yields one callable for each block: the block itself outside of a route, a thin function around it
inside. The full sequence that waits for the end of the route lives in that one iteration's closure, never on a shared
object, so activation checkpointing, several forwards before one backward, and recomputation all stay exact. State-dict
keys, ``len``, indexing and evaluation do not change.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tread_composer.routing.route import Route, check_routes
from tread_composer.routing.tokens import put_back, sample_kept, take_kept

__all__ = ['Routing', 'RoutedModuleList', 'RoutedSequential', 'apply_tread', 'find_blocks', 'routing_of']

KeptSampler = Callable[[int, int, int], Tensor]


class Routing:
    """What a routed block list reads: its settings, and the tokens kept in the present forward pass.

    ``apply_tread`` makes it. Without further ado each training forward draws its own routes from the global
    generator. To decide yourself, call ``arm`` before the forward pass; to train densely, call ``disarm``.

    Args:
        routes: Disjoint routes in order of depth.
        spans: Their first and last blocks.
        tokens: Name of the block's argument that carries the tokens, and its position in the signature.
        tokens_out: Position of the tokens in a block's tuple output; None where the output is a tensor.
        token_arguments: Names (with positions) of further block arguments with one entry per token, ``[B, N, ...]``.
        float32_after: Run the one block behind each route without autocast, in float32.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        spans: Sequence[tuple[int, int]],
        tokens: tuple[str, int],
        tokens_out: int | None,
        token_arguments: Sequence[tuple[str, int]],
        float32_after: bool,
    ) -> None:
        self.routes, self.spans = tuple(routes), tuple(spans)
        self.tokens, self.tokens_out, self.token_arguments = tokens, tokens_out, tuple(token_arguments)
        self.float32_after = float32_after
        self.kept: tuple[Tensor, ...] | None = None
        self.num_tokens: int | None = None
        self.sampler: KeptSampler | None = self.sample
        # A flag that is only ever written in the traced path: a counter would recompile the graph at every step.
        self.used = False
        self.in_evaluation = False

    def sample(self, route: int, batch_size: int, num_tokens: int) -> Tensor:
        """Kept ids for ``routes[route]`` from the global generator: the default sampler."""
        return sample_kept(batch_size, num_tokens, self.routes[route].selection_rate)

    def arm(
        self,
        kept: Sequence[Tensor] | None = None,
        *,
        num_tokens: int | None = None,
        sampler: KeptSampler | None = None,
    ) -> None:
        """Route the following training forwards.

        Args:
            kept: For each route the kept ids ``[B, K]``, ascending, drawn out of ``num_tokens``.
            num_tokens: Length of the sequences that ``kept`` was drawn for.
            sampler: ``sampler(route, batch_size, num_tokens) -> ids`` for sequences of any other length. It must
                return the same ids when asked again within one step: a recomputed forward does ask again.
        """
        if kept is not None and (num_tokens is None or len(kept) != len(self.routes)):
            raise ValueError(f'arm() wants num_tokens and one tensor of ids for each of the {len(self.routes)} routes')
        self.kept = None if kept is None else tuple(kept)
        self.num_tokens, self.sampler = num_tokens, sampler

    def disarm(self) -> None:
        """Run the following training forwards densely."""
        self.kept = self.num_tokens = self.sampler = None

    @contextlib.contextmanager
    def forced(self, kept: Sequence[Tensor], *, num_tokens: int) -> Iterator[None]:
        """Route each forward pass inside of the context, in evaluation mode too, along these ids.

        Afterwards, and after an exception, all is as it was before: what training was armed with, and density in
        evaluation. How many tokens are kept is up to ``kept``, not to the routes' selection rates.

        Args:
            kept: For each route the kept ids ``[B, K]``, ascending.
            num_tokens: Length of the sequences that they were drawn for.
        """
        before = self.kept, self.num_tokens, self.sampler, self.in_evaluation, self.used
        try:
            self.arm(kept, num_tokens=num_tokens)
            self.in_evaluation = True
            yield
        finally:
            self.kept, self.num_tokens, self.sampler, self.in_evaluation, self.used = before

    @property
    def armed(self) -> bool:
        """Whether the next training forward is routed."""
        return self.kept is not None or self.sampler is not None

    def kept_ids(self, route: int, x_BND: Tensor) -> Tensor:
        """The ids kept on ``routes[route]`` for these tokens.

        Raises:
            ValueError: The ids were drawn for sequences of another length or another number of samples.
        """
        batch_size, num_tokens = x_BND.shape[:2]
        if self.kept is not None and num_tokens == self.num_tokens:
            kept_BK = self.kept[route]
        elif self.sampler is not None:
            kept_BK = self.sampler(route, batch_size, num_tokens).to(x_BND.device)
        else:
            raise ValueError(f'the kept ids were drawn for {self.num_tokens} tokens, the block list got {num_tokens}')
        if kept_BK.shape[0] != batch_size:
            raise ValueError(f'kept ids for {kept_BK.shape[0]} samples, but the block list got {batch_size} samples')
        return kept_BK

    def callables(self, blocks: Sequence[nn.Module]) -> Iterator[Callable[..., Any]]:
        """One callable for each block. Each call of this method is one forward pass with state of its own."""
        after = {end + 1 for _, end in self.spans} if self.float32_after else set()
        at = {index: route for route, (start, end) in enumerate(self.spans) for index in range(start, end + 1)}
        passes = [_Pass(self, route) for route in range(len(self.routes))]
        for index, block in enumerate(blocks):
            call: Callable[..., Any] = _in_float32(block) if index in after else block
            if index in at:
                route = at[index]
                start, end = self.spans[route]
                call = passes[route].around(call, first=index == start, last=index == end)
            yield call


class _Pass:
    """One pass along one route: holds the full sequence and the kept ids between the route's first and last block."""

    def __init__(self, routing: Routing, route: int) -> None:
        self.routing, self.route = routing, route
        self.kept: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """The kept ids ``[B, K]``; the first block of the route has asked for them."""
        assert self.kept is not None
        return self.kept

    def around(self, block: Callable[..., Any], *, first: bool, last: bool) -> Callable[..., Any]:
        if not (first or last or self.routing.token_arguments):
            return block
        return _OnRoute(self, block, first, last)

    def enter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Store the full sequence that the route's first block was given, and settle which tokens are kept."""
        x = _given(args, kwargs, self.routing.tokens)
        if not isinstance(x, Tensor) or x.dim() < 2:
            name = self.routing.tokens[0]
            raise TypeError(f"the block's argument {name!r} should hold tokens [B, N, ...], got {_kind(x)}")
        self.full: Tensor = x
        # Asked once in a pass: a model that checkpoints its own blocks calls this again during the backward pass, when
        # the routing may be armed for another batch.
        if self.kept is None:
            self.kept = self.routing.kept_ids(self.route, x)
        self.routing.used = True

    def leave(self, out: Any) -> Any:
        """The last block's output with the kept tokens back in the full sequence."""
        position, full, kept = self.routing.tokens_out, self.full, self.ids
        if isinstance(out, Tensor):
            return put_back(full, out, kept)
        if not isinstance(out, tuple) or position is None:
            raise TypeError(
                f'the blocks return {_kind(out)}: say where the tokens are, for example tokens_out=0 '
                '(their position in the tuple)'
            )
        return (*out[:position], put_back(full, out[position], kept), *out[position + 1 :])

    def with_kept(self, args: tuple[Any, ...], kwargs: dict[str, Any], argument: tuple[str, int]) -> Any:
        """The call's arguments with one per-token argument reduced to the kept tokens."""
        value = _given(args, kwargs, argument)
        if value is None:
            return args, kwargs
        num_tokens = self.full.shape[1]
        if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[:2] != self.full.shape[:2]:
            raise ValueError(
                f'token argument {argument[0]!r}: expected a tensor of {self.full.shape[0]} samples x {num_tokens} '
                f'tokens, the block got {_kind(value)}; it cannot follow the kept tokens'
            )
        return _replaced(args, kwargs, argument, take_kept(value, self.ids))


class _OnRoute:
    """A block of a route, as the iteration yields it. Whatever is not a call is the block's own."""

    def __init__(self, routed_pass: _Pass, block: Callable[..., Any], first: bool, last: bool) -> None:
        self.routed_pass, self.block, self.first, self.last = routed_pass, block, first, last

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        here = self.routed_pass
        if self.first:
            here.enter(args, kwargs)
            args, kwargs = _replaced(args, kwargs, here.routing.tokens, take_kept(here.full, here.ids))
        for argument in here.routing.token_arguments:
            args, kwargs = here.with_kept(args, kwargs, argument)
        out = self.block(*args, **kwargs)
        return here.leave(out) if self.last else out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)


class _RoutedIteration:
    """Mixin: routed callables while training with an armed route or inside of ``forced``, else the plain blocks."""

    routing: Routing | None = None  # a slice of the list is a plain list: it has no routing

    def __iter__(self) -> Iterator[Any]:
        blocks = list(self._modules.values())  # type: ignore[attr-defined]
        routing, training = self.routing, self.training  # type: ignore[attr-defined]
        if routing is None or not (training or routing.in_evaluation) or not routing.armed:
            return iter(blocks)
        return iter(list(routing.callables(blocks)))


class RoutedModuleList(_RoutedIteration, nn.ModuleList):
    """An ``nn.ModuleList`` that routes."""


class RoutedSequential(_RoutedIteration, nn.Sequential):
    """An ``nn.Sequential`` that routes; its own forward iterates over itself."""


_ROUTED = {nn.ModuleList: RoutedModuleList, nn.Sequential: RoutedSequential}


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The list of blocks to route, with its path.

    Args:
        model: The model to look in.
        path: Where the list is, for example ``'denoiser.blocks'``. If None, the model must hold exactly one outermost
            ``nn.ModuleList`` or ``nn.Sequential`` of at least two children of one class that have parameters.

    Raises:
        ValueError: The path is wrong, or there is no candidate, or more than one.
    """
    kinds = (*_ROUTED, *_ROUTED.values())
    if path is not None:
        try:
            found = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f'blocks: the model has no module {path!r} ({error})') from None
        if type(found) not in kinds:
            raise ValueError(f'blocks: {path!r} is a {type(found).__name__}; a ModuleList or Sequential is needed')
        return path, found  # type: ignore[return-value]
    candidates: dict[str, nn.ModuleList | nn.Sequential] = {}
    for name, module in model.named_modules():
        inside_another = any(name.startswith(f'{other}.') or other == '' for other in candidates)
        if type(module) in kinds and not inside_another and _is_stack(module):
            candidates[name] = module  # type: ignore[assignment]
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    found_text = ', '.join(f'{name!r} ({len(module)} blocks)' for name, module in candidates.items()) or 'none'
    raise ValueError(
        f'blocks: the model must hold exactly one list of blocks to be found without help; found {found_text}. '
        "Name the right one, for example blocks='transformer.blocks'"
    )


def routing_of(model: nn.Module) -> Routing | None:
    """The routing that ``apply_tread`` gave to a block list of ``model``; None if it has none."""
    found = (module.routing for module in model.modules() if isinstance(module, _RoutedIteration))
    return next((routing for routing in found if routing is not None), None)


def apply_tread(
    model: nn.Module,
    routes: Route | Sequence[Route] = Route(),
    *,
    blocks: str | None = None,
    tokens: str | None = None,
    tokens_out: int | None = None,
    token_arguments: Sequence[str] = (),
    float32_after: bool = False,
) -> Routing:
    """Let a random share of the tokens skip the blocks of a route while ``model`` trains (TREAD, arXiv 2501.04765).

    In place, without a new parameter, and without effect on evaluation or on state-dict keys. Applied again with the
    same settings it returns the routing that is there.

    Args:
        model: Any module with a list of blocks that it iterates over.
        routes: One route, or several disjoint ones in order of depth.
        blocks: Path of the block list; found by itself if there is only one candidate (see ``find_blocks``).
        tokens: Name of the block's argument with the tokens ``[B, N, ...]``; the first one if None.
        tokens_out: Position of the tokens where a block returns a tuple.
        token_arguments: Names of further block arguments ``[B, N, ...]`` that belong to their tokens (rotary
            tables, masks): they are reduced to the kept tokens on the route.
        float32_after: Run the block right behind each route in float32, without autocast, as the paper's code does.

    Returns:
        The ``Routing``: arm it with ids of your own, disarm it, or leave it alone.

    Raises:
        ValueError: The list is not found, a route does not fit, an argument's name is unknown, or the model is
            routed already with other settings.
    """
    routes = (routes,) if isinstance(routes, Route) else tuple(routes)
    path, container = find_blocks(model, blocks)
    try:
        spans = check_routes(routes, len(container))
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    first = _bare(container[spans[0][0]])
    signature = list(inspect.signature(first.forward).parameters)
    if not signature:
        raise ValueError(f'{path}: the forward method of {type(first).__name__} takes no argument that could be tokens')
    routing = Routing(
        routes,
        spans,
        _position(signature, tokens or signature[0], 'tokens', first),
        tokens_out,
        [_position(signature, name, 'token_arguments', first) for name in token_arguments],
        float32_after,
    )
    attached = getattr(container, 'routing', None)
    if attached is not None:
        if _settings(attached) != _settings(routing):
            raise ValueError(
                f'{path} is routed already with other settings: {_settings(attached)} there, {_settings(routing)} '
                'now; route a fresh copy of the model'
            )
        return attached
    container.__class__ = _ROUTED[type(container)]
    container.routing = routing  # type: ignore[assignment]
    return routing


def _settings(routing: Routing) -> tuple[Any, ...]:
    how = routing.tokens, routing.tokens_out, routing.token_arguments, routing.float32_after
    return routing.routes, routing.spans, *how


def _bare(block: nn.Module) -> nn.Module:
    """The block inside of torch's wrappers: they take ``*args`` and so hide the names of its arguments."""
    for wrapper in ('_checkpoint_wrapped_module', '_orig_mod', '_fsdp_wrapped_module'):
        block = getattr(block, wrapper, block)
    return block


def _is_stack(module: nn.Module) -> bool:
    children = list(module.children())
    same_class = len({type(child) for child in children}) == 1
    return len(children) > 1 and same_class and any(True for _ in module.parameters())


def _position(signature: list[str], name: str, setting: str, block: nn.Module) -> tuple[str, int]:
    if name not in signature:
        raise ValueError(f'{setting}: {type(block).__name__}.forward has no argument {name!r}, only {signature}')
    return name, signature.index(name)


def _given(args: tuple[Any, ...], kwargs: dict[str, Any], argument: tuple[str, int]) -> Any:
    name, position = argument
    return kwargs[name] if name in kwargs else args[position] if position < len(args) else None


def _replaced(args: tuple[Any, ...], kwargs: dict[str, Any], argument: tuple[str, int], value: Any) -> Any:
    name, position = argument
    if name in kwargs:
        return args, {**kwargs, name: value}
    return (*args[:position], value, *args[position + 1 :]), kwargs


def _in_float32(block: Callable[..., Any]) -> Callable[..., Any]:
    """The block without autocast and with float32 inputs, as the paper's code runs the one behind a route."""

    def widen(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*args: Any, **kwargs: Any) -> Any:
        device = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return block(*(widen(a) for a in args), **{name: widen(a) for name, a in kwargs.items()})

    return call


def _kind(value: Any) -> str:
    return f'a tensor of shape {tuple(value.shape)}' if isinstance(value, Tensor) else f'a {type(value).__name__}'
