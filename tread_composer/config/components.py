"""Parts of a run by name: checked once against the constructor's signature, built once, asked afterwards."""

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union

import torch
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from tread_composer.config.errors import Path, Problem
from tread_composer.config.registry import FROM_DATA, SECTIONS, lacks, part_names, resolve, unkept
from tread_composer.config.schema import Length, Strict, native, part_kind, plain, signature_fields, strict_model
from tread_composer.config.validation import check, shown
from tread_composer.core.errors import did_you_mean
from tread_composer.core.named import is_reference

__all__ = ['Component', 'check_component', 'check_section', 'component_schema']

# Arguments that are not for YAML: the data or the run decide them, and the builders give them.
_GIVEN = {'algorithm': ('settings_digest',), 'backbone': FROM_DATA, 'optimizer': ('params',)}
# What a section without a name is.
_UNNAMED = {'backbone': {'name': 'dit'}, 'latent_normalization': {'name': 'per_channel'}}


def _epochs_or_batches(time: str) -> str:
    if time.endswith(('ep', 'ba')):
        return time
    raise PydanticCustomError(
        'rule', "{value}: Composer counts epochs or batches here; write '2ep' or '200ba'", {'value': repr(time)}
    )


# Where Composer looks at a value only in the middle of training.
_NARROWER: dict[str, dict[str, Any]] = {
    # torch's own steps fail with it on weights that are trained.
    **{name: {'differentiable': (Literal[False], False)} for name in ('adam', 'adamw', 'sgd')},
    'early_stopper': {'patience': (Annotated[Length, AfterValidator(_epochs_or_batches)], 1)},
    'gradient_clipping': {'clipping_type': (Literal['adaptive', 'norm', 'value'], ...)},
}
# Composer says so when it makes them, behind the data and the model.
_PACKAGES = {
    'cometml_logger': 'comet_ml', 'mlperf_callback': 'mlperf_logging', 'mosaicml_logger': 'mcli',
    'neptune_logger': 'neptune', 'slack_logger': 'slack_sdk', 'tensorboard_logger': 'tensorboard',
    'wandb_logger': 'wandb',
}  # fmt: skip
# Pure constructors: called at load, so that a value out of range is refused before data or model exist. Loggers' are
# not, for they may write or connect; of callbacks, those that can be asked what speaks against them in a run.
_PURE = ('algorithm', 'autoencoder', 'objective', 'optimizer', 'scheduler', 'time_distribution', 'weighting')


@dataclass(frozen=True)
class Component:
    """A part of the run by name, with arguments that its constructor's signature accepts."""

    kind: str  # one of `registry.KINDS`
    name: str  # as YAML has it, or `package.module:Class`
    kwargs: dict[str, Any] = field(default_factory=dict)  # validated, as plain YAML values

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
    fields, refused = signature_fields(target, _GIVEN.get(kind, ()))
    fields |= _NARROWER.get(name, {})
    # A network's sizes one by one, or a published size by `preset`, which decides them; and its attention.
    presets: Mapping[str, Mapping[str, int]] = getattr(target, 'presets', {}) if kind == 'backbone' else {}
    if presets:
        optional = {name: (Union[fields[name][0], None], None) for name in next(iter(presets.values()))}  # noqa: UP007
        fields = {'preset': (Literal[tuple(presets)] | None, None), **fields, **optional}  # type: ignore[operator]
    attentions: tuple[str, ...] = getattr(target, 'attentions', ()) if kind == 'backbone' else ()
    if attentions:
        fields['attention'] = (Literal[attentions], 'sdpa')
    return strict_model(target.__name__, fields, refused)


def check_section(kind: str, section: Any, path: Path) -> tuple[Component, list[Problem]]:
    """A part whose section at ``path`` says its ``name``, with its problems; usable only if there are none."""
    name_path = (*path, 'name')
    if not isinstance(section, dict):
        return Component(kind, ''), [Problem(path, f'{shown(section)} is not a mapping with a name and arguments')]
    arguments = {**_UNNAMED.get(kind, {}), **section}
    if 'name' not in arguments:
        text = f'is missing; say which {kind}'
        if kind in SECTIONS:
            text = f'is missing; say which kind this is, for example name: {part_names(kind)[-1]}'
        return Component(kind, ''), [Problem(name_path, text)]
    return check_component(kind, arguments.pop('name'), arguments, path, name_path)


