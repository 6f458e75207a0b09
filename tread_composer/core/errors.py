"""What the user has to put right: the command line prints it without a traceback and exits with 2."""

__all__ = ['ResumeError', 'UserError']


class UserError(ValueError):
    """The input is at fault, not the program. The text names the thing, the value, the rule and the remedy."""


class ResumeError(UserError):
    """A checkpoint or a run folder was made with other settings than those of the present run."""

    @classmethod
    def from_differences(cls, where: str, saved: object, now: object, remedy: str) -> 'ResumeError':
        """The error that lists what differs between two trees of settings, one dotted key a line."""
        lines = [
            f'  {key}: saved {_shown(old)}, now {_shown(new)}'
            for key, old, new in _differences('', saved, now)
        ]  # fmt: skip
        return cls('\n'.join([f'{where}: was made with other settings than this run has.', *lines, remedy]))


_ABSENT = object()


def _shown(value: object) -> str:
    return 'absent' if value is _ABSENT else repr(value)


def _differences(path: str, saved: object, now: object) -> list[tuple[str, object, object]]:
    if isinstance(saved, dict) and isinstance(now, dict):
        rows = []
        for key in dict.fromkeys([*saved, *now]):
            inner = f'{path}.{key}' if path else str(key)
            rows += _differences(inner, saved.get(key, _ABSENT), now.get(key, _ABSENT))
        return rows
    return [] if saved == now else [(path or 'settings', saved, now)]
