"""What the user has to put right: the command line prints it without a traceback and exits with 2."""

import difflib
from collections.abc import Sequence

from tread_composer.core.masking import printable, without_secrets

__all__ = ['ResumeError', 'UserError', 'did_you_mean', 'first_line']


class UserError(ValueError):
    """The input is at fault, not the program. The text names the thing, the value, the rule and the remedy."""

    def __str__(self) -> str:
        """The text, for a terminal."""
        return printable(without_secrets(super().__str__()))


class ResumeError(UserError):
    """A checkpoint or a run folder was made with other settings than those of the present run."""

    @classmethod
    def from_differences(cls, source: str, saved: object, requested: object, remedy: str) -> 'ResumeError':
        """The error that lists what differs between two trees of settings, one dotted key a line."""
        lines = [
            f'  {key}: saved {_shown(old)}, now {_shown(new)}'
            for key, old, new in _differences('', saved, requested)
        ]  # fmt: skip
        return cls('\n'.join([f'{source}: was made with other settings than this run has.', *lines, remedy]))


_ABSENT = object()


def _shown(value: object) -> str:
    return 'absent' if value is _ABSENT else repr(value)


def _differences(path: str, saved: object, requested: object) -> list[tuple[str, object, object]]:
    if isinstance(saved, dict) and isinstance(requested, dict):
        rows = []
        for key in dict.fromkeys([*saved, *requested]):
            inner = f'{path}.{key}' if path else str(key)
            rows += _differences(inner, saved.get(key, _ABSENT), requested.get(key, _ABSENT))
        return rows
    return [] if saved == requested else [(path or 'settings', saved, requested)]


def first_line(error: BaseException) -> str:
    """What an error of a library says, without its long tail; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def did_you_mean(name: object, names: Sequence[str]) -> str:
    """``" Did you mean 'x'?"`` for the nearest of the names, or nothing where none is near."""
    text = str(name).lower()
    by_lower = {candidate.lower(): candidate for candidate in names}
    # A part of a name, whole: 'rate' for 'selection_rate'.
    holding = [candidate for candidate in by_lower if text in candidate.split('_')]
    if len(holding) == 1:
        return f' Did you mean {by_lower[holding[0]]!r}?'
    # Half-alike is enough: the shortened name of a logger ('wandb' for 'wandb_logger') must still be found.
    near = difflib.get_close_matches(text, by_lower, n=1, cutoff=0.5)
    return f' Did you mean {by_lower[near[0]]!r}?' if near else ''
