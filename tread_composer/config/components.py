"""Parts of a run by name: checked once against the constructor's signature, built once, asked afterwards."""

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Union

import torch
from pydantic import create_model

from tread_composer.config.errors import Path, Problem, did_you_mean
from tread_composer.config.registry import (
    FROM_DATA,
    KINDS,
    SECTIONS,
    is_ours,
    lacks,
    part_names,
    resolve,
    unkept,
)
from tread_composer.config.schema import Strict, native, part_kind, plain, signature_fields, signature_model
from tread_composer.config.validation import check
from tread_composer.core.named import is_reference

__all__ = ['KINDS', 'Component', 'check_component', 'check_section', 'component_schema']

# Arguments that are not for YAML: the data or the run decide them, and the builders give them.
_GIVEN = {
    'algorithm': ('settings_digest',),
    'backbone': FROM_DATA,
    'optimizer': ('params',),
}
# What a section without a name is.
_UNNAMED = {'backbone': 'dit'}
# Where Composer looks at a value only in the middle of training.
_NARROWER: dict[str, dict[str, Any]] = {
    'gradient_clipping': {'clipping_type': (Literal['adaptive', 'norm', 'value'], ...)},
}
# Pure constructors: called at load, so that a value out of range is refused before data or model exist. Callbacks of
# Composer's and loggers are not: theirs may write or connect.
_PURE = ('algorithm', 'autoencoder', 'objective', 'optimizer', 'scheduler', 'time_distribution', 'weighting')


@dataclass(frozen=True)
class Component:
    """A part of the run by name, with arguments that its constructor's signature accepts.

    Args:
        kind: One of ``KINDS``.
        name: As YAML has it, or ``package.module:Class``.
        kwargs: Validated arguments as plain YAML values.
    """

    kind: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def settings(self) -> Strict:
        """The validated arguments."""
        settings, problems = check(component_schema(self.kind, self.name), self.kwargs)
        assert settings is not None, problems
        return settings

    @functools.cached_property
    def instance(self) -> Any:
        """The object, made once: whoever wants to know something about the part asks it."""
        return self.build()

    def take(self) -> Any:
        """The object, for a Trainer to keep; whoever asks goes on asking it. A second Trainer gets another one."""
        if 'taken' in self.__dict__:
            return self.build()
        self.__dict__['taken'] = True
        return self.instance

    def build(self, *args: Any, **extra: Any) -> Any:
        """A new object. ``args`` come first (an optimizer's parameters), ``extra`` adds what YAML cannot write."""
        return resolve(self.kind, self.name)(*args, **native(self.settings), **extra)

    def to_plain(self) -> dict[str, Any]:
        """The arguments as written, for the resolved YAML."""
        named = {'name': self.name} if self.kind in SECTIONS or is_reference(self.name) else {}
        return {**named, **{key: plain(value) for key, value in self.kwargs.items()}}


@functools.cache
def component_schema(kind: str, name: str) -> type[Strict]:
    """The constructor of a component as a strict section."""
    target = resolve(kind, name)
    if kind == 'backbone':
        return _backbone_schema(target)
    schema = signature_model(target, skip=_GIVEN.get(kind, ()))
    if name not in _NARROWER:
        return schema
    return create_model(target.__name__, __base__=schema, **_NARROWER[name])


def _backbone_schema(target: Callable[..., Any]) -> type[Strict]:
    """A network's sizes one by one, or a published size by ``preset``, which decides them."""
    fields, refused = signature_fields(target, _GIVEN['backbone'])
    presets: Mapping[str, Mapping[str, int]] = getattr(target, 'presets', {})
    if presets:
        sizes = next(iter(presets.values()))
        optional = {name: (Union[fields[name][0], None], None) for name in sizes}  # noqa: UP007
        fields = {'preset': (Literal[tuple(presets)] | None, None), **fields, **optional}  # type: ignore[operator]
    attentions: tuple[str, ...] = getattr(target, 'attentions', ())
    if attentions:
        fields['attention'] = (Literal[attentions], 'sdpa')
    model = create_model(target.__name__, __base__=Strict, **fields)
    model.refused = refused
    return model


def check_section(kind: str, section: Any, path: Path) -> tuple[Component, list[Problem]]:
    """A part whose section says its ``name``, with its problems; usable only if there are none.

    Args:
        kind: One of ``KINDS``.
        section: What stands there.
        path: Where it stands.
    """
    empty = Component(kind, '')
    if not isinstance(section, dict):
        return empty, [Problem(path, f'{section!r} is not a mapping with a name and arguments')]
    if 'name' not in section and kind in _UNNAMED:
        section = {'name': _UNNAMED[kind], **section}
    if 'name' not in section:
        if kind in SECTIONS:
            text = f'is missing; say which kind this is, for example name: {part_names(kind)[-1]}'
        else:
            text = f'is missing; say which {kind}'
        return empty, [Problem((*path, 'name'), text)]
    kwargs = {key: value for key, value in section.items() if key != 'name'}
    return check_component(kind, section['name'], kwargs, path, (*path, 'name'))


