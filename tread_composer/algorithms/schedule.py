"""Composer time strings as switches: has this point of the run been reached?"""

from composer.core import State, Time, TimeUnit

__all__ = ['Window', 'parse_time', 'reached']

_UNITS = (TimeUnit.DURATION, TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SAMPLE)


def parse_time(value: str | Time | None, setting: str) -> Time | None:
    """A time string such as ``'0.92dur'``, ``'300000ba'`` or ``'60ep'`` as Composer's ``Time``; None is "not set".

    ``ValueError``, which names ``setting``, if it is none, or in a unit that cannot be used here.
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
    if time.value < 0 or (time.unit == TimeUnit.DURATION and time.value > 1):
        share = ", and dur is a share of the run, from '0dur' to '1dur'" if time.unit == TimeUnit.DURATION else ''
        raise ValueError(f'{setting}: {value!r} is no time within a run: they count from 0{share}')
    return time


def reached(time: Time, state: State) -> bool:
    """Whether ``time`` has passed at the present batch; ``ValueError`` for a share of a run without an end."""
    if time.unit != TimeUnit.DURATION:
        return state.timestamp.get(time.unit) >= time
    elapsed = state.get_elapsed_duration()
    if elapsed is None:
        raise ValueError(f'{time} is a share of the run, and the run has no max_duration')
    return elapsed >= time


class Window:
    """A part of a run, from ``start_time`` until before ``end_time``; None stands for the run's own begin and end.

    ``ValueError`` if one is no time string, or the window is empty, which ``fault`` puts into words.
    """

    def __init__(self, start_time: str | None, end_time: str | None, fault: str) -> None:
        self._start, self._end = parse_time(start_time, 'start_time'), parse_time(end_time, 'end_time')
        # Times in different units compare only once the run's length is known.
        if self._start and self._end and self._start.unit == self._end.unit and self._start >= self._end:
            raise ValueError(f'from start_time {start_time!r} to end_time {end_time!r} {fault}')

    def holds(self, state: State) -> bool:
        """Whether the present batch lies in it."""
        begun = self._start is None or reached(self._start, state)
        return begun and not (self._end is not None and reached(self._end, state))
