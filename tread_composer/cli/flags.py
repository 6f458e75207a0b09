"""The command line of a function: a flag for each of its arguments, and for each field of a request that it takes.

Type, bounds and default stand where the argument does, its help in the docstring there. Only what was typed reaches the
function, so a default exists once.
"""

import argparse
import collections.abc
import dataclasses
import functools
import inspect
import re
import shlex
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from tread_composer.core.errors import UserError, did_you_mean
from tread_composer.core.named import is_reference
from tread_composer.core.options import Flag, argument_docs, check_bounds, unwrapped

__all__ = ['Parser', 'Typed', 'add_flags', 'call']

_FLAGLESS = Flag()
_METAVARS = {int: 'N', float: 'X', Path: 'PATH'}  # texts: the flag's own name


@dataclass(frozen=True)
class Typed:
    """How a command was called, for a function with an argument of this type; ``given`` are its flags, undashed."""

    program: str
    words: Sequence[str]
    given: frozenset[str]

    def __str__(self) -> str:
        return f'{self.program} {shlex.join(self.words)}'


class Parser(argparse.ArgumentParser):
    """Wrong words are refused as everything else is: with several ranks, by one message."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """See ``argparse``; the words are kept for `error`."""
        self._words = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse, with the name that was probably meant."""
        if 'arguments are required' in message:  # perhaps given, with a slip in the name
            options = [word.partition('=')[0] for word in self._words if word.startswith('--')]
            known = ' '.join(['', *self._option_string_actions])  # argparse takes beginnings of names too
            unknown = [option for option in options if f' {option}' not in known]
            message += f'; unrecognized arguments: {" ".join(unknown)}' if unknown else ''
        # argparse says only in words what was wrong.
        choice = re.search(r"invalid choice: '(.+?)' \(choose from (.*)\)", message)
        foreign = re.search(r'unrecognized arguments: (--\w[\w-]*)', message)
        hint = ''
        if choice:
            hint = did_you_mean(choice[1], re.findall(r'[\w-]+', choice[2]))
        elif foreign:
            hint = did_you_mean(foreign[1], [name for name in self._option_string_actions if name.startswith('--')])
        usage = f'{self.format_usage().rstrip()} (--help lists them)'
        raise UserError(f'{usage}\n{message}{"." if hint else ""}{hint}')


class _Choices(tuple[str, ...]):
    """``argparse`` shows what is in it, and takes names with a colon too: ``package.module:Class``, ``posthoc:0.1``."""

    def __contains__(self, word: object) -> bool:
        return super().__contains__(word) or is_reference(word)


class _Argument:
    """One argument of a function, or field of a request: its type, default and line in the docstring, and its flag."""

    def __init__(self, name: str, hint: Any, default: Any, text: str) -> None:
        self.name, self.hint, self.default, self.text = name, hint, default, text
        self.kind, marks = unwrapped(hint)
        self.flag = next((mark for mark in marks if isinstance(mark, Flag)), _FLAGLESS)
        self.names = self.flag.names or (_dashed(name),)  # the spellings
        self.is_positional = not self.names[0].startswith('-')
        # Where argparse puts it. Arguments of two requests with the same flag share it.
        self.key = name if self.is_positional else self.names[0].strip('-').replace('-', '_')


def add_flags(parser: argparse.ArgumentParser, target: Callable[..., Any], fixed: Collection[str] = ()) -> None:
    """One flag for each argument of a function or field of a request, but for those that are ``fixed``."""
    for argument in _arguments(target):
        if argument.name in fixed or any(action.dest == argument.key for action in parser._actions):
            continue
        if dataclasses.is_dataclass(argument.kind) and argument.kind is not Typed:
            add_flags(parser, argument.kind, argument.flag.fixed)  # type: ignore[arg-type]
        elif argument.kind is not Typed:
            _add(parser, argument)


def _add(parser: argparse.ArgumentParser, argument: _Argument) -> None:
    required = argument.default is inspect.Parameter.empty
    # Suppressed: what was not typed is not among the words, and the function's own default counts.
    settings = {'default': argparse.SUPPRESS, 'help': _help(argument), **_reading(argument.hint)}
    if argument.is_positional:
        optional, repeated = ('?', '*') if not required else (None, '+')
        settings |= {'nargs': repeated if 'nargs' in settings else optional, 'metavar': argument.names[0]}
        parser.add_argument(argument.key, **settings)
        return
    if argument.default is True:  # --no-mirror
        settings['action'] = 'store_false'
    shown, *earlier = argument.names
    parser.add_argument(shown, dest=argument.key, required=required, **settings)
    if earlier:
        parser.add_argument(*earlier, dest=argument.key, **{**settings, 'help': argparse.SUPPRESS})
    for entry in argument.flag.entries:
        text = f'the same as {shown} {entry}=...'
        parser.add_argument(_dashed(entry), type=yaml.safe_load, metavar='VALUE', default=argparse.SUPPRESS, help=text)


