"""Validation of a section, with pydantic's complaints in the words of a YAML author: value, rule, remedy."""

import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from tread_composer.config.document import kind_of
from tread_composer.config.errors import Path, Problem
from tread_composer.config.schema import Strict
from tread_composer.core.errors import did_you_mean

__all__ = ['check', 'shown']


def check(
    model: type[Strict], data: Any, path: Path = (), *, siblings: Mapping[str, type[Strict]] | None = None
) -> tuple[Strict | None, list[Problem]]:
    """Validate what YAML holds at ``path``; a section with no problems, or None with all of them.

    ``siblings`` are sections that could stand there instead, by name: a setting of theirs is told from a slip.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        errors: dict[Path, list[Any]] = {}
        for detail in error.errors(include_url=False):
            errors.setdefault(_real_path(detail['loc'], detail['type'], data), []).append(detail)
    # Where one problem lies within another, the deeper one says more: that of the union member that fits the data best.
    outer = {location[:length] for location in errors for length in range(len(location))}
    problems = [
        _problem(model, path, location, details, siblings or {})
        for location, details in errors.items()
        if location not in outer
    ]
    return None, problems


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
_UNQUOTED = {'int_type': ('int',), 'float_type': ('int', 'float'), 'bool_type': ('bool',)}


def _problem(
    model: type[Strict], base: Path, location: Path, details: list[Any], siblings: Mapping[str, type[Strict]]
) -> Problem:
    path, value = (*base, *location), details[0]['input']
    kinds = [detail['type'] for detail in details]
    if 'extra_forbidden' in kinds:
        section = _section(model, location[:-1])
        if section is not None and location[-1] in section.refused:
            return Problem(path, section.refused[str(location[-1])])
        names = list(section.model_fields) if section else []
        text = 'unknown setting'
        if len(location) == 1 and siblings:
            names.insert(0, 'name')
            present = next(name for name, schema in siblings.items() if schema is model)
            owners = [repr(name) for name, schema in siblings.items() if location[0] in schema.model_fields]
            text = f'belongs to {" and ".join(owners)}, not to {present!r}' if owners else text
        return Problem(path, f'{text}.{did_you_mean(location[-1], names)}', tuple(names))
    if 'missing' in kinds and isinstance(value, (list, tuple)):  # it ends before the last of a fixed number
        return Problem(path, f'{shown(value)} is not a list of {details[-1]["loc"][-1] + 1} values')
    if 'missing' in kinds:
        return Problem(path, 'is missing and has no default; give it')
    # Of a union the most telling member: a message of our own, else all that would have been right.
    for detail in details:
        if detail['type'] in ('time', 'rule'):
            return Problem(path, detail['msg'])
    expected = [_expected(detail) for detail in details]
    rules = dict.fromkeys(rule for rule in expected if rule)
    if rules:
        has_default = _has_default(model, location)
        return Problem(path, f'{shown(value)} is not {" or ".join(rules)}{_type_remedy(value, kinds, has_default)}')
    return Problem(path, f'{shown(value)}: {details[0]["msg"].removeprefix("Value error, ")}')


def _expected(detail: Any) -> str:
    if detail['type'] == 'literal_error':
        expected = detail['ctx']['expected'].replace(' or ', ', ')
        return f'one of {expected.replace("False", "false").replace("True", "true")}'
    if detail['type'] in ('too_short', 'too_long'):
        word, key = ('least', 'min_length') if detail['type'] == 'too_short' else ('most', 'max_length')
        number = detail['ctx'][key]
        return f'a list of at {word} {number} value{"" if number == 1 else "s"}'
    if detail['type'].startswith(('greater_than', 'less_than', 'string_too')):
        text = detail['msg'].replace('Input should be', '').replace('String should have', 'a text of')
        return text.strip().lower()
    return _EXPECTED.get(detail['type'], '')


def _has_default(model: type[Strict], location: Path) -> bool:
    section = _section(model, location[:-1])
    entry = section.model_fields.get(str(location[-1])) if section and location else None
    return entry is not None and not entry.is_required()


def _type_remedy(value: Any, kinds: list[str], has_default: bool) -> str:
    if value is None:
        return '; leave the key out for its default' if has_default else '; give it'
    # Variables of the environment are texts, whatever they look like.
    if isinstance(value, str) and any(kind_of(value) in _UNQUOTED.get(kind, ()) for kind in kinds):
        return '; write it without quotes (from the environment: ${oc.decode:${oc.env:NAME}})'
    # YAML 1.1 read these as booleans.
    if 'bool_type' in kinds and str(value).lower() in ('yes', 'no', 'on', 'off'):
        return '; write true or false'
    if 'string_type' in kinds and isinstance(value, (int, float)):
        return '; write it in quotes'
    return ''


def shown(value: Any) -> str:
    """A value as YAML has it, for a message."""
    if value is None or isinstance(value, bool):
        return {True: 'true', False: 'false', None: 'null'}[value]
    return repr(list(value) if isinstance(value, tuple) else value)


def _section(model: type[Strict], location: Path) -> type[Strict] | None:
    """The section at a path within a section: a dataclass that is an argument, or one in a list."""
    section: type[Strict] | None = model
    for key in location:
        if section is not None and isinstance(key, str):
            entry = section.model_fields.get(key)
            section = next(_sections_in(entry.annotation), None) if entry else None
    return section


def _sections_in(annotation: Any) -> Iterator[type[Strict]]:
    if inspect.isclass(annotation) and issubclass(annotation, Strict):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _sections_in(argument)
