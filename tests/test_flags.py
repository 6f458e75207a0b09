"""Flags are read off functions and requests: names, types, bounds, help, and what is refused."""

import contextlib
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Lt

from tread_composer.cli.commands import COMMANDS
from tread_composer.cli.convert import convert_images, import_stored
from tread_composer.cli.flags import Parser, Typed, add_flags, run_program
from tread_composer.core.errors import UserError
from tread_composer.core.options import Flag, check_request

CALLS: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Args:
        path: Where it is.
        count: How many.
        overrides: Settings.
    """

    path: Annotated[str, Flag('PATH')]
    count: Annotated[int, Ge(1), Flag('--count', '--samples')] = 3
    shares: tuple[Annotated[float, Ge(0), Lt(1)], ...] = ()
    span: Annotated[tuple[int, float] | None, Flag(metavar='LOW:HIGH')] = None
    kind: Literal['one', 'two'] = 'one'
    mirror: Annotated[bool, Flag('--no-mirror')] = True
    settings: Annotated[Mapping[str, Any], Flag(entries=('rate',))] = field(default_factory=dict)
    overrides: Annotated[Mapping[str, Any], Flag('key=value')] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_request(self)
        if self.kind == 'two' and not self.mirror:
            raise ValueError('two need a mirror')


def command(typed: Typed, request: Request, quick: bool = False) -> None:
    """Do it.

    Args:
        quick: Or not.

    Example: here
    """
    CALLS.append({'typed': typed, 'request': request, 'quick': quick})


def run(*words: str) -> dict[str, Any]:
    assert run_program(command, 'it', words) == 0
    return CALLS.pop()


def test_words_become_the_request_and_only_what_is_typed_is_given():
    words = 'here a=1 --count 5 --span 1:2.5 --settings x=[1] --rate 0.5 b=c --quick'
    call = run(*words.split())
    expected = Request('here', 5, span=(1, 2.5), settings={'x': [1], 'rate': 0.5}, overrides={'a': 1, 'b': 'c'})
    assert call['request'] == expected and call['quick']
    assert call['typed'].given == {'path', 'count', 'span', 'settings', 'rate', 'overrides', 'quick'}
    assert run('here', '--samples', '4', '--no-mirror')['request'] == Request('here', 4, mirror=False)
    assert str(run('a b')['typed']) == "it 'a b'"


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (
            [],
            'usage: it PATH [key=value ...] [options] (--help lists them)\nthe following arguments are required: PATH',
        ),
        (['--cuont'], "required: PATH; unrecognized arguments: --cuont. Did you mean '--count'?"),
        (['x', '--cuont', '3'], "unrecognized arguments: --cuont 3. Did you mean '--count'?"),
        (['x', '--a=1'], 'unrecognized arguments: --a=1; a setting is written key=value, without dashes'),
        (['x', '--kind', 'tow'], "(choose from 'one', 'two'). Did you mean 'two'?"),
        (['x', '--count', 'many'], "argument --count: invalid int value: 'many'"),
        (['x', '--count', '0'], '--count: 0 must be at least 1'),
        (['x', '--shares', '0.5', '1'], '--shares: 1.0 must be at least 0 and below 1'),
        (['x', '--span', '1'], "argument --span: '1' is not LOW:HIGH, or none"),
        (['x', '--settings', 'y'], "--settings: 'y' is not of the form key=value"),
        (['x', '--settings', 'rate=[1'], '--settings: rate=[1: while parsing'),
        (['x', '--kind', 'two', '--no-mirror'], 'two need a mirror'),
    ],
)
def test_what_is_wrong_is_refused_in_one_message(words, message, capsys):
    assert run_program(command, 'it', words) == 2
    printed = capsys.readouterr().err
    assert message in printed.replace('choose from one, two', "choose from 'one', 'two'") and 'Traceback' not in printed
    assert not CALLS


def test_a_request_that_is_made_in_python_keeps_the_same_bounds():
    for message, changes in {
        "--kind: 'three'; choose of one, two": {'kind': 'three'},
        '--count: 0 must be at least 1': {'count': 0},
    }.items():
        with pytest.raises(UserError, match=message):
            Request('x', **changes)


def test_no_word_at_all_is_refused_and_a_setting_belongs_to_some_commands_only(cli):
    assert 'required: command' in cli.refusal()
    assert 'unrecognized arguments: a=b' in cli.refusal('schema', 'a=b')


@pytest.mark.parametrize('function', [*COMMANDS, convert_images, import_stored], ids=lambda function: function.__name__)
def test_every_option_of_every_command_is_explained(function):
    parser = Parser()
    add_flags(parser, function)
    assert not [action.dest for action in parser._actions if not action.help]


def open_files() -> None:
    """Open more files than a process may."""
    with contextlib.ExitStack() as files:
        while True:
            files.enter_context(open(os.devnull))


def test_the_limit_of_open_files_is_for_the_user_to_raise(capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        assert run_program(open_files, 'it', []) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    printed = capsys.readouterr().err
    assert 'ulimit -n 65536, then run the same command again' in printed and 'Traceback' not in printed