def _reading(hint: Any, outer: Flag = _FLAGLESS) -> dict[str, Any]:
    """How argparse reads a type; what ``outer`` says counts for the elements of a tuple."""
    kind, marks = unwrapped(hint)
    flag = next((mark for mark in marks if isinstance(mark, Flag)), outer)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    shown = {'metavar': flag.metavar} if flag.metavar else {}
    if kind is bool:
        return {'action': 'store_true'}  # of a flag that is not typed nothing is stored
    if origin is collections.abc.Mapping:
        return {'nargs': '+', 'metavar': 'KEY=VALUE'}
    if origin is tuple and arguments[-1] is Ellipsis:
        return {'nargs': '+', **_reading(arguments[0], flag)}
    if origin is tuple:  # of fixed length, in one word: 0.1:0.9
        return {'type': functools.partial(_numbers, arguments, flag.metavar), **shown}
    if origin is Literal:
        return {'choices': arguments, **shown}
    if flag.choices:
        return {'choices': _Choices(flag.choices), **shown}
    return {'type': kind, 'metavar': _METAVARS[kind], **shown} if kind in _METAVARS else shown


def _numbers(kinds: Sequence[type], form: str | None, text: str) -> tuple[Any, ...] | None:
    """Numbers with colons or commas between them."""
    if text == 'none':
        return None
    try:
        return tuple(kind(part) for kind, part in zip(kinds, re.split('[:,]', text), strict=True))
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is not {form}, or none') from None


def call(
    target: Callable[..., Any], words: Mapping[str, Any], typed: Typed, fixed: Mapping[str, Any] | None = None
) -> Any:
    """Call a function, or make a request, with the words that argparse has read; ``fixed`` are further arguments.

    Raises:
        UserError: A number is out of bounds, a setting has no ``=``, or ``target`` refuses.
    """
    values: dict[str, Any] = dict(fixed or {})
    for argument in _arguments(target):
        if argument.name in values:  # fixed
            continue
        if argument.kind is Typed:
            values[argument.name] = typed
        elif dataclasses.is_dataclass(argument.kind):
            values[argument.name] = call(argument.kind, words, typed, argument.flag.fixed)  # type: ignore[arg-type]
        else:
            value = _value(argument, words)
            if value is not argparse.SUPPRESS:
                values[argument.name] = value
                check_bounds(argument.names[0], argument.hint, value)
    try:
        return target(**values)
    except UserError:
        raise
    except ValueError as error:
        if not inspect.isclass(target):
            raise  # a fault of ours
        raise UserError(str(error)) from None


def _value(argument: _Argument, words: Mapping[str, Any]) -> Any:
    value = words.get(argument.key, argparse.SUPPRESS)
    origin = typing.get_origin(argument.kind)
    entries = {entry: words[entry] for entry in argument.flag.entries if entry in words}
    if origin is collections.abc.Mapping and (entries or value is not argparse.SUPPRESS):
        pairs = [] if value is argparse.SUPPRESS else value
        return {**_pairs(pairs, 'settings' if argument.is_positional else argument.names[0]), **entries}
    return tuple(value) if isinstance(value, list) else value  # requests are frozen


def _pairs(words: Sequence[str], flag: str) -> dict[str, Any]:
    wrong = [word for word in words if '=' not in word]
    if wrong:
        raise UserError(f'{flag}: {wrong[0]!r} is not of the form key=value')
    from tread_composer.config.document import parse_yaml  # here: slow to import

    try:
        return {key: parse_yaml(value) for key, _, value in (word.partition('=') for word in words)}
    except yaml.YAMLError as error:
        raise UserError(f'{flag}: {" ".join(words)}: {" ".join(str(error).split())}') from None


def _arguments(target: Callable[..., Any]) -> Iterator[_Argument]:
    hints, texts = typing.get_type_hints(target, include_extras=True), argument_docs(target)
    for name, parameter in inspect.signature(target).parameters.items():
        yield _Argument(name, hints[name], parameter.default, texts.get(name, ''))


def _help(argument: _Argument) -> str:
    text = ' '.join(argument.text.replace('``', '').split()).replace('%', '%%')
    default = argument.default
    if isinstance(default, tuple) and default and None not in default:
        default = ' '.join(map(str, default))
    is_shown = isinstance(default, (int, float, str, Path)) and not isinstance(default, bool) and default != ''
    return f'{text} ({default})' if is_shown else text


def _dashed(name: str) -> str:
    return f'--{name.replace("_", "-")}'
