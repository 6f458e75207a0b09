"""The surgery behind TREAD: a model's own block list is given a class whose iterator routes (see ``lists``).

The blocks stay as they are and know nothing. State-dict keys, ``len``, indexing and evaluation do not change.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from tread_composer.routing.arguments import (
    Argument,
    ListSettings,
    TokenArguments,
    bare,
    find_argument,
    parse_token_arguments,
)
from tread_composer.routing.lists import ROUTED, BlockList, RoutedList, explain_failures, stop_explaining
from tread_composer.routing.route import Route, check_routes, parts_within
from tread_composer.routing.routing import Routing, RoutingSettings
from tread_composer.routing.taps import Slot, Taps
from tread_composer.routing.tokens import AlwaysKeep, both_ends

__all__ = ['apply_tread', 'find_blocks', 'remove_tread', 'routing_of', 'tap_blocks']

Blocks = str | Sequence[str] | Mapping[str, Mapping[str, Any] | None] | None
"""Path of a block list; several; or a mapping from paths to what differs from the other settings in that list."""

_PER_LIST = 'tokens', 'tokens_out', 'token_arguments', 'always_keep'


def find_blocks(model: nn.Module, path: str | None = None) -> tuple[str, BlockList]:
    """The list of blocks to route, with its path.

    Without a ``path``, such as ``'denoiser.blocks'``, the model must hold exactly one outermost ``nn.ModuleList`` or
    ``nn.Sequential`` of at least two children of one class that have parameters.

    Raises:
        ValueError: The path is wrong, the list is empty, or there is no candidate, or more than one.
    """
    kinds = (*ROUTED, *ROUTED.values())  # exactly these: a subclass may iterate in its own way
    if path is not None:
        try:
            container = model.get_submodule(path)
        except AttributeError as error:
            raise ValueError(f'blocks: the model has no module {path!r} ({error})') from None
        if type(container) not in kinds:
            raise ValueError(f'blocks: {path!r} is a {type(container).__name__}; a ModuleList or Sequential is needed')
        if not len(container):  # type: ignore[arg-type]
            raise ValueError(f'blocks: {path!r} is empty; name a list that has blocks')
        return path, container  # type: ignore[return-value]
    candidates: dict[str, BlockList] = {}
    for name, module in model.named_modules():
        nested = any(name.startswith(f'{outer}.') or outer == '' for outer in candidates)
        children = list(module.children())
        # An MLP as nn.Sequential is no stack of blocks.
        alike = len(children) > 1 and len({type(child) for child in children}) == 1
        if type(module) in kinds and not nested and alike and next(module.parameters(), None) is not None:
            candidates[name] = module  # type: ignore[assignment]
    if len(candidates) == 1:
        return next(iter(candidates.items()))
    listing = ', '.join(f'{name!r} ({len(module)} blocks)' for name, module in candidates.items()) or 'none'
    raise ValueError(
        f'blocks: the model must hold exactly one list of blocks to be found without help; found {listing}. '
        "Name the right one, for example blocks='transformer.blocks', or several, in the order in which the model runs "
        'them'
    )


def routing_of(model: nn.Module) -> Routing | None:
    """The routing that ``apply_tread`` gave to the block lists of ``model``; None if it has none.

    Raises:
        ValueError: Parts of the model were routed one by one: ask for each part.
    """
    routed = {name: part.routing for name, part in _routed(model).items() if part.routing is not None}
    routings = {id(routing): routing for routing in routed.values()}  # several lists may share one
    if len(routings) > 1:
        raise ValueError(
            f'the model has {len(routings)} routings, of {", ".join(map(repr, routed))}: ask for the routing of one '
            'part, or route these lists together: blocks=[...]'
        )
    return next(iter(routings.values()), None)


def apply_tread(
    model: nn.Module,
    routes: Route | Sequence[Route] = Route(),
    *,
    blocks: Blocks = None,
    tokens: str | None = None,
    tokens_out: int | None = None,
    token_arguments: TokenArguments | None = None,
    always_keep: AlwaysKeep = 0,
    shared: bool = False,
    ordered: bool = False,
    float32_after: bool = False,
) -> Routing:
    """Let a random share of the tokens skip the blocks of a route while ``model`` trains (TREAD, arXiv 2501.04765).

    In place, without a new parameter, and without effect on evaluation or on state-dict keys. Applied again with the
    same settings it returns the routing that is there. Some training forwards (the first, second, 16th and 128th that
    are not compiled) also try whether each block of a route treats its tokens as a set, and raise ``RoutingError`` if
    not (see ``probe``); nothing else is changed by it.

    Args:
        model: Any module with a list of blocks that it iterates over.
        routes: One route, or several disjoint ones in order of depth.
        blocks: Path of the block list; found by itself if there is only one candidate (see ``find_blocks``). Several
            paths, in the order in which the model runs the lists, are counted through like one list, and a route may
            go from one into the next: its tokens are put back in between, and without armed ids each list draws its
            own. A mapping from paths to settings says what differs in a list: ``{'joint': None,
            'single': {'always_keep': 77, 'token_arguments': {'rope': 0}}}``; the same tokens of the rest are kept.
        tokens: Name of the block's argument with the tokens ``[B, N, D]``; the first one if None.
        tokens_out: Position of the tokens where a block returns a tuple, counted from 0.
        token_arguments: Further block arguments that belong to their tokens (rotary tables, masks): they are reduced
            to the kept tokens on the route (forms: ``routing.TokenArguments``). Those without a dimension for the
            samples only with ``shared``. If None, what the module around the list declares in an attribute
            ``token_arguments``, as our backbones do; else nothing.
        always_keep: Number of leading tokens (class token, text) that never skip, or a pair: of leading and of trailing
            ones. ``selection_rate`` is a share of the rest: ``always_keep + rest - int(rest * selection_rate)`` of
            ``N = always_keep + rest`` are kept.
        shared: One route for all samples of a batch.
        ordered: The blocks need their tokens in ascending order and nothing else of position, as a scan does: skip
            the check of each block.
        float32_after: Run the block right behind each route in float32, without autocast, as the paper's code does.

    Returns:
        The ``Routing``: arm it with ids of your own, disarm it, or leave it alone.

    Raises:
        ValueError: A list is not found, a route does not fit, an argument's name is unknown, or the model is
            routed already with other settings.
    """
    routes = (routes,) if isinstance(routes, Route) else tuple(routes)
    lists = _lists(model, blocks)
    try:
        spans = check_routes(routes, sum(map(len, lists.values())))
    except ValueError as error:
        raise ValueError(f'{" + ".join(lists)}: {error}') from None
    common = dict(zip(_PER_LIST, (tokens, tokens_out, token_arguments, always_keep), strict=True))
    per_list: list[ListSettings] = []
    for path, container in lists.items():
        exceptions = (blocks.get(path) or {}) if isinstance(blocks, Mapping) else {}
        if not isinstance(exceptions, Mapping) or set(exceptions) - set(_PER_LIST):
            raise ValueError(f'blocks: {path!r}: {exceptions!r}: expected settings of one list: {", ".join(_PER_LIST)}')
        offset = sum(part.depth for part in per_list)  # of the list's first block, counted through all lists
        parts = parts_within(spans, offset, len(container))
        # The first block on a route stands for all; None if no route comes here.
        block = bare(container[parts[0][1]]) if parts else None
        per_list.append(_list_settings(model, path, len(container), block, {**common, **exceptions}, shared=shared))
    settings = RoutingSettings(tuple(per_list), routes, tuple(spans), shared, ordered, float32_after)
    attached = routing_of(model)
    if attached is not None:
        _refuse_differences(model, attached, settings)
        return attached
    _refuse_copies(model, lists)
    routing = Routing(settings)
    for number, container in enumerate(lists.values()):
        # A tapped list has its class already.
        container.__class__ = ROUTED.get(type(container), type(container))
        container.routing, container.list_number = routing, number  # type: ignore[assignment]
    explain_failures(model)
    return routing


def remove_tread(model: nn.Module) -> None:
    """Give the plain model back: its block lists become what they were before ``apply_tread``.

    Parameters, optimizer state and checkpoints do not notice. Nothing happens to a model that is not routed.
    """
    for container in _routed(model).values():
        container.release(route=True)
    stop_explaining(model)


def tap_blocks(
    model: nn.Module,
    at: int | Sequence[int],
    *,
    blocks: str | Sequence[str] | None = None,
    tokens_out: int | None = None,
    evaluation: bool = False,
) -> Taps:
    """Hand out what blocks returned in a forward pass, for losses on features: alignment, auxiliary heads.

    On any model that walks over its list of blocks, routed or not, before or after ``apply_tread``; several taps stand
    beside each other. Exact whatever recomputes or compiles, and with several forward passes before one backward pass:
    read after each of them, tokens ``[B, K, D]`` with their kept ids ``[B, K]``, None where these are all.

    Args:
        model: Any module with a list of blocks that it iterates over.
        at: Numbers of blocks from 0; negative counts from the end. What block ``k`` returned is the stream behind
            ``k + 1`` blocks.
        blocks: Path of the block list, or of several that are counted through; the routed ones, or the only candidate
            (see ``find_blocks``), if None.
        tokens_out: Position of the tokens where a block returns a tuple; that of the route if None.
        evaluation: Also in evaluation mode: for heads that sampling uses, or a teacher.

    Raises:
        ValueError: The list is not found, or there is no such block.
    """
    lists: dict[str, Any]
    if blocks is not None or routing_of(model) is None:
        lists = dict(_lists(model, blocks))
    else:  # in the order in which the route goes through them; its own paths may begin at a part of this model
        routed = [(name, part) for name, part in _routed(model).items() if not part.is_slice]
        lists = dict(sorted(routed, key=lambda item: item[1].list_number))
    _refuse_copies(model, lists)
    _check_position(tokens_out)
    numbers = [at] if isinstance(at, int) else list(at)
    # Blocks of several lists are counted through.
    places = [(container, index) for container in lists.values() for index in range(len(container))]
    for number in numbers:
        if type(number) is not int or not -len(places) <= number < len(places):
            raise ValueError(f'at: {number!r} is no block; there are {len(places)}: 0 to {len(places) - 1}')
    if not numbers or len({number % len(places) for number in numbers}) < len(numbers):
        raise ValueError(f'at: {numbers} names no block, or one of them twice')
    slots: dict[int, Slot] = {}
    for number in numbers:
        container, index = places[number]
        container.__class__ = ROUTED.get(type(container), type(container))
        position = tokens_out
        if position is None and container.routing is not None:  # the route knows it
            position = container.routing.settings.lists[container.list_number].tokens_out
        slots[number] = Slot(index, position, evaluation=evaluation)
        container.slots = (*container.slots, slots[number])

    def remove() -> None:
        for container in lists.values():
            if isinstance(container, RoutedList):
                container.release(slots=slots.values())

    return Taps(slots, remove)


def _routed(model: nn.Module) -> dict[str, RoutedList]:
    """Routed and tapped lists by their paths, kept slices among them."""
    return {name: module for name, module in model.named_modules() if isinstance(module, RoutedList)}


def _refuse_differences(model: nn.Module, attached: Routing, settings: RoutingSettings) -> None:
    """Refuse settings that are not those of the routing that the model already has."""
    pairs = zip(attached.settings.words().items(), settings.words().values(), strict=True)
    differences = [f'{name}: {old!r}, requested: {new!r}' for (name, old), new in pairs if old != new]
    if differences:
        names = ', '.join(name for name, part in _routed(model).items() if part.routing is attached)
        raise ValueError(
            f'{names} is routed already with other settings ({"; ".join(differences)}). Call '
            'remove_tread(model) first, and route several lists of one model together: blocks=[...]'
        )


def _refuse_copies(model: nn.Module, lists: Mapping[str, Any]) -> None:
    """Refuse a model that holds the same blocks in another list too: walked there, they would not route."""
    blocks = {id(block): path for path, container in lists.items() for block in container.children()}
    named = {id(container) for container in lists.values()}
    named |= {id(part) for part in _routed(model).values() if part.is_slice}  # which routes with its list
    plain = set(vars(nn.Module()))  # torch's own attributes: the module's children stand in one of them
    copies: dict[str, str] = {}
    for name, module in model.named_modules():
        is_list = isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)) and id(module) not in named
        held: dict[str, Iterable[Any]] = {name: module.children()} if is_list else {}
        for attribute, value in vars(module).items():
            if attribute not in plain and isinstance(value, (list, tuple, dict)):
                held[f'{name}.{attribute}'.lstrip('.')] = value.values() if isinstance(value, dict) else value
        for place, members in held.items():
            copies.update((place, blocks[id(member)]) for member in members if id(member) in blocks)
    if copies:
        raise ValueError(
            f'blocks: {", ".join(f"{name!r} holds blocks of {path!r}" for name, path in copies.items())}. Walked there '
            'they would run on all tokens, unnoticed: keep one list of the blocks in the model, and take slices of it '
            'in the forward pass'
        )


def _list_settings(
    model: nn.Module, path: str, depth: int, block: nn.Module | None, settings: Mapping[str, Any], *, shared: bool
) -> ListSettings:
    """The settings of one list, resolved against ``block``, its first on a route; None if no route comes here."""
    ends, tokens_out = both_ends(settings['always_keep']), settings['tokens_out']
    _check_position(tokens_out)
    if block is None:
        return ListSettings(path, depth, Argument('', 0), tokens_out, (), ends)
    written = settings['token_arguments']
    if written is None:  # what the module around the list declares, as our backbones do
        written = getattr(model.get_submodule(path.rpartition('.')[0]), 'token_arguments', ())
        written = written if isinstance(written, (tuple, list, Mapping)) else ()
    arguments = parse_token_arguments(written, block, shared=shared)
    for follower in arguments:
        if follower.without_first > ends[0]:
            raise ValueError(
                f'token_arguments: {follower.argument.name!r} has no entry for the first {follower.without_first} '
                f'tokens, so these must never skip: always_keep={follower.without_first}'
            )
    return ListSettings(path, depth, find_argument(block, settings['tokens'], 'tokens'), tokens_out, arguments, ends)


def _check_position(tokens_out: int | None) -> None:
    if tokens_out is not None and (type(tokens_out) is not int or tokens_out < 0):
        raise ValueError(f'tokens_out: {tokens_out!r} is no position in a tuple; count from 0')


def _lists(model: nn.Module, blocks: Blocks) -> dict[str, BlockList]:
    paths = [blocks] if blocks is None or isinstance(blocks, str) else list(blocks)
    lists = dict(find_blocks(model, path) for path in paths)
    if not paths or len({id(container) for container in lists.values()}) < len(paths):
        raise ValueError(f'blocks: {paths} names no list, or one of them twice')
    return lists
