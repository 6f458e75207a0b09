"""Options of a command, written once: the fields of a request, whose types carry bounds and spellings.

``cli.flags`` makes the command line of them. Only the standard library and ``annotated_types`` are imported here and by
requests, so that words are checked before torch is loaded.
"""

import dataclasses
import inspect
import math
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union

from annotated_types import Ge, Gt, Le, Lt

from tread_composer.core.errors import UserError

__all__ = [
    'Checked', 'Device', 'Flag', 'GuidedChannels', 'Weights', 'argument_docs', 'check_bounds', 'check_request',
    'unwrapped',
]  # fmt: skip

_BOUNDS: Mapping[type, tuple[str, str, Callable[[Any, Any], bool]]] = {
    Ge: ('ge', 'at least', operator.ge),
    Gt: ('gt', 'above', operator.gt),
    Le: ('le', 'at most', operator.le),
    Lt: ('lt', 'below', operator.lt),
}
_NUMBERS: Mapping[Any, tuple[type, str]] = {int: (Integral, 'a whole number'), float: (Real, 'a number')}


class Flag:
    """What a field's name and type do not say of its flag; stands within ``Annotated``.

    Args:
        names: Spellings. The first is shown, the others are earlier ones that are still taken. One without dashes is
            what stands for a positional argument in the usage.
        metavar: Stands for the value in the help.
        choices: The names to choose from; ``package.module:Class`` and ``posthoc:0.13`` are taken too.
        entries: Keys of a mapping that have a flag each, beside the one for ``KEY=VALUE``.
        fixed: Fields of a nested request that have no flag in this command, with their values.
    """

    def __init__(
        self,
        *names: str,
        metavar: str | None = None,
        choices: Sequence[str] = (),
        entries: Sequence[str] = (),
        fixed: Mapping[str, Any] | None = None,
    ) -> None:
        self.names, self.metavar, self.choices, self.entries = names, metavar, choices, entries
        self.fixed = dict(fixed or {})


Device = Literal['cuda', 'cpu']
GuidedChannels = Literal['all', 'first3']
Weights = Annotated[str, Flag(choices=('ema', 'raw', 'posthoc:WIDTH'))]


def unwrapped(hint: Any) -> tuple[Any, list[Any]]:
    """A type without ``Annotated`` and ``| None``, and what stands within ``Annotated``; None for ``| None``."""
    marks: list[Any] = []
    while True:
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is Annotated:
            hint = arguments[0]
            marks += arguments[1:]
        elif origin in (Union, types.UnionType) and type(None) in arguments:
            hint = Union[tuple(kind for kind in arguments if kind is not type(None))]  # noqa: UP007
            marks.append(None)
        else:
            return hint, marks


def argument_docs(target: Callable[..., Any]) -> dict[str, str]:
    """The text of each argument in the docstring of a function, or of a class, its constructor and its bases.

    Where that says "Args beside those of" other functions or classes of its module, theirs too.
    """
    owners: list[Any] = [target]
    if inspect.isclass(target):  # what a class says of an argument goes before what its base says
        owners = [owner for base in reversed(inspect.getmro(target)) for owner in (base, base.__init__)]
    texts: dict[str, str] = {}
    for owner in owners:
        text = inspect.getdoc(owner) or ''
        block = re.search(r'^(?:Args|Attributes)(?: beside those of (.*))?:\n((?:[ \t]+.*\n?|\n)+)', text, re.MULTILINE)
        if block is not None:
            for name in re.findall(r'``(\w+)``', block[1] or ''):
                texts |= argument_docs(getattr(sys.modules[owner.__module__], name))
            entries = re.findall(r'^    (\w+)(?: \(.*?\))?:((?:.*)(?:\n(?:      .*|(?=\n)))*)', block[2], re.MULTILINE)
            texts |= {name: body.partition('\n\n')[0] for name, body in entries}
    return texts


class Checked:
    """Base of a dataclass: what its types say of its fields holds for an object made in Python too.

    Raises:
        UserError: A number is none or is out of its field's bounds, or a value is none of the choices.
    """

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            if entry.init:
                check_bounds(f'{type(self).__name__}: {entry.name}', hints[entry.name], getattr(self, entry.name))


def check_request(request: object) -> None:
    """Refuse a dataclass with a number out of its field's bounds; ``UserError`` names flag, number and bounds."""
    for name, hint in typing.get_type_hints(type(request), include_extras=True).items():
        spellings = [mark.names[0] for mark in unwrapped(hint)[1] if isinstance(mark, Flag) and mark.names]
        check_bounds(spellings[0] if spellings else f'--{name.replace("_", "-")}', hint, getattr(request, name))


def check_bounds(flag: str, hint: Any, value: Any) -> None:
    """Refuse a value that is none of the choices of its type, or no number within the bounds; in a tuple, each.

    The ``UserError`` names the flag, the value and the rule.
    """
    kind, marks = unwrapped(hint)
    if value is None and None in marks:
        return
    elements = typing.get_args(kind)
    if isinstance(value, tuple) and elements[-1:] == (...,):
        for item in value:
            check_bounds(flag, elements[0], item)
    if typing.get_origin(kind) is Literal and value not in elements:
        raise UserError(f'{flag}: {value!r}; choose of {", ".join(map(str, elements))}')
    number, words = _NUMBERS.get(kind, (object, ''))
    # True is an int in Python.
    if not isinstance(value, number) or (words and isinstance(value, bool)):
        raise UserError(f'{flag}: {value!r} must be {words}')
    if not isinstance(value, Real):
        return
    bounds = [(_BOUNDS[type(mark)], mark) for mark in marks if type(mark) in _BOUNDS]
    is_within = all(holds(value, getattr(mark, name)) for (name, _, holds), mark in bounds)
    if not is_within or not math.isfinite(value):
        rules = [f'{words} {getattr(mark, name)}' for (name, words, _), mark in bounds]
        raise UserError(f'{flag}: {value} must be {" and ".join(rules) or "a finite number"}')
