"""What is wrong with a configuration, said so that the reader can put it right: for the loader and its callers."""

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tread_composer.core.errors import UserError

__all__ = ['ConfigError', 'Path', 'Problem', 'did_you_mean', 'dotted']

_MANY = 30

Path = tuple[str | int, ...]
"""Keys and list positions from the root of the tree to a value."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Args:
        path: Where in the tree; empty for the file as a whole.
        text: Value, rule and remedy.
        known: The names that would have been right there.
        source: File or ``command line`` that the value comes from; looked up from the path if empty.
    """

    path: Path
    text: str
    known: tuple[str, ...] = ()
    source: str = ''


class ConfigError(UserError):
    """The configuration is at fault. The text has one line for each problem: source, dotted path, what to change."""

    @classmethod
    def from_problems(
        cls, problems: Iterable[Problem], source_of: Callable[[Path], str] = lambda path: ''
    ) -> 'ConfigError':
        """One error that tells all problems, sorted by path so that the order is stable."""
        ordered = sorted(problems, key=lambda problem: ([str(part) for part in problem.path], problem.text))
        lines: list[str] = []
        for index, problem in enumerate(ordered):
            source = problem.source or source_of(problem.path)
            lines.append(': '.join(part for part in (source, dotted(problem.path), problem.text) if part))
            following = ordered[index + 1] if index + 1 < len(ordered) else None
            if problem.known and (following is None or following.known != problem.known):
                many = len(problem.known) > _MANY and 'Did you mean' in problem.text
                known = 'python -m tread_composer schema' if many else ', '.join(problem.known)
                lines.append(f'Known here: {known}')
        return cls('\n'.join(lines))


def dotted(path: Path) -> str:
    """``('algorithms', 'tread', 'start')`` as ``algorithms.tread.start``."""
    return '.'.join(str(part) for part in path)


def did_you_mean(name: object, known: Sequence[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of the known names, or nothing where none is near."""
    text = str(name).lower()
    by_lower = {candidate.lower(): candidate for candidate in known}
    # A part of a name, whole: 'rate' for 'selection_rate'.
    holding = [candidate for candidate in by_lower if text in candidate.split('_')]
    if len(holding) == 1:
        return f' Did you mean {by_lower[holding[0]]!r}?'
    # Half-alike is enough: the shortened name of a logger ('wandb' for 'wandb_logger') must still be found.
    near = difflib.get_close_matches(text, by_lower, n=1, cutoff=0.5)
    return f' Did you mean {by_lower[near[0]]!r}?' if near else ''
