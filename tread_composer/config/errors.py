"""What is wrong with a configuration, said so that the reader can put it right: for the loader and its callers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tread_composer.core.errors import UserError

__all__ = ['ConfigError', 'Path', 'Problem', 'dotted', 'refuse']

_MANY = 30  # names; a message that lists more is no help

Path = tuple[str | int, ...]
"""Keys and list positions from the root of the tree to a value."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong."""

    path: Path  # where in the tree; empty for the file as a whole
    text: str  # value, rule and remedy
    choices: tuple[str, ...] = ()  # the names that would have been right there
    source: str = ''  # file or `command line` that the value comes from; looked up from the path if empty


class ConfigError(UserError):
    """The configuration is at fault. The text has one line for each problem: source, dotted path, what to change."""


def refuse(problems: Iterable[Problem], source_of: Callable[[Path], str]) -> None:
    """Raise one ``ConfigError`` that tells all problems, if there are any; by path, so that their order is stable."""
    ordered = sorted(problems, key=lambda problem: ([str(part) for part in problem.path], problem.text))
    lines: list[str] = []
    for index, problem in enumerate(ordered):
        source = problem.source or source_of(problem.path)
        lines.append(': '.join(part for part in (source, dotted(problem.path), problem.text) if part))
        # Once for all problems in a row that have the same names.
        following = [each.choices for each in ordered[index + 1 : index + 2]]
        if problem.choices and problem.choices not in following:
            many = len(problem.choices) > _MANY and 'Did you mean' in problem.text
            lines.append(f'Known here: {"python -m tread_composer schema" if many else ", ".join(problem.choices)}')
    if lines:
        raise ConfigError('\n'.join(lines))


def dotted(path: Path) -> str:
    """``('algorithms', 'tread', 'start')`` as ``algorithms.tread.start``."""
    return '.'.join(map(str, path))
