"""The command line of a function: a flag for each of its arguments, and for each field of a request that it takes.

Type, bounds and default stand where the argument does, its help in the docstring there. Only what was typed reaches the
function, so a default exists once. What the user has to put right becomes one message.

Exit codes: 0 done; 2 the input is at fault (one message on each node, no traceback); 1 a fault of ours (traceback).
"""

import argparse
import collections.abc
import dataclasses
import errno
import functools
import inspect
import itertools
import os
import re
import select
import shlex
import signal
import sys
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from tread_composer import __version__
from tread_composer.core.errors import UserError, did_you_mean
from tread_composer.core.launch import lost_connection, prepare_rank, refused
from tread_composer.core.named import is_reference
from tread_composer.core.options import Flag, argument_docs, check_bounds, unwrapped

__all__ = ['Parser', 'Typed', 'add_flags', 'call', 'run_program']

Command = Callable[..., int | None]

_ROOM = 'The disk is full. What is finished is kept: make room, then run the same command again'
_FILES = (
    'This process may open no more files. What is finished is kept: ulimit -n 65536, then run the same command again'
)
_REMEDIES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EMFILE: _FILES, errno.ENFILE: _FILES}

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

    ``UserError`` if a number is out of bounds, a setting has no ``=``, or ``target`` refuses.
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
    except ValueError as error:
        if isinstance(error, UserError) or not inspect.isclass(target):
            raise  # the latter is a fault of ours
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


def run_program(
    command: Command | Mapping[str, Command], program: str, words: Sequence[str] | None, description: str = ''
) -> int:
    """Run what the words say (those of this process if None); returns the exit code.

    A command is a function, or several by their names. The first paragraph of a function's docstring says what it does,
    the last one is an ``Example: ``. It may return an exit code.
    """
    try:
        prepare_rank()
        code = _run(command, program, sys.argv[1:] if words is None else list(words), description)
        sys.stdout.flush()  # here, where a reader that is gone can still be handled
        return code or 0
    except UserError as error:
        return refused(error)
    except RuntimeError as error:
        lost = lost_connection(error)
        if lost is None:
            raise
        return refused(lost)
    except OSError as error:
        if error.errno in _REMEDIES:
            return refused(UserError(f'{error}. {_REMEDIES[error.errno]}'))
        if not isinstance(error, BrokenPipeError):
            raise
        if words is not None or not _is_unread(sys.stdout.fileno()):
            raise
        # The reader has enough: `plan x.yaml | head`.
        # The interpreter flushes at its exit once more, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _is_unread(descriptor: int) -> bool:
    """Whether nobody reads this pipe any more: the error may come from a pipe of another library."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors and hang-ups are reported unasked
    return bool(poll.poll(0))


def _run(command: Command | Mapping[str, Command], program: str, words: list[str], description: str) -> int | None:
    if callable(command):
        parser = Parser(**_texts(command, program))
        _complete(parser, command)
    else:
        usage, example = f'{program} COMMAND ... [options]', f'example: {program} {next(iter(command))} --help'
        parser = Parser(prog=program, usage=usage, description=description, epilog=example)
        parser.add_argument('--version', action='version', version=f'tread_composer {__version__}')
        commands = parser.add_subparsers(required=True, metavar='command')
        for name, function in command.items():
            summary = (inspect.getdoc(function) or '').partition('\n')[0]
            _complete(commands.add_parser(name, help=summary, **_texts(function, f'{program} {name}')), function)
    # argparse stops collecting `key=value` at the first option; what stands behind one is picked up here.
    options, leftover = parser.parse_known_args(words)
    typed_values = vars(options)
    function, used = typed_values.pop('_function'), typed_values.pop('_parser')
    foreign = [word for word in leftover if word.startswith('-') or '=' not in word]
    if foreign or (leftover and not any(action.dest == 'overrides' for action in used._actions)):
        hint = '; a setting is written key=value, without dashes' if any('=' in word for word in foreign) else ''
        used.error(f'unrecognized arguments: {" ".join(foreign or leftover)}{hint}')
    if leftover:
        typed_values['overrides'] = [*typed_values.get('overrides', []), *leftover]
    return call(function, typed_values, Typed(program, words, frozenset(typed_values)))


def _texts(function: Command, program: str) -> dict[str, Any]:
    paragraphs = [' '.join(paragraph.split()) for paragraph in (inspect.getdoc(function) or '').split('\n\n')]
    prose = itertools.takewhile(lambda paragraph: not paragraph.startswith(('Args:', 'Example:')), paragraphs)
    example = paragraphs[-1].removeprefix('Example: ')
    return {'prog': program, 'description': ' '.join(prose), 'epilog': f'example: {program} {example}'}


def _complete(parser: Parser, function: Command) -> None:
    add_flags(parser, function)
    parser.set_defaults(_function=function, _parser=parser)
    # Short: what must be given, and what needs no flag. The help has the rest.
    words = [parser.prog]
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if action.required and action.option_strings:
            words.append(f'{action.option_strings[0]} {action.metavar or action.dest.upper()}')
        elif not action.option_strings:
            text = f'{action.metavar} ...' if action.nargs in ('+', '*') else f'{action.metavar}'
            words.append(text if action.required else f'[{text}]')
    parser.usage = ' '.join([*words, '[options]'])
