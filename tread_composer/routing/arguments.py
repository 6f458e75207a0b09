"""The arguments of a block's call: which of them hold tokens, and how those that belong to tokens follow them.

Shapes: B samples, N tokens, K kept tokens, D width. Kept ids are ``[B, K]``, or ``[1, K]`` where all samples share one
route.
"""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from tread_composer.routing.tokens import take_along

__all__ = [
    'Argument', 'Call', 'ListSettings', 'RoutingError', 'TokenArgument', 'TokenArguments', 'parse_token_arguments'
]  # fmt: skip

# What torch, a model's own checks and Python raise on a tensor of an unexpected shape.
FAILURES = RuntimeError, ValueError, IndexError, TypeError, AssertionError

TokenArguments = Sequence[str] | Mapping[str, Any]
"""Names of arguments ``[B, N, ...]``, or a mapping from names to the dimensions that count tokens.

``{'mask': -1}``, ``{'mask': [-2, -1]}``, or with options: ``{'rope': {'dims': 0, 'after': 'text'}}`` where the entries
of other tokens come first, as many as the argument ``text`` has tokens (``[B, M, ...]``), or a number; ``'before'``
where they come last; ``'without_first': 1`` where the class token has no entry; ``'members': [0]`` where one member of
a tuple follows, or keys of a dict.
"""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a block's call, by position and by name."""


class RoutingError(RuntimeError):
    """The model cannot be routed soundly as it is; the text says why, and what would help."""


