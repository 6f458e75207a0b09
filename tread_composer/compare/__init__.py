"""Two or more runs held against each other: at equal steps, FLOPs and time, and at equal quality."""

from tread_composer.compare.comparison import Comparison, compare, format_comparison
from tread_composer.compare.curves import (
    AXES,
    Point,
    SpeedUp,
    Value,
    common_speed_up,
    speed_up,
    value_at,
)
from tread_composer.compare.entries import Curve
from tread_composer.compare.output import write_comparison
from tread_composer.compare.runs import Run, open_run
from tread_composer.metrics.metric import direction

__all__ = [
    'AXES',
    'Comparison',
    'Curve',
    'Point',
    'Run',
    'SpeedUp',
    'Value',
    'common_speed_up',
    'compare',
    'direction',
    'format_comparison',
    'open_run',
    'speed_up',
    'value_at',
    'write_comparison',
]
