"""Composer's algorithms, callbacks, loggers, optimizers and schedulers by name, and ours beside them.

The name is the class name in snake_case; a scheduler's goes without the word "scheduler". The constructor is the
schema. A name of ours wins over Composer's, which is then reachable as ``composer_<name>``.
"""

import functools
import importlib
import inspect
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer.core import Algorithm, Callback
from pydantic import create_model

from tread_composer.config.errors import Path, Problem, did_you_mean
from tread_composer.config.schema import Strict, check, native, plain, signature_model

__all__ = ['KINDS', 'Component', 'check_component', 'component_class', 'component_names', 'component_schema']

KINDS = ('algorithm', 'callback', 'logger', 'optimizer', 'scheduler')

# Where ours are: imported when used, so that loading a configuration never imports MLflow or diffusers.
_OURS = {
    'algorithm': {
        'direction_schedule': 'tread_composer.algorithms.direction_schedule:DirectionSchedule',
        'ema': 'tread_composer.algorithms.ema:EMA',
        'maskdit': 'tread_composer.algorithms.maskdit:MaskDiT',
        'power_ema': 'tread_composer.algorithms.power_ema:PowerEMA',
        'tread': 'tread_composer.algorithms.tread:Tread',
    },
    'callback': {
        'digits_quality': 'tread_composer.callbacks.digits_quality:DigitsQuality',
        'evaluation': 'tread_composer.callbacks.evaluation:Evaluation',
        'sample_grid': 'tread_composer.callbacks.sample_grid:SampleGrid',
    },
    'logger': {'mlflow': 'tread_composer.callbacks.mlflow_run:MLflowRun'},
}
# Arguments that the builders give, beside an optimizer's parameters.
_GIVEN = {'power_ema': ('settings_digest',)}
# Words that a rule for capital letters would tear apart.
_WORDS = {'WandB': 'Wandb', 'MLFlow': 'Mlflow', 'NaN': 'Nan', 'MLPerf': 'Mlperf', 'MosaicML': 'Mosaicml',
          'CometML': 'Cometml', 'AdamW': 'Adamw', 'SGDW': 'Sgdw'}  # fmt: skip
# Where Composer looks at a value only in the middle of training.
_NARROWER: dict[str, dict[str, Any]] = {
    'gradient_clipping': {'clipping_type': (Literal['adaptive', 'norm', 'value'], ...)},
}
# Pure constructors: called once at load, so that a value out of range is refused before data or model exist. Callbacks
# of Composer's and loggers are not: theirs may write or connect.
_TRIED = ('algorithm', 'optimizer', 'scheduler')


@dataclass(frozen=True)
class Component:
    """A part of the run by name, with arguments that its constructor's signature accepts.

    Args:
        kind: One of ``KINDS``.
        name: As YAML has it.
        kwargs: Validated arguments as plain YAML values.
    """

    kind: str
    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, *args: Any, **extra: Any) -> Any:
        """The object. ``args`` come first (an optimizer's parameters), ``extra`` adds what YAML cannot write."""
        settings, problems = check(component_schema(self.kind, self.name), self.kwargs)
        assert settings is not None, problems
        return component_class(self.kind, self.name)(*args, **native(settings), **extra)

    def to_plain(self) -> dict[str, Any]:
        """The arguments as written, for the resolved YAML."""
        return {key: plain(value) for key, value in self.kwargs.items()}


def component_names(kind: str) -> list[str]:
    """All names of a kind, sorted."""
    return sorted(_table(kind))


def component_class(kind: str, name: str) -> type:
    """The class behind a name.

    Raises:
        KeyError: The name is unknown.
        ImportError: A package that it needs is not installed.
    """
    found = _table(kind)[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(':')
        return getattr(importlib.import_module(module), attribute)
    return found


@functools.cache
def component_schema(kind: str, name: str) -> type[Strict]:
    """The constructor of a component as a strict section."""
    target = component_class(kind, name)
    schema = signature_model(target, skip=('params',) if kind == 'optimizer' else _GIVEN.get(name, ()))
    if name not in _NARROWER:
        return schema
    return create_model(target.__name__, __base__=schema, **_NARROWER[name])


@functools.cache
def _table(kind: str) -> dict[str, type | str]:
    ours = _OURS.get(kind, {})
    theirs = {_snake(one.__name__.removesuffix('Scheduler')): one for one in _classes(kind)}
    theirs = {f'composer_{name}' if name in ours else name: one for name, one in theirs.items()}
    if kind == 'logger':  # `mlflow` is ours; the other keeps the pattern of composer_ema
        theirs['composer_mlflow'] = theirs.pop('mlflow_logger')
    return {**theirs, **ours}


def _classes(kind: str) -> Iterable[type]:
    if kind == 'algorithm':
        return _subclasses(composer.algorithms, Algorithm)
    if kind == 'callback':
        return _subclasses(composer.callbacks, Callback)
    if kind == 'logger':
        base = composer.loggers.LoggerDestination
        return [one for one in _subclasses(composer.loggers, base) if one is not base]
    if kind == 'optimizer':
        own = _subclasses(composer.optim, torch.optim.Optimizer)
        return [*own, torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD]
    base = composer.optim.ComposerScheduler
    return [
        one for one in _subclasses(composer.optim, object) if one.__name__.endswith('Scheduler') and one is not base
    ]


def _subclasses(module: Any, base: type) -> list[type]:
    found = [getattr(module, name) for name in module.__all__]
    return [one for one in found if inspect.isclass(one) and issubclass(one, base)]


def _snake(name: str) -> str:
    for word, plain_word in _WORDS.items():
        name = name.replace(word, plain_word)
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()


def check_component(kind: str, name: Any, kwargs: Any, path: Path, name_path: Path) -> tuple[Component, list[Problem]]:
    """A component with its problems; the component is usable only if there are none.

    Args:
        kind: One of ``KINDS``.
        name: What stands where the name belongs.
        kwargs: What stands where its arguments belong.
        path: Where the arguments are in the tree.
        name_path: Where the name is.
    """
    empty = Component(kind, str(name))
    names = component_names(kind)
    if name not in names:
        return empty, [Problem(name_path, f'unknown {kind}.{did_you_mean(name, names)}', tuple(names))]
    if not isinstance(kwargs, dict):
        return empty, [Problem(path, f'{kwargs!r} is not a mapping of arguments; write {name}: {{}} for the defaults')]
    try:
        schema = component_schema(kind, name)
    except ImportError as error:
        return empty, [Problem(name_path, f'cannot be used here: {error}; install the package that is missing')]
    settings, problems = check(schema, kwargs, path)
    if settings is None:
        return empty, problems
    if kind == 'optimizer' and 'lr' not in kwargs:
        return empty, [Problem((*path, 'lr'), 'is missing; a run says its learning rate, for example lr: 1.0e-4')]
    component = Component(kind, name, plain(settings))
    pure = kind in _TRIED or (kind == 'callback' and name in _OURS['callback'])
    return component, _try(component, path) if pure else []


def _try(component: Component, path: Path) -> list[Problem]:
    target = component_class(component.kind, component.name)
    parameters = ([torch.nn.Parameter(torch.zeros(1))],) if component.kind == 'optimizer' else ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # the run itself will warn
            component.build(*parameters)
    except ImportError as error:
        return [Problem(path, f'cannot be used here: {error}')]
    except Exception as error:  # a constructor may fail in any way (Composer's EMA with an AttributeError)
        text = str(error).removeprefix(f'{target.__name__}: ')
        return [Problem(path, f'{target.__name__} refuses these arguments: {text}')]
    return []
