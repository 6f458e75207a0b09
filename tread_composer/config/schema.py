"""A constructor's signature as a strict schema, and pydantic's complaints in the words of a YAML author.

``signature_model`` reads names from ``inspect.signature`` and types from the annotations: what YAML can write is
checked, what it cannot write (functions, modules, open files) is refused by name with that reason.
"""

import collections.abc
import dataclasses
import enum
import inspect
import pathlib
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Union

from composer.core import Time, TimeUnit
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic_core import PydanticCustomError

from tread_composer.config.errors import Path, Problem, did_you_mean

__all__ = ['Strict', 'TimeString', 'check', 'native', 'plain', 'signature_fields', 'signature_model', 'yaml_type']

# Arguments annotated as mere text that are times all the same.
_TIME_NAMES = {'interval', 'update_interval', 'half_life', 'start_time', 'end_time'}
_UNITS = ', '.join(f"'{unit.value}'" for unit in TimeUnit)


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
    target: ClassVar[type | None] = None
    """The dataclass that this section stands for, where it is one argument of a constructor."""


def check_time(value: object) -> object:
    """A time string such as ``'200ba'``, or a ``PydanticCustomError`` that says what one looks like."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise PydanticCustomError(
            'time', '{value} is not a time; write a number and a unit, such as 200ba', _repr(value)
        )
    if not isinstance(value, str):
        text = 'a bare number has no unit (Composer would read epochs); write '
        whole = isinstance(value, int) or value.is_integer()
        text += "'{value}ep' or '{value}ba'" if whole else "'{value}dur' for that share of the run"
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
        hints = typing.get_type_hints(function)
    except NameError:  # a name that exists for type checkers only
        hints = {}
    fields: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name, parameter in inspect.signature(target).parameters.items():
        if name in skip or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
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


def signature_model(target: type, skip: tuple[str, ...] = (), *, is_argument: bool = False) -> type[Strict]:
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
    return value


def plain(value: Any) -> Any:
    """A validated value as YAML writes it."""
    if isinstance(value, Strict):
        return {
            name: plain(getattr(value, name)) for name in type(value).model_fields if name in value.model_fields_set
        }
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def check(model: type[Strict], data: Any, path: Path = ()) -> tuple[Strict | None, list[Problem]]:
    """Validate; a section with no problems, or None with all of them.

    Args:
        model: The section's class.
        data: What YAML holds for it.
        path: Where the section stands in the tree.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        found: dict[Path, list[Any]] = {}
        for detail in error.errors(include_url=False):
            found.setdefault(_real_path(detail['loc'], detail['type'], data), []).append(detail)
        wheres = [where for where in found if not any(_within(other, where) for other in found)]
        return None, [_problem(model, data, path, where, found[where]) for where in wheres]


def _within(inner: Path, outer: Path) -> bool:
    """Whether a problem lies deeper: of a union, the member that fits the data best complains the deepest."""
    return len(inner) > len(outer) and inner[: len(outer)] == outer


def _real_path(location: tuple[Any, ...], kind: str, data: Any) -> Path:
    """Pydantic's location without the names of union members that it mixes in."""
    path: list[str | int] = []
    node = data
    for index, part in enumerate(location):
        absent_key = index == len(location) - 1 and kind == 'missing'
        if isinstance(node, dict) and (part in node or absent_key):
            path.append(part)
            node = node.get(part)
        elif isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node):
            path.append(part)
            node = node[part]
    return tuple(path)


_NUMBER_OR_BOOL = re.compile(r'true|false|[-+]?[0-9.]+([eE][-+]?[0-9]+)?', re.IGNORECASE)
_EXPECTED = {
    'bool_type': 'true or false',
    'dict_type': 'a mapping',
    'finite_number': 'a finite number',
    'float_type': 'a number',
    'int_type': 'a whole number',
    'list_type': 'a list',
    'model_type': 'a mapping',
    'model_attributes_type': 'a mapping',
    'none_required': 'null',
    'string_type': 'text',
    'tuple_type': 'a list',
}


