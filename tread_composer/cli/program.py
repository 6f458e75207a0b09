"""A program: functions become its commands, and what the user has to put right becomes one message.

Exit codes: 0 done; 2 the input is at fault (one message on each node, no traceback); 1 a fault of ours (traceback).
"""

import errno
import inspect
import itertools
import os
import select
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tread_composer import __version__
from tread_composer.cli.flags import Parser, Typed, add_flags, call
from tread_composer.core.errors import UserError
from tread_composer.core.launch import prepare_rank, refused

__all__ = ['run_program']

Command = Callable[..., int | None]

_ROOM = 'The disk is full. What is finished is kept: make room, then run the same command again'
_FILES = (
    'This process may open no more files. What is finished is kept: ulimit -n 65536, then run the same command again'
)
_REMEDIES = {errno.ENOSPC: _ROOM, errno.EDQUOT: _ROOM, errno.EMFILE: _FILES, errno.ENFILE: _FILES}


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
