"""The arguments of a block's call: which of them hold tokens, and how those that belong to tokens follow them.

Shapes: B samples, N tokens, K kept tokens, D width. Kept ids are ``[B, K]``, or ``[1, K]`` where all samples share one
route.
"""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tread_composer.routing.tokens import take_along

__all__ = [
    'Argument',
    'RoutingError',
    'TokenArgument',
    'TokenArguments',
    'bare',
    'find_argument',
    'kind',
    'output_tokens',
    'parse_token_arguments',
]

TokenArguments = Sequence[str] | Mapping[str, Any]
"""Names of arguments ``[B, N, ...]``, or a mapping from names to the dimensions that count tokens.

``{'mask': -1}``, ``{'mask': [-2, -1]}``, or ``{'rope': {'dims': 0, 'after': 'text'}}`` where the entries of other
tokens come first: as many as the argument ``text`` has tokens (``[B, M, ...]``), or a number.
"""


class RoutingError(RuntimeError):
    """The model cannot be routed soundly as it is; the text says why, and what would help."""


class Argument(NamedTuple):
    """An argument of a block's ``forward``: it may be given by position or by name."""

    name: str
    position: int

    def given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The value in a call; None if the call leaves it away."""
        if self.name in kwargs:
            return kwargs[self.name]
        return args[self.position] if self.position < len(args) else None

    def replaced(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """Arguments of the same call with another value for this one, which it must have."""
        if self.name in kwargs:
            return args, {**kwargs, self.name: value}
        return (*args[: self.position], value, *args[self.position + 1 :]), kwargs


@dataclasses.dataclass(frozen=True)
class TokenArgument:
    """An argument with one entry for each token: a tensor, or a tuple or list of tensors that are treated alike.

    Args:
        argument: Which one.
        dims: The dimensions that count tokens. If dimension 0 is one, the tensor has none for the samples.
        after: What precedes the tokens' entries: so many entries, or one for each token of another argument.
    """

    argument: Argument
    dims: tuple[int, ...] = (1,)
    after: int | Argument = 0

    def kept(self, args: tuple[Any, ...], kwargs: dict[str, Any], shape: tuple[int, int], kept: Tensor) -> Any:
        """The argument's value for the kept tokens; None if the call does not have it.

        Args:
            args: Of the call, by position.
            kwargs: Of the call, by name.
            shape: B and N of the full sequence.
            kept: Kept ids.

        Raises:
            RoutingError: The argument's shape is not what was said of it.
        """
        value = self.argument.given(args, kwargs)
        return None if value is None else self._taken(value, shape, self._leading(args, kwargs), kept)

    def _leading(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        if isinstance(self.after, int):
            return self.after
        other = self.after.given(args, kwargs)
        if not isinstance(other, Tensor) or other.dim() < 2:
            raise RoutingError(
                f'token argument {self.argument.name!r}: its entries come after those of {self.after.name!r}, which '
                f'should be a tensor [B, M, ...]; the block got {kind(other)}'
            )
        return other.shape[1]

    def _taken(self, value: Any, shape: tuple[int, int], leading: int, kept: Tensor) -> Any:
        if type(value) in (tuple, list):
            return type(value)(self._taken(one, shape, leading, kept) for one in value)
        if not isinstance(value, Tensor):
            raise self._mismatch(value, shape, leading)
        dims = [dim + value.dim() if dim < 0 else dim for dim in self.dims]
        length = shape[1] + leading
        if not all(0 <= dim < value.dim() and value.shape[dim] == length for dim in dims):
            raise self._mismatch(value, shape, leading)
        if 0 in dims and kept.shape[0] != 1:
            raise RoutingError(
                f'token argument {self.argument.name!r}: {kind(value)} has no dimension for the samples, so it cannot '
                'follow another route for each of them; give them one: shared=True'
            )
        if 0 not in dims and value.shape[0] not in (1, shape[0]):
            raise self._mismatch(value, shape, leading)
        for dim in dims:
            value = take_along(value, kept, dim, leading)
        return value

    def _mismatch(self, value: Any, shape: tuple[int, int], leading: int) -> RoutingError:
        name, (batch, tokens) = self.argument.name, shape
        said = f'a tensor of {batch} samples x {tokens} tokens'
        if self.dims != (1,) or leading:
            before = f' after {leading} others' if leading else ''
            said = f'a tensor with {tokens} tokens{before} in dimension {" and ".join(map(str, self.dims))}'
        remedy = ''
        if self.dims == (1,) and isinstance(value, Tensor) and value.dim() > 0:
            at = [dim - value.dim() if dim > 1 else dim for dim, size in enumerate(value.shape) if size == tokens]
            if at:
                shared = ', shared=True' if 0 in at else ''
                remedy = f'. Is it dimension {at} that counts tokens? Say token_arguments={{{name!r}: {at}}}{shared}'
        return RoutingError(
            f'token argument {name!r}: expected {said}, the block got {kind(value)}; it cannot follow the kept '
            f'tokens{remedy}'
        )


def parse_token_arguments(settings: TokenArguments, block: nn.Module, *, shared: bool) -> tuple[TokenArgument, ...]:
    """The setting ``token_arguments`` for blocks like this one.

    Raises:
        ValueError: A name, a dimension or an ``after`` is wrong, or a tensor without samples follows several routes.
    """
    if isinstance(settings, str):
        raise ValueError(f'token_arguments: {settings!r} is one name; write a list, [{settings!r}]')
    mapping = settings if isinstance(settings, Mapping) else dict.fromkeys(settings, 1)
    found = []
    for name, how in mapping.items():
        argument = find_argument(block, name, 'token_arguments')
        dims, after = _dims_and_after(name, how, block)
        if 0 in dims and not shared:
            raise ValueError(
                f'token_arguments: {name!r} counts tokens in dimension 0, so it has none for the samples and cannot '
                'follow another route for each of them; give them one: shared=True'
            )
        found.append(TokenArgument(argument, dims, after))
    return tuple(found)


def _dims_and_after(name: str, how: Any, block: nn.Module) -> tuple[tuple[int, ...], int | Argument]:
    form = "write the dimension(s) that count tokens, for example -1 or [-2, -1], or {'dims': 0, 'after': 'text'}"
    after: Any = 0
    if isinstance(how, Mapping):
        if set(how) - {'dims', 'after'} or 'dims' not in how:
            raise ValueError(f'token_arguments: {name!r}: {dict(how)!r} is not understood; {form}')
        how, after = how['dims'], how.get('after', 0)
    dims = (how,) if isinstance(how, int) else how
    whole = isinstance(dims, Sequence) and not isinstance(dims, str)
    if not (whole and dims and all(type(dim) is int for dim in dims) and len(set(dims)) == len(dims)):
        raise ValueError(f'token_arguments: {name!r}: {how!r} names no dimensions; {form}')
    if isinstance(after, str):
        after = find_argument(block, after, f'token_arguments: {name!r}: after')
    elif type(after) is not int or after < 0:
        raise ValueError(f"token_arguments: {name!r}: after: {after!r} is neither a count nor an argument's name")
    return tuple(dims), after


def find_argument(block: nn.Module, name: str | None, setting: str) -> Argument:
    """An argument of the block's ``forward`` by its name; the first one if that is None.

    Raises:
        ValueError: There is none of that name.
    """
    signature = list(inspect.signature(block.forward).parameters)
    if not signature:
        raise ValueError(f'{setting}: {type(block).__name__}.forward takes no argument that could be tokens')
    name = signature[0] if name is None else name
    if name not in signature:
        raise ValueError(f'{setting}: {type(block).__name__}.forward has no argument {name!r}, only {signature}')
    return Argument(name, signature.index(name))


def bare(block: nn.Module) -> nn.Module:
    """The block inside of torch's wrappers: they take ``*args`` and so hide the names of its arguments."""
    for wrapper in ('_checkpoint_wrapped_module', '_orig_mod', '_fsdp_wrapped_module'):
        block = getattr(block, wrapper, block)
    return block


def output_tokens(out: Any, position: int | None) -> Tensor:
    """The tokens in a block's output: the output itself, or the tensor at ``position`` of a tuple.

    Raises:
        RoutingError: It is no tensor, and the position is not given or outside of the tuple.
    """
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


def kind(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, torch.Tensor):
        return f'a tensor of shape {tuple(value.shape)}'
    return 'nothing' if value is None else f'a {type(value).__name__}'
