"""Pages of ``docs/`` as their readers walk them: each command in turn, with small things in place of large ones."""

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.runs import ROOT, call_here, launch_here
from tread_composer.cli import main
from tread_composer.cli.convert import convert_main, verify_main

_PROGRAMS = {'convert_imagenet': convert_main, 'verify': verify_main}


def code_blocks(page: str, language: str = '') -> list[str]:
    """The fenced blocks of a page of ``docs/``, in order."""
    text = (ROOT / 'docs' / page).read_text()
    blocks = re.findall(r'^```(\w*)\n(.*?)^```', text, re.DOTALL | re.MULTILINE)
    return [code for name, code in blocks if name == language]


def shrunk(text: str, replaced: Mapping[str, str]) -> str:
    """A text with small things in place of large ones, each of which must be in it, so the two cannot drift apart."""
    for large, small in replaced.items():
        assert large in text, f'{large!r} is no longer on the page'
        text = text.replace(large, small)
    return text


def commands(page: str, replaced: Mapping[str, str]) -> list[list[str]]:
    """The words of each command that a page shows, from top to bottom."""
    text = re.sub(r'\s*\\\n\s*', ' ', ''.join(code_blocks(page)))
    lines = shrunk(text, replaced).splitlines()
    return [shlex.split(line) for line in lines if line.startswith(('python', 'composer'))]


def verb(words: Sequence[str]) -> str:
    """What a command does: ``train``, ``sample``, ..., or the name of its program."""
    name = _without_launcher(words)[0]
    return words[3] if name == '-m' else Path(name).stem


def walk(folder: Path, words: Sequence[str], more: Sequence[str] = ()) -> str:
    """Run a command and ``more`` words of a test, in this process and on one rank; returns what it printed."""
    name, *rest = [*_without_launcher(words), *more]
    if verb(words) == 'train':
        done = launch_here(folder, *rest)
    else:
        program, rest = (main, rest[1:]) if name == '-m' else (_PROGRAMS[verb(words)], rest)
        done = call_here(folder, program, rest)
    assert done.returncode == 0, f'{shlex.join(words)}\n{done.stdout}{done.stderr}'
    return done.stdout + done.stderr


def _without_launcher(words: Sequence[str]) -> Sequence[str]:
    return words[3:] if words[:2] == ['composer', '-n'] else words[1:]