class Argument(NamedTuple):
    """An argument of a block's ``forward``: it may be passed by position or by name."""

    name: str
    position: int

    def value(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value in a call; None if it was not passed."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Call:
        """The same call with another value for this argument, which it must have."""
        if self.name in kwargs:  # new containers: the call's own belong to the model
            return args, {**kwargs, self.name: value}
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


@dataclasses.dataclass(frozen=True)
class TokenArgument:
    """An argument with one entry for each token: a tensor, or a tuple, list or dict of tensors, all treated alike."""

    argument: Argument
    dims: tuple[int, ...]  # those that count tokens; if 0 is one, the tensor has none for the samples
    after: int | Argument  # number of entries before those of the tokens, or the argument whose tokens they belong to
    before: int | Argument  # likewise, behind those of the tokens
    without_first: int  # leading tokens that have no entry: a rotary table without the class token's row
    members: tuple[int | str, ...] | None  # places in a tuple, or keys of a dict, that follow; None: all of them

    def __str__(self) -> str:
        options = {name: getattr(self, name) for name in _OPTIONS if name == 'dims' or getattr(self, name)}
        named = {name: value.name if isinstance(value, Argument) else value for name, value in options.items()}
        return f'{self.argument.name}: {named}'

    def kept(self, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, int], kept: Tensor) -> Any:
        """The argument's value for the kept tokens of a sequence of B samples x N tokens; None if the call lacks it.

        Raises:
            RoutingError: The argument's shape contradicts the setting.
        """
        value = self.argument.value(args, kwargs)
        if value is None:
            return None
        # Entries of other tokens in the same table, such as text before the image: they all stay.
        around = self._count(self.after, args, kwargs), self._count(self.before, args, kwargs)
        if type(value) not in (tuple, list, dict):
            if self.members is not None:
                raise self._fault(f'{kind(value)} has no members')
            return self._taken(value, shape, around, kept)
        members: dict[Any, Any] = dict(value) if type(value) is dict else dict(enumerate(value))
        follow = members.keys() if self.members is None else self.members
        missing = sorted(str(key) for key in follow if key not in members)
        if missing:
            raise self._fault(f'members {missing} are not in {kind(value)}')
        for key in follow:
            if members[key] is not None:
                note = f' (member {key!r}; where not all follow, name those that do: members)'
                members[key] = self._taken(members[key], shape, around, kept, note)
        return members if type(value) is dict else type(value)(members.values())

    def _count(self, neighbour: int | Argument, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """How many entries stand on one side of those of the tokens."""
        if isinstance(neighbour, int):
            return neighbour
        value = neighbour.value(args, kwargs)
        if not isinstance(value, Tensor) or value.dim() < 2:
            raise self._fault(
                f'its entries stand beside those of {neighbour.name!r}, which should be a tensor [B, M, ...]; the '
                f'block got {kind(value)}'
            )
        return value.shape[1]

    def _taken(
        self, value: Any, shape: tuple[int, int], around: tuple[int, int], kept: Tensor, note: str = ''
    ) -> Tensor:
        """One tensor for the kept tokens; ``note`` says in an error which member it is."""
        length = shape[1] + sum(around) - self.without_first  # entries: N tokens and what stands beside them
        rank = value.dim() if isinstance(value, Tensor) else 0
        # take_along counts dimensions from the front.
        dims = [dim + rank if dim < 0 else dim for dim in self.dims]
        fits = all(0 <= dim < rank and value.shape[dim] == length for dim in dims)
        if not fits or (0 not in dims and value.shape[0] not in (1, shape[0])):  # 1: for all samples alike
            raise self._fault(self._mismatch(value, shape, around, note))
        if 0 in dims and kept.shape[0] != 1:  # [N, ...] and another route for each sample
            raise self._fault(f'{kind(value)} {_NO_SAMPLES}')
        if self.without_first:  # those tokens are always kept, so they are the first ids
            kept = kept[:, self.without_first :] - self.without_first
        for dim in dims:  # a mask [B, 1, N, N] loses rows, then columns
            value = take_along(value, kept, dim, *around)
        return value

    def _mismatch(self, value: Any, shape: tuple[int, int], around: tuple[int, int], note: str) -> str:
        samples, tokens = shape
        expected, remedy = f'a tensor of {samples} samples x {tokens} tokens', ''
        if self.dims != (1,) or any(around) or self.without_first:
            sides = zip(('after', 'before'), around, strict=True)
            beside = ''.join(f' {side} {count} others' for side, count in sides if count)
            places = ' and '.join(map(str, self.dims))
            expected = f'a tensor with {tokens - self.without_first} tokens{beside} in dimension {places}'
        # Batch dimensions are counted from the front, the others from the back, as users write them.
        sizes = enumerate(value.shape if self.dims == (1,) and isinstance(value, Tensor) else ())
        at = [dim - value.dim() if dim > 1 else dim for dim, size in sizes if size == tokens]
        if at:
            setting = f'token_arguments={{{self.argument.name!r}: {at}}}{", shared=True" if 0 in at else ""}'
            remedy = f'. Is it dimension {at} that counts tokens? Say {setting}'
        return f'expected {expected}, the block got {kind(value)}{note}; it cannot follow the kept tokens{remedy}'

    def _fault(self, text: str) -> RoutingError:
        return RoutingError(f'token argument {self.argument.name!r}: {text}')


@dataclasses.dataclass(frozen=True)
class ListSettings:
    """How the blocks of one list take and return their tokens."""

    path: str  # dotted name of the list within the model
    depth: int  # number of its blocks
    tokens: Argument  # carries the tokens [B, N, D]
    tokens_out: int | None  # position of the tokens in a block's tuple output; None where the output is a tensor
    token_arguments: tuple[TokenArgument, ...]  # further arguments with one entry per token
    always_keep: tuple[int, int]  # number of leading and of trailing tokens that never skip


def parse_token_arguments(settings: TokenArguments, block: nn.Module, *, shared: bool) -> tuple[TokenArgument, ...]:
    """The setting ``token_arguments`` for blocks like this one.

    Raises:
        ValueError: A name, a dimension or an option is wrong, or a tensor without samples follows several routes.
    """
    if isinstance(settings, str):
        raise ValueError(f'token_arguments: {settings!r} is one name; write a list, [{settings!r}]')
    if not isinstance(settings, (Mapping, Sequence)):
        raise ValueError(f'token_arguments: {settings!r} is no list of names and no mapping from names to dimensions')
    mapping = settings if isinstance(settings, Mapping) else dict.fromkeys(settings, 1)  # names alone: [B, N, ...]
    parsed = tuple(_parsed(name, written, block) for name, written in mapping.items())
    for argument in parsed:
        if 0 in argument.dims and not shared:
            name = argument.argument.name
            raise ValueError(f'token_arguments: {name!r} counts tokens in dimension 0, so it {_NO_SAMPLES}')
    return parsed


_NO_SAMPLES = (
    'has no dimension for the samples and cannot follow another route for each of them; give them one: shared=True'
)
_OPTIONS = 'dims', 'after', 'before', 'without_first', 'members'
_FORM = (
    "write the dimension(s) that count tokens, for example -1 or [-2, -1], or {'dims': 0, 'after': 'text'} with any of "
    "'after', 'before', 'without_first', 'members'"
)


def _parsed(name: str, written: Any, block: nn.Module) -> TokenArgument:
    """One entry of the setting."""
    setting = f'token_arguments: {name!r}'
    argument = find_argument(block, name, 'token_arguments')
    options = dict(written) if isinstance(written, Mapping) else {'dims': written}
    if 'dims' not in options or set(options) - set(_OPTIONS):
        raise ValueError(f'{setting}: {options!r} is not understood; {_FORM}')
    dims = (options['dims'],) if isinstance(options['dims'], int) else options['dims']
    is_list = isinstance(dims, Sequence) and not isinstance(dims, str)
    if not (is_list and dims and all(type(dim) is int for dim in dims) and len(set(dims)) == len(dims)):
        raise ValueError(f'{setting}: {options["dims"]!r} names no dimensions; {_FORM}')
    for name in ('after', 'before', 'without_first'):
        count = options.setdefault(name, 0)
        if isinstance(count, str) and name != 'without_first':
            options[name] = find_argument(block, count, f'{setting}: {name}')
        elif type(count) is not int or count < 0:  # by type: True is an int
            alternative = '' if name == 'without_first' else " or an argument's name"
            raise ValueError(f'{setting}: {name}: {count!r} is not a number of tokens{alternative}')
    members = options.get('members')
    if members is not None and (not isinstance(members, (list, tuple)) or not members):
        raise ValueError(f'{setting}: members: {members!r} is no list of places or keys')
    return TokenArgument(argument, **{**options, 'dims': tuple(dims), 'members': members and tuple(members)})


def find_argument(block: nn.Module, name: str | None, setting: str) -> Argument:
    """An argument of the block's ``forward`` by its name, or ``ValueError``; the first one if that is None."""
    signature = list(inspect.signature(block.forward).parameters)
    if not signature:
        raise ValueError(f'{setting}: {type(block).__name__}.forward takes no argument that could be tokens')
    name = signature[0] if name is None else name
    if name not in signature:
        raise ValueError(f'{setting}: {type(block).__name__}.forward has no argument {name!r}, only {signature}')
    return Argument(name, signature.index(name))


def bare(block: nn.Module) -> nn.Module:
    """The block inside of torch's wrappers: they take ``*args`` and so hide the names of its arguments."""
    # Of activation checkpointing, torch.compile and FSDP1; FSDP2 wraps nothing.
    for wrapper in ('_checkpoint_wrapped_module', '_orig_mod', '_fsdp_wrapped_module'):
        block = getattr(block, wrapper, block)
    return block


def output_tokens(out: Any, position: int | None) -> Tensor:
    """The tokens in a block's output: the output itself, or the tensor at ``position`` of a tuple; else an error."""
    if isinstance(out, Tensor):
        return out
    if not isinstance(out, tuple) or position is None:
        raise RoutingError(
            f'the blocks return {kind(out)}: say where the tokens are, for example tokens_out=0 '
            '(their position in the tuple)'
        )
    if position >= len(out):
        raise RoutingError(f'tokens_out: {position} is outside of the tuple of {len(out)} that the blocks return')
    return out[position]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested mappings, tuples and lists, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for member in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(member)


def kind(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        return f'a tensor of shape {tuple(value.shape)}'
    return 'nothing' if value is None else f'a {type(value).__name__}'
