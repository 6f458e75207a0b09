"""A constructor's signature as a strict schema.

``signature_model`` reads names from ``inspect.signature`` and types from the annotations: what YAML can write is
checked, what it cannot write (functions, modules, open files) is refused by name with that reason.
"""

import collections.abc
import dataclasses
import enum
import functools
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union

from annotated_types import Ge, Gt, Le
from composer.core import Time, TimeUnit
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, create_model
from pydantic_core import PydanticCustomError

from tread_composer.core.bounds import AtLeast1, Positive
from tread_composer.core.protocols import TimeDistribution, Weighting

__all__ = [
    'Length', 'Strict', 'native', 'part_kind', 'plain', 'signature_fields', 'signature_model', 'strict_model',
    'yaml_type',
]  # fmt: skip


def _some_or_all(value: int) -> int:
    if value == -1 or value >= 1:
        return value
    raise PydanticCustomError('rule', '{value} must be at least 1, or -1 for all', {'value': value})


# A number of batches or files, as Composer writes it.
_SomeOrAll = Annotated[int, AfterValidator(_some_or_all)]

_COUNTS = (
    'batch_log_interval', 'batch_size', 'buffer_size', 'dist_aggregate_batch_interval', 'flush_interval',
    'ghost_batch_size', 'interrupt', 'log_duplicated_metric_every_n_steps', 'max_entries', 'max_logs_per_message',
    'num_attempts', 'num_concurrent_uploads', 'num_images', 'upload_timeout_in_seconds',
)  # fmt: skip
_ABOVE_0 = ('clipping_threshold', 'gamma', 'power', 'rho', 't_mult')
_NOT_BELOW_0 = ('alpha', 'alpha_f', 'alpha_i', 'min_delta', 'momentum', 'weight_decay')
_SHARES = ('drop_rate', 'freeze_level', 'freeze_start', 'keep', 'train_sequence_length_scaling')

# Bounds of arguments that constructors of Composer and torch take unseen: theirs fail, or train on, in mid-run.
_OF_OTHERS: dict[str, Any] = {
    **dict.fromkeys(_COUNTS, AtLeast1),
    **dict.fromkeys(_ABOVE_0, Positive),
    **{name: Annotated[float, Ge(0)] for name in _NOT_BELOW_0},
    **{name: Annotated[float, Ge(0), Le(1)] for name in _SHARES},
    # It keeps that many time stamps.
    'window_size': Annotated[int, Ge(1), Le(1_000_000)],
    'num_checkpoints_to_keep': _SomeOrAll,
    'train_subset_num_batches': _SomeOrAll,
    'eval_subset_num_batches': _SomeOrAll,
    'save_num_checkpoints_to_keep': _SomeOrAll,
    'scale_schedule_ratio': Annotated[float, Gt(0), Le(1000)],
    'dist_timeout': Annotated[float, Gt(0), Le(10**9)],
}

_LENGTHS = ('decay_period', 'half_life', 'patience', 'step_size', 't_0', 't_max')


def _is_length(name: str) -> bool:
    """Whether a time argument says how long something lasts, which is never 0; others say when something happens."""
    return name.endswith('interval') or name in _LENGTHS