def _problem(model: type[Strict], data: Any, base: Path, where: Path, details: list[Any]) -> Problem:
    path = (*base, *where)
    kinds = [detail['type'] for detail in details]
    value = _at(data, where)
    if 'extra_forbidden' in kinds:
        section = _section(model, data, where[:-1])
        known = tuple(section.model_fields) if section else ()
        reason = section.refused.get(str(where[-1])) if section else None
        if reason:
            return Problem(path, reason)
        owner = _other_owner(model, data, where)
        text = (
            f'belongs to {owner}, not to {section.model_fields["name"].default!r}'
            if owner and section
            else 'unknown setting'
        )
        return Problem(path, f'{text}.{did_you_mean(where[-1], known)}', known)
    if 'missing' in kinds:
        return Problem(path, 'is missing and has no default; give it')
    if kinds[0] in ('union_tag_invalid', 'union_tag_not_found'):
        names = tuple(tag.strip().strip("'") for tag in details[0]['ctx'].get('expected_tags', '').split(','))
        if kinds[0] == 'union_tag_not_found':
            return Problem((*path, 'name'), 'is missing; say which kind this is, for example name: edm')
        name = value.get('name') if isinstance(value, dict) else value
        return Problem((*path, 'name'), f'{name!r} is unknown.{did_you_mean(name, names)}', names)
    # Of a union the most telling member: a message of our own, else all that would have been right.
    for detail in details:
        if detail['type'] in ('time', 'one_of'):
            return Problem(path, detail['msg'])
    expected = [_expected(detail) for detail in details]
    rules = dict.fromkeys(rule for rule in expected if rule)
    if rules:
        return Problem(path, f'{_shown(value)} is not {" or ".join(rules)}{_type_remedy(value, kinds)}')
    return Problem(path, f'{_shown(value)}: {details[0]["msg"].removeprefix("Value error, ")}')


def _expected(detail: Any) -> str:
    if detail['type'] == 'literal_error':
        expected = detail['ctx']['expected'].replace(' or ', ', ')
        return f'one of {expected.replace("False", "false").replace("True", "true")}'
    if detail['type'].startswith(('greater_than', 'less_than', 'too_', 'string_too')):
        return detail['msg'].replace('Input should be', '').replace('Input should', 'such that it').strip().lower()
    return _EXPECTED.get(detail['type'], '')


def _type_remedy(value: Any, kinds: list[str]) -> str:
    if value is None:
        return '; leave the key away for its default'
    wants = {'int_type', 'float_type', 'bool_type'} & set(kinds)
    if wants and isinstance(value, str) and _NUMBER_OR_BOOL.fullmatch(value):
        return '; write it without quotes (from the environment: ${oc.decode:${oc.env:NAME}})'
    if 'bool_type' in wants and str(value).lower() in ('yes', 'no', 'on', 'off'):
        return '; write true or false'
    if 'string_type' in kinds and isinstance(value, (int, float)):
        return '; write it in quotes'
    return ''


def _shown(value: Any) -> str:
    text = {True: 'true', False: 'false', None: 'null'}.get(value) if value is None or isinstance(value, bool) else None
    return text or repr(value)


def _at(data: Any, where: Path) -> Any:
    for part in where:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _section(model: type[Strict], data: Any, where: Path) -> type[Strict] | None:
    """The section's class at a path: where several may stand, the one that the data's ``name`` picks."""
    here: type[Strict] | None = model
    for depth, part in enumerate(where, 1):
        if isinstance(part, int):
            continue
        candidates = _candidates(here, part)
        value = _at(data, where[:depth])
        name = value.get('name') if isinstance(value, dict) else None
        named = [one for one in candidates if 'name' in one.model_fields and one.model_fields['name'].default == name]
        here = (named or candidates or [None])[0]
    return here


def _candidates(section: type[Strict] | None, key: str) -> list[type[Strict]]:
    entry = section.model_fields.get(key) if section else None
    return _sections_in(entry.annotation) if entry else []


def _other_owner(model: type[Strict], data: Any, where: Path) -> str:
    """The ``name`` of a sibling kind that does have this setting."""
    if len(where) < 2 or isinstance(where[-2], int):
        return ''
    siblings = _candidates(_section(model, data, where[:-2]), where[-2])
    owners = [one.model_fields['name'].default for one in siblings if where[-1] in one.model_fields]
    return ' and '.join(repr(owner) for owner in owners)


def _sections_in(annotation: Any) -> list[type[Strict]]:
    if inspect.isclass(annotation) and issubclass(annotation, Strict):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _sections_in(argument)]