def check_component(kind: str, name: Any, kwargs: Any, path: Path, name_path: Path) -> tuple[Component, list[Problem]]:
    """A component with its problems; usable only if there are none.

    ``name`` and ``kwargs`` are what stands at ``name_path`` and ``path``, where they belong.
    """
    empty, names = Component(kind, str(name)), part_names(kind)
    if name not in names and not is_reference(name):
        text = f'{shown(name)} is unknown.' if kind in SECTIONS else f'unknown {kind}.'
        return empty, [Problem(name_path, f'{text}{did_you_mean(name, names)}', tuple(names))]
    if not isinstance(kwargs, dict):
        return empty, [
            Problem(path, f'{shown(kwargs)} is not a mapping of arguments; write {name}: {{}} for the defaults')
        ]
    remedy = 'install the package that is missing'
    try:
        if is_reference(name):
            remedy = 'the part before the colon must be a module that Python can import from here (PYTHONPATH), the '
            remedy += 'part behind it a class in it'
            lacking = lacks(kind, resolve(kind, name))
            if lacking:
                return empty, [Problem(name_path, f'{name!r} is no {kind}: {lacking}')]
        schema = component_schema(kind, name)
    except ImportError as error:
        return empty, [Problem(name_path, f'cannot be used here: {error}; {remedy}')]
    data, problems = _with_parts(schema, kwargs, path)
    siblings = {sibling: component_schema(kind, sibling) for sibling in names} if kind in SECTIONS else {}
    settings, own_problems = check(schema, data, path, siblings=siblings and {**siblings, name: schema})
    problems += own_problems
    if settings is None or problems:
        return empty, problems
    if kind == 'optimizer' and 'lr' in schema.model_fields and 'lr' not in kwargs:
        return empty, [Problem((*path, 'lr'), 'is missing; a run says its learning rate, for example lr: 1.0e-4')]
    if name in _PACKAGES and importlib.util.find_spec(_PACKAGES[name]) is None:
        return empty, [Problem(path, f'cannot be used here: the package {_PACKAGES[name]!r} is not installed')]
    component = Component(kind, name, plain(settings, defaults=kind in SECTIONS))
    component.__dict__['settings'] = settings  # validated once
    fault = _fault(component) if kind in _PURE or hasattr(resolve(kind, name), 'problems') else None
    return component, [] if fault is None else [Problem(path, fault)]


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
            problems.append(Problem((*path, name), 'null is not a mapping; leave the key out for its default'))
    return data, problems


def _of_object(kind: str, value: Any) -> Component:
    """The component that would make this object, a default of a constructor."""
    reference = f'{type(value).__module__}:{type(value).__qualname__}'
    name = next((name for name, target in SECTIONS[kind].items() if target is type(value)), reference)
    arguments = {key: getattr(value, key) for key in inspect.signature(type(value)).parameters}
    component, problems = check_component(kind, name, arguments, (), ())
    assert not problems, problems
    return component


def _fault(component: Component) -> str | None:
    """What its constructor has against the arguments, or what the object lacks to be of its kind."""
    kind, name = component.kind, component.name
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the run itself will warn
            if kind == 'optimizer':
                component.build([torch.nn.Parameter(torch.zeros(1))])
                return None
            part = component.instance
        broken = unkept(kind, part) if is_reference(name) else None
        return None if broken is None else f'{name!r} is no {kind}: {broken}'
    except ImportError as error:
        return f'cannot be used here: {error}'
    except Exception as error:  # a constructor may fail in any way (Composer's EMA with an AttributeError)
        title = resolve(kind, name).__name__
        text = str(error).removeprefix(f'{title}: ')
        return text if kind in SECTIONS else f'{title} refuses these arguments: {text}'
