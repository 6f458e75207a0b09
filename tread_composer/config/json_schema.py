"""A JSON schema of the YAML files, for the completion and the hints of editors."""

from typing import Any

from tread_composer.config.components import component_schema
from tread_composer.config.registry import PARTS, TABLES, part_names
from tread_composer.config.schema import part_kind
from tread_composer.config.tree import Config

__all__ = ['json_schema']

# A part of another package; what arguments it takes is not looked up for an editor.
_REFERENCE = {'type': 'object', 'properties': {'name': {'type': 'string', 'pattern': ':'}}, 'required': ['name']}


def json_schema() -> dict[str, Any]:
    """The schema. It is a help, not the rule: ``load_config`` checks more, and interpolations (text) are not in it."""
    schema = Config.model_json_schema()
    schema['title'] = 'tread_composer run'
    properties = schema['properties']
    # A file that extends another one may leave anything out.
    schema.pop('required', None)
    properties['extends'] = {'type': 'string', 'description': 'Base file, relative to this one'}
    shared = schema['$defs']
    for table, kind in TABLES.items():
        entries = {name: {'anyOf': [_arguments(kind, name, shared), {'type': 'null'}]} for name in part_names(kind)}
        properties[table] = {'type': 'object', 'properties': entries, 'additionalProperties': _REFERENCE}
    for section, kind in PARTS.items():
        properties[section] = {'oneOf': _options(kind, shared)}
    return schema


def _options(kind: str, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """A section of this kind for each name, and the part of another package."""
    options = []
    for name in part_names(kind):
        schema = _arguments(kind, name, shared)
        schema['properties'] = {'name': {'const': name}, **schema.get('properties', {})}
        options.append({**schema, 'required': ['name', *schema.get('required', [])]})
    return [*options, _REFERENCE]


def _arguments(kind: str, name: str, shared: dict[str, Any]) -> dict[str, Any]:
    try:
        fields = component_schema(kind, name)
    except ImportError:  # a package that this one component needs
        return {'type': 'object'}
    schema = fields.model_json_schema()
    for key, entry in fields.model_fields.items():  # an objective's times and weighting are parts themselves
        part = part_kind(entry.annotation, entry.metadata)
        if part is not None:
            absent = [{'type': 'null'}] if entry.default is None else []
            schema['properties'][key] = {'oneOf': [*_options(part, shared), *absent]}
    # References count from the root of the whole schema.
    shared.update(schema.pop('$defs', {}))
    schema.pop('description', None)
    return schema