def check_component(kind: str, name: Any, kwargs: Any, path: Path, name_path: Path) -> tuple[Component, list[Problem]]:
    """A component with its problems; the component is usable only if there are none.

    Args:
        kind: One of ``KINDS``.
        name: What stands where the name belongs.
        kwargs: What stands where its arguments belong.
        path: Where the arguments are in the tree.
        name_path: Where the name is.
    """
    empty, names = Component(kind, str(name)), part_names(kind)
    if name not in names and not is_reference(name):
        unknown = f'{name!r} is unknown.' if kind in SECTIONS else f'unknown {kind}.'
        return empty, [Problem(name_path, f'{unknown}{did_you_mean(name, names)}', tuple(names))]
    if not isinstance(kwargs, dict):
        return empty, [Problem(path, f'{kwargs!r} is not a mapping of arguments; write {name}: {{}} for the defaults')]
    try:
        lacking = lacks(kind, resolve(kind, name)) if is_reference(name) else None
        if lacking:
            return empty, [Problem(name_path, f'{name!r} is no {kind}: {lacking}')]
        schema = component_schema(kind, name)
    except ImportError as error:
        remedy = (
            'the part before the colon must be a module that Python can import from here (PYTHONPATH), the part behind '
            'it a class in it'
            if is_reference(name)
            else 'install the package that is missing'
        )
        return empty, [Problem(name_path, f'cannot be used here: {error}; {remedy}')]
    data, problems = _with_parts(schema, kwargs, path)
    siblings = {sibling: component_schema(kind, sibling) for sibling in names} if kind in SECTIONS else {}
    settings, own_problems = check(schema, data, path, siblings={**siblings, name: schema})
    problems += own_problems
    if settings is None or problems:
        return empty, problems
    if kind == 'optimizer' and 'lr' in schema.model_fields and 'lr' not in kwargs:
        return empty, [Problem((*path, 'lr'), 'is missing; a run says its learning rate, for example lr: 1.0e-4')]
    component = Component(kind, name, _full(settings) if kind in SECTIONS else plain(settings))
    component.__dict__['settings'] = settings  # validated once
    pure = kind in _PURE or (kind == 'callback' and is_ours(kind, name))
    return component, _try(component, path) if pure else []


def _full(settings: Strict) -> dict[str, Any]:
    """All arguments, defaults included, but for those whose default is to be absent."""
    fields = type(settings).model_fields
    values = {name: getattr(settings, name) for name in fields}
    return {
        name: plain(value) for name, value in values.items() if value is not None or fields[name].default is not None
    }


def _with_parts(schema: type[Strict], kwargs: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """The arguments, with those that are parts themselves (an objective's times) as components."""
    data, problems = dict(kwargs), []
    for name, entry in schema.model_fields.items():
        kind = part_kind(entry.annotation, entry.metadata)
        if kind is None:
            continue
        if name not in kwargs:
            if entry.default is not None:
                data[name] = _of_object(kind, entry.default)
        elif kwargs[name] is not None:
            data[name], of_part = check_section(kind, kwargs[name], (*path, name))
            problems += of_part
        elif entry.default is not None:
            problems.append(Problem((*path, name), 'null is not a mapping; leave the key away for its default'))
    return data, problems


def _of_object(kind: str, value: Any) -> Component:
    """The component that would make this object, a default of a constructor."""
    reference = f'{type(value).__module__}:{type(value).__qualname__}'
    name = next((name for name, target in SECTIONS[kind].items() if target is type(value)), reference)
    arguments = {key: getattr(value, key) for key in inspect.signature(type(value)).parameters}
    component, problems = check_component(kind, name, arguments, (), ())
    assert not problems, problems
    return component


def _try(component: Component, path: Path) -> list[Problem]:
    target = resolve(component.kind, component.name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the run itself will warn
            if component.kind == 'optimizer':
                component.build([torch.nn.Parameter(torch.zeros(1))])
            else:
                part = component.instance
                broken = unkept(component.kind, part) if is_reference(component.name) else None
                if broken:
                    return [Problem(path, f'{component.name!r} is no {component.kind}: {broken}')]
    except ImportError as error:
        return [Problem(path, f'cannot be used here: {error}')]
    except Exception as error:  # a constructor may fail in any way (Composer's EMA with an AttributeError)
        text = str(error).removeprefix(f'{target.__name__}: ')
        text = text if component.kind in SECTIONS else f'{target.__name__} refuses these arguments: {text}'
        return [Problem(path, text)]
    return []