# Arguments annotated as mere text that are times all the same, as are all whose name ends in "interval".
_TIME_NAMES = {'half_life', 'start_time', 'end_time'}
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Marks an argument that is a part with a name of its own."""

    kind: str


# Arguments of these types are sections: a name and the arguments of what it names.
_PARTS: dict[Any, str] = {TimeDistribution: 'time_distribution', Weighting: 'weighting'}


class Strict(BaseModel):
    """Base of all sections: an unknown key is an error, and so is text where a number belongs."""

    model_config = ConfigDict(
        extra='forbid',
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )
    refused: ClassVar[dict[str, str]] = {}
    """Names that exist but are not for YAML, with the reason."""
    constructor: ClassVar[Callable[..., Any] | None] = None
    """The dataclass that this section stands for, where it is one argument of a constructor."""


# Nothing counts tokens here, an iteration has no length, and seconds would make the same command another run.
_UNITS = {'ep': 'epochs', 'ba': 'batches', 'sp': 'samples', 'dur': 'a share of the run'}
_TIME = re.compile(rf'(\d[\d_]*(?:\.\d*)?(?:[eE][-+]?\d+)?|\.\d+)({"|".join(_UNITS)})')
_LARGEST_COUNT = 10**12


def _check_time(value: object, is_length: bool = False) -> object:
    shown = {'value': 'null' if value is None else repr(value)}
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = 'a bare number has no unit (Composer would read epochs); write '
        is_whole = isinstance(value, int) or value.is_integer()
        text += "'{value}ep' or '{value}ba'" if is_whole else "'{value}dur' for that share of the run"
        raise PydanticCustomError('time', text, {'value': value})
    if not isinstance(value, str) or not _TIME.fullmatch(value) or not _is_time(value):
        units = ', '.join(f'{unit} ({meaning})' for unit, meaning in _UNITS.items())
        text = "{value} is not a time: write a whole number and one of the units {units}, such as '200ba' or '0.5dur'"
        raise PydanticCustomError('time', text, {**shown, 'units': units})
    time = Time.from_timestring(value)
    if time.value > (1 if time.unit == TimeUnit.DURATION else _LARGEST_COUNT):
        raise PydanticCustomError('time', '{value} is longer than any run; 1dur is all of it', shown)
    if is_length and time.value == 0:
        raise PydanticCustomError(
            'time', '{value} has no length; write for example 200ba, or 1dur for once at the end', shown
        )
    return value


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and Time.from_timestring(value) is not None
    except (ValueError, TypeError, OverflowError):
        return False


TimeString = Annotated[str, BeforeValidator(_check_time)]
Length = Annotated[str, BeforeValidator(functools.partial(_check_time, is_length=True))]


def yaml_type(annotation: Any, name: str = '', default: Any = None) -> Any:
    """The strict type of what YAML may write for an argument; None if it cannot write it at all.

    Args:
        annotation: As the constructor has it; empty or ``Any`` accepts any YAML value.
        name: The argument's name: some are times though annotated as text.
        default: Its default: one that is a time string makes the argument a time.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        base, *bounds = arguments
        kind = yaml_type(base, name, default)
        return None if kind is None else Annotated[(kind, *bounds)]
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return yaml_type(type(default), name, default) if type(default) in (bool, int, float, str) else Any
    if annotation is str and not (name in _TIME_NAMES or _is_length(name) or _is_time(default)):
        return str
    if annotation is str or Time in (annotation, origin):
        return Length if _is_length(name) else TimeString
    if annotation in (int, float, bool, type(None), None) or origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        return _union(arguments, name, default)
    if origin in _LISTS:
        inner = yaml_type(arguments[0])
        return None if inner is None else list[inner]  # type: ignore[valid-type]
    if origin is tuple:
        items = [item if item is Ellipsis else yaml_type(item) for item in arguments]
        to_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
        return None if None in items else Annotated[tuple[tuple(items)], to_tuple]  # type: ignore[valid-type]
    if origin in (dict, Mapping, collections.abc.Mapping) or annotation is dict:
        key, value = arguments or (str, Any)
        return dict[yaml_type(key) or str, yaml_type(value) or Any]  # type: ignore[misc]
    return _class_type(annotation) if inspect.isclass(annotation) else None


def _class_type(annotation: type) -> Any:
    if annotation in _PARTS:
        return Annotated[Any, _Part(_PARTS[annotation])]
    if issubclass(annotation, enum.Enum):
        return Annotated[Literal[tuple(member.value for member in annotation)], AfterValidator(annotation)]
    if issubclass(annotation, pathlib.PurePath):
        return str
    if annotation in (list, tuple):
        return list[Any]
    if not dataclasses.is_dataclass(annotation):
        return None
    model = signature_model(annotation)
    model.constructor = annotation
    return model


