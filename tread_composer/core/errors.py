"""What the user has to put right: the command line prints it without a traceback and exits with 2."""

__all__ = ['ResumeError', 'UserError']


class UserError(ValueError):
    """The input is at fault, not the program. The text names the thing, the value, the rule and the remedy."""


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
