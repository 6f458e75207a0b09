"""Validation of a section, with pydantic's complaints in the words of a YAML author: value, rule, remedy."""

import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from tread_composer.config.errors import Path, Problem, did_you_mean
from tread_composer.config.schema import Strict

__all__ = ['check']


def check(
    model: type[Strict], data: Any, path: Path = (), *, siblings: Mapping[str, type[Strict]] | None = None
) -> tuple[Strict | None, list[Problem]]:
    """Validate; a section with no problems, or None with all of them.

    Args:
        model: The section's class.
        data: What YAML holds for it.
        path: Where the section stands in the tree.
        siblings: Sections that could stand there instead, by name: a setting of theirs is told from a slip.
    """
    try:
        return model.model_validate(data), []
    except ValidationError as error:
        errors: dict[Path, list[Any]] = {}
        for detail in error.errors(include_url=False):
            errors.setdefault(_real_path(detail['loc'], detail['type'], data), []).append(detail)
        locations = [location for location in errors if not any(_within(ancestor, location) for ancestor in errors)]
        return None, [_problem(model, data, path, location, errors[location], siblings or {}) for location in locations]


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


def _problem(
    model: type[Strict],
    data: Any,
    base: Path,
    location: Path,
    details: list[Any],
    siblings: Mapping[str, type[Strict]],
) -> Problem:
    path = (*base, *location)
    kinds = [detail['type'] for detail in details]
    value = _at(data, location)
    if 'extra_forbidden' in kinds:
        section = _section(model, data, location[:-1])
        known = tuple(section.model_fields) if section else ()
        reason = section.refused.get(str(location[-1])) if section else None
        if reason:
            return Problem(path, reason)
        text = _owner_in_words(model, data, location, siblings) or 'unknown setting'
        return Problem(path, f'{text}.{did_you_mean(location[-1], known)}', known)
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


def _at(data: Any, location: Path) -> Any:
    for part in location:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _section(model: type[Strict], data: Any, location: Path) -> type[Strict] | None:
    """The section's class at a path: where several may stand, the one that the data's ``name`` picks."""
    section: type[Strict] | None = model
    for depth, part in enumerate(location, 1):
        if isinstance(part, int):
            continue
        candidates = _candidates(section, part)
        value = _at(data, location[:depth])
        name = value.get('name') if isinstance(value, dict) else None
        named = [
            candidate
            for candidate in candidates
            if 'name' in candidate.model_fields and candidate.model_fields['name'].default == name
        ]
        section = (named or candidates or [None])[0]
    return section


def _candidates(section: type[Strict] | None, key: str) -> list[type[Strict]]:
    entry = section.model_fields.get(key) if section else None
    return _sections_in(entry.annotation) if entry else []


def _owner_in_words(model: type[Strict], data: Any, location: Path, siblings: Mapping[str, type[Strict]]) -> str:
    """Whether another kind of section has this setting: ``"belongs to 'edm', not to 'ddpm'"``."""
    if len(location) == 1 and siblings:
        present = next(name for name, schema in siblings.items() if schema is model)
        owners = [name for name, schema in siblings.items() if location[-1] in schema.model_fields]
    elif len(location) >= 2 and not isinstance(location[-2], int):
        candidates = _candidates(_section(model, data, location[:-2]), location[-2])
        section = _section(model, data, location[:-1])
        named = {schema.model_fields['name'].default: schema for schema in candidates if 'name' in schema.model_fields}
        present = next((name for name, schema in named.items() if schema is section), '')
        owners = [name for name, schema in named.items() if location[-1] in schema.model_fields]
    else:
        owners = []
    return f'belongs to {" and ".join(map(repr, owners))}, not to {present!r}' if owners else ''


def _sections_in(annotation: Any) -> list[type[Strict]]:
    if inspect.isclass(annotation) and issubclass(annotation, Strict):
        return [annotation]
    return [section for argument in typing.get_args(annotation) for section in _sections_in(argument)]