def _union(members: tuple[Any, ...], name: str, default: Any) -> Any:
    if Any in members:
        return Any
    dropped: list[Any] = []
    if Time in members:  # its other spellings: text is checked as a time, a bare number has no unit
        dropped += [str, int]
    if any(inspect.isclass(member) and issubclass(member, enum.Enum) for member in members):
        dropped.append(str)
    if any(dataclasses.is_dataclass(member) for member in members):  # the mapping form is the dataclass's own form
        dropped += [member for member in members if typing.get_origin(member) is collections.abc.Mapping]
    kept = [member for member in members if member not in dropped]
    options = [option for option in (yaml_type(member, name, default) for member in kept) if option is not None]
    if not options or options == [type(None)]:
        return None
    return Union[tuple(options)]  # noqa: UP007 - a tuple of types that is known only now


def signature_fields(target: Callable[..., Any], skip: Collection[str] = ()) -> tuple[dict[str, Any], dict[str, str]]:
    """Pydantic fields for the arguments of a constructor, and the arguments that YAML cannot write, with the reason.

    ``*args`` and ``**kwargs`` are left out: nobody could say whether a name in them is a slip.
    """
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, AttributeError, SyntaxError, TypeError):  # for type checkers only, or for no one
        hints = {}
    fields: dict[str, Any] = {}
    refused: dict[str, str] = {}
    entries = dataclasses.fields(target) if dataclasses.is_dataclass(target) else ()  # type: ignore[arg-type]
    factories = {entry.name: entry.default_factory for entry in entries}
    for name, parameter in inspect.signature(target).parameters.items():  # type: ignore[arg-type]
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default, annotation = parameter.default, hints.get(name, parameter.annotation)
        factory = factories.get(name, dataclasses.MISSING)
        if factory is not dataclasses.MISSING:
            default = factory()
        # torch marks a required argument behind an optional one with an object of its own
        required = default is parameter.empty or repr(default) == '<required parameter>'
        bounds = _OF_OTHERS if target.__module__.startswith(('composer.', 'torch.')) else {}
        kind = bounds.get(name) or yaml_type(annotation, name, None if required else default)
        if kind is None:
            refused[name] = f'takes {inspect.formatannotation(annotation)}, which YAML cannot write; set it in Python'
        elif required:
            fields[name] = (kind, ...)
        else:
            fields[name] = (Union[kind, None] if default is None else kind, default)  # noqa: UP007
    return fields, refused


def part_kind(annotation: Any, metadata: Sequence[Any] = ()) -> str | None:
    """The kind of part that a field of this annotation holds; None for plain values."""
    if typing.get_origin(annotation) is Annotated:
        annotation, *metadata = typing.get_args(annotation)
    kinds = [mark.kind for mark in metadata if isinstance(mark, _Part)]
    return next((kind for kind in (*kinds, *map(part_kind, typing.get_args(annotation))) if kind is not None), None)


def signature_model(target: Callable[..., Any]) -> type[Strict]:
    """The constructor of ``target`` as a strict section."""
    return strict_model(target.__name__, *signature_fields(target))


def strict_model(name: str, fields: dict[str, Any], refused: dict[str, str]) -> type[Strict]:
    """A strict section of these fields; ``refused`` are names that are not for YAML, with the reason."""
    model = create_model(name, __base__=Strict, **fields)
    model.refused = refused
    return model


def native(value: Any) -> Any:
    """A validated value as the constructor wants it: nested sections become the dataclasses they stand for."""
    if isinstance(value, Strict):
        arguments = {name: native(getattr(value, name)) for name in value.model_fields_set}
        return value.constructor(**arguments) if value.constructor else arguments
    if isinstance(value, (list, tuple)):
        return type(value)(native(item) for item in value)
    return value.build() if hasattr(value, 'to_plain') else value  # a part within a part


def plain(value: Any, *, defaults: bool = False) -> Any:
    """A validated value as YAML writes it; of a section what was set, or all that is not absent by default."""
    if isinstance(value, Strict):
        names = [name for name in type(value).model_fields if name in value.model_fields_set]
        if defaults:
            values = {name: (getattr(value, name), entry.default) for name, entry in type(value).model_fields.items()}
            names = [name for name, (item, default) in values.items() if item is not None or default is not None]
        return {name: plain(getattr(value, name)) for name in names}
    if hasattr(value, 'to_plain'):  # a part within a part
        return value.to_plain()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
