"""Bounds of arguments that constructors of Composer and torch take unseen: theirs fail, or train on, in mid-run.

Parts of this project write theirs beside the argument (``core.bounds``).
"""

from typing import Annotated, Any

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from tread_composer.core.bounds import AtLeast1, Positive

__all__ = ['OF_OTHERS', 'SomeOrAll', 'is_length']


def _some_or_all(value: int) -> int:
    if value == -1 or value >= 1:
        return value
    raise PydanticCustomError('rule', '{value} must be at least 1, or -1 for all', {'value': value})


SomeOrAll = Annotated[int, AfterValidator(_some_or_all)]
"""A number of batches or files, as Composer writes it."""

_COUNTS = (
    'batch_log_interval', 'batch_size', 'buffer_size', 'dist_aggregate_batch_interval', 'flush_interval',
    'ghost_batch_size', 'interrupt', 'log_duplicated_metric_every_n_steps', 'max_entries', 'max_logs_per_message',
    'num_attempts', 'num_concurrent_uploads', 'num_images', 'upload_timeout_in_seconds',
)  # fmt: skip
_ABOVE_0 = ('clipping_threshold', 'gamma', 'power', 'rho', 't_mult')
_NOT_BELOW_0 = ('alpha', 'alpha_f', 'alpha_i', 'min_delta', 'momentum', 'weight_decay')
_SHARES = ('drop_rate', 'freeze_level', 'freeze_start', 'keep', 'train_sequence_length_scaling')

OF_OTHERS: dict[str, Any] = {
    **dict.fromkeys(_COUNTS, AtLeast1),
    **dict.fromkeys(_ABOVE_0, Positive),
    **{name: Annotated[float, Ge(0)] for name in _NOT_BELOW_0},
    **{name: Annotated[float, Ge(0), Le(1)] for name in _SHARES},
    # It keeps that many time stamps.
    'window_size': Annotated[int, Ge(1), Le(1_000_000)],
    'num_checkpoints_to_keep': SomeOrAll,
    'train_subset_num_batches': SomeOrAll,
    'eval_subset_num_batches': SomeOrAll,
    'save_num_checkpoints_to_keep': SomeOrAll,
    'scale_schedule_ratio': Annotated[float, Gt(0), Le(1000)],
    'dist_timeout': Annotated[float, Gt(0), Le(10**9)],
}
"""Name of an argument -> its type; whatever class of theirs it belongs to."""

_LENGTHS = ('decay_period', 'half_life', 'patience', 'step_size', 't_0', 't_max')


def is_length(name: str) -> bool:
    """Whether a time argument says how long something lasts, which is never 0; others say when something happens."""
    return name.endswith('interval') or name in _LENGTHS
