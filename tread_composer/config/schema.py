"""A constructor's signature as a strict schema.

``signature_model`` reads names from ``inspect.signature`` and types from the annotations: what YAML can write is
checked, what it cannot write (functions, modules, open files) is refused by name with that reason.
"""

import collections.abc
import dataclasses
import enum
import inspect
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Union

from composer.core import Time, TimeUnit
from pydantic import BaseModel, BeforeValidator, ConfigDict, create_model
from pydantic_core import PydanticCustomError

from tread_composer.core.protocols import TimeDistribution, Weighting

__all__ = [
    'Strict',
    'TimeString',
    'native',
    'part_kind',
    'plain',
    'signature_fields',
    'signature_model',
    'yaml_type',
]

# Arguments annotated as mere text that are times all the same.
_TIME_NAMES = {'interval', 'update_interval', 'half_life', 'start_time', 'end_time'}
_UNITS = ', '.join(f"'{unit.value}'" for unit in TimeUnit)


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
    target: ClassVar[Callable[..., Any] | None] = None
    """The dataclass that this section stands for, where it is one argument of a constructor."""


def check_time(value: object) -> object:
    """A time string such as ``'200ba'``, or a ``PydanticCustomError`` that says what one looks like."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PydanticCustomError(
            'time', '{value} is not a time; write a number and a unit, such as 200ba', _repr(value)
        )
    if not isinstance(value, str):
        text = 'a bare number has no unit (Composer would read epochs); write '
        is_whole = isinstance(value, int) or value.is_integer()
        text += "'{value}ep' or '{value}ba'" if is_whole else "'{value}dur' for that share of the run"
        raise PydanticCustomError('time', text, {'value': value})
    try:
        if Time.from_timestring(value).value >= 0:
            return value
    except (ValueError, TypeError, OverflowError):
        pass
    text = "{value} is not a time: write a whole number >= 0 and one of the units {units}, such as '200ba' or '0.5dur'"
    raise PydanticCustomError('time', text, {**_repr(value), 'units': _UNITS})


def _repr(value: object) -> dict[str, str]:
    return {'value': 'null' if value is None else repr(value)}


TimeString = Annotated[str, BeforeValidator(check_time)]


def yaml_type(annotation: Any, name: str = '', default: Any = None) -> Any:
    """The strict type of what YAML may write for an argument; None if it cannot write it at all.

    Args:
        annotation: As the constructor has it; empty or ``Any`` accepts any YAML value.
        name: The argument's name: some are times though annotated as text.
        default: Its default: one that is a time string makes the argument a time.
    """
    if typing.get_origin(annotation) is Annotated:
        base, *bounds = typing.get_args(annotation)
        kind = yaml_type(base, name, default)
        return None if kind is None else Annotated[(kind, *bounds)]
    if typing.get_origin(annotation) is None and not isinstance(annotation, str) and annotation in _PARTS:
        return Annotated[Any, _Part(_PARTS[annotation])]
    if annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str):
        return (
            Any
            if default is None or type(default) not in (bool, int, float, str)
            else yaml_type(type(default), name, default)
        )
    if annotation is str:
        return TimeString if name in _TIME_NAMES or _is_time(default) else str
    if annotation in (int, float, bool, type(None), None):
        return annotation
    if annotation is Time or typing.get_origin(annotation) is Time:
        return TimeString
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        return _union(arguments, name, default)
    if origin in (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection):
        inner = yaml_type(arguments[0])
        return None if inner is None else list[inner]  # type: ignore[valid-type]
    if origin is tuple:
        items = [item if item is Ellipsis else yaml_type(item) for item in arguments]
        to_tuple = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
        return None if None in items else Annotated[tuple[tuple(items)], to_tuple]  # type: ignore[valid-type]
    if origin in (dict, Mapping, collections.abc.Mapping) or annotation is dict:
        key, value = arguments or (str, Any)
        return dict[yaml_type(key) or str, yaml_type(value) or Any]  # type: ignore[misc]
    return _class_type(annotation)


def _class_type(annotation: Any) -> Any:
    if not inspect.isclass(annotation):
        return None
    if issubclass(annotation, enum.Enum):
        return Annotated[annotation, BeforeValidator(lambda value: _member(annotation, value))]
    if issubclass(annotation, pathlib.PurePath):
        return str
    if annotation in (list, tuple):
        return list[Any]
    if dataclasses.is_dataclass(annotation):
        return signature_model(annotation, is_argument=True)
    return None


def _member(kind: type[enum.Enum], value: object) -> enum.Enum:
    for member in kind:
        if value is member or (isinstance(value, str) and value == member.value):
            return member
    expected = ', '.join(repr(member.value) for member in kind)
    raise PydanticCustomError('one_of', '{value} is not one of {expected}', {**_repr(value), 'expected': expected})


def _union(members: tuple[Any, ...], name: str, default: Any) -> Any:
    if Any in members:
        return Any
    if Time in members:  # its other spellings: text is checked as a time, a bare number has no unit
        members = tuple(member for member in members if member not in (str, int))
    if any(inspect.isclass(member) and issubclass(member, enum.Enum) for member in members):
        members = tuple(member for member in members if member is not str)
    if any(dataclasses.is_dataclass(member) for member in members):  # the mapping form is the dataclass's own form
        members = tuple(member for member in members if typing.get_origin(member) is not collections.abc.Mapping)
    options = [option for option in (yaml_type(member, name, default) for member in members) if option is not None]
    if not options or options == [type(None)]:
        return None
    return Union[tuple(options)]  # noqa: UP007 - a tuple of types that is known only now


def _is_time(default: Any) -> bool:
    try:
        return isinstance(default, str) and bool(Time.from_timestring(default) or True)
    except (ValueError, TypeError, OverflowError):
        return False


def signature_fields(target: Callable[..., Any], skip: tuple[str, ...] = ()) -> tuple[dict[str, Any], dict[str, str]]:
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
    factories = {
        entry.name: entry.default_factory
        for entry in (dataclasses.fields(target) if dataclasses.is_dataclass(target) else ())  # type: ignore[arg-type]
        if entry.default_factory is not dataclasses.MISSING
    }
    for name, parameter in inspect.signature(target).parameters.items():  # type: ignore[arg-type]
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if name in factories:
            parameter = parameter.replace(default=factories[name]())
        annotation = hints.get(name, parameter.annotation)
        # torch marks a required argument behind an optional one with an object of its own
        required = parameter.default is parameter.empty or repr(parameter.default) == '<required parameter>'
        kind = yaml_type(annotation, name, None if required else parameter.default)
        if kind is None:
            refused[name] = f'takes {inspect.formatannotation(annotation)}, which YAML cannot write; set it in Python'
            continue
        if not required and parameter.default is None:
            kind = Union[kind, None]  # noqa: UP007
        fields[name] = (kind, ... if required else parameter.default)
    return fields, refused


def part_kind(annotation: Any, metadata: Sequence[Any] = ()) -> str | None:
    """The kind of part that a field of this annotation holds; None for plain values."""
    for mark in metadata:
        if isinstance(mark, _Part):
            return mark.kind
    if typing.get_origin(annotation) is Annotated:
        return part_kind(None, typing.get_args(annotation)[1:])
    kinds = (part_kind(argument) for argument in typing.get_args(annotation))
    return next((kind for kind in kinds if kind is not None), None)


def signature_model(
    target: Callable[..., Any], skip: tuple[str, ...] = (), *, is_argument: bool = False
) -> type[Strict]:
    """The constructor of ``target`` as a strict section; ``skip`` names the arguments that the builders give."""
    fields, refused = signature_fields(target, skip)
    model = create_model(target.__name__, __base__=Strict, **fields)
    model.refused = refused
    model.target = target if is_argument else None
    return model


def native(value: Any) -> Any:
    """A validated value as the constructor wants it: nested sections become the dataclasses they stand for."""
    if isinstance(value, Strict):
        arguments = {name: native(getattr(value, name)) for name in value.model_fields_set}
        return value.target(**arguments) if value.target else arguments
    if isinstance(value, (list, tuple)):
        return type(value)(native(item) for item in value)
    return value.build() if hasattr(value, 'to_plain') else value  # a part within a part


def plain(value: Any) -> Any:
    """A validated value as YAML writes it."""
    if isinstance(value, Strict):
        return {
            name: plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if hasattr(value, 'to_plain'):  # a part within a part
        return value.to_plain()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
