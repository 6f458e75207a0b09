"""Composer time strings as switches: has this point of the run been reached?"""

from composer.core import State, Time, TimeUnit

__all__ = ['parse_time', 'reached']

_UNITS = (TimeUnit.DURATION, TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE)


def parse_time(value: str | Time | None, setting: str) -> Time | None:
    """A time string such as ``'0.92dur'``, ``'300000ba'`` or ``'60ep'`` as Composer's ``Time``.

    Args:
        value: The time, or None for "not set".
        setting: Its name, for the error.

    Raises:
        ValueError: It is no time string, or one in a unit that cannot be used here.
    """
    if value is None:
        return None
    try:
        time = value if isinstance(value, Time) else Time.from_timestring(value)
    except (TypeError, ValueError):
        raise ValueError(
            f"{setting}: {value!r} is not a time; write for example '0.92dur', '300000ba' or '60ep'"
        ) from None
    if time.unit not in _UNITS:
        raise ValueError(
            f'{setting}: {value!r} is in {time.unit.value}; use dur, ba, ep or sp (a resumed run could not '
            'repeat wall-clock time, and images have no token count)'
        )
    return time


def reached(time: Time, state: State) -> bool:
    """Whether ``time`` has passed at the present batch.

    Raises:
        ValueError: A share of the run (``dur``) was asked for and the run has no ``max_duration``.
    """
    if time.unit != TimeUnit.DURATION:
        return state.timestamp.get(time.unit) >= time
    elapsed = state.get_elapsed_duration()
    if elapsed is None:
        raise ValueError(f'{time} is a share of the run, and the run has no max_duration')
    return elapsed >= time
