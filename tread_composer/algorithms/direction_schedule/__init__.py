"""The window of FasterDiT's velocity-direction loss as a Composer algorithm."""

from tread_composer.algorithms.direction_schedule.direction_schedule import DirectionSchedule

__all__ = ['DirectionSchedule']
