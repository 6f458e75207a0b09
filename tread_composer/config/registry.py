"""Names that a YAML file may use for a part of a run, and the classes behind them.

Each room keeps the table of its own parts (``objectives.OBJECTIVES``, ``models.BACKBONES``, ...). Composer's
algorithms, callbacks, loggers, optimizers and schedulers have their class name in snake_case; a scheduler's goes
without the word "scheduler". A name of ours wins over Composer's, which is then reachable as ``composer_<name>``. A
part of another package is named ``package.module:Class``.
"""

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer.core import Algorithm, Callback
from composer.optim import ComposerScheduler

from tread_composer.autoencoders import AUTOENCODERS
from tread_composer.config.sections import DATA, NORMALIZATIONS
from tread_composer.core.named import import_named, is_reference, part_named
from tread_composer.core.protocols import Autoencoder, Backbone, Objective, TimeDistribution, Weighting
from tread_composer.metrics import FEATURES, METRICS
from tread_composer.models import BACKBONES
from tread_composer.objectives import OBJECTIVES, TIME_DISTRIBUTIONS, WEIGHTINGS
from tread_composer.samplers import GUIDANCE, SAMPLERS

__all__ = [
    'FROM_DATA', 'KINDS', 'PARTS', 'SECTIONS', 'TABLES', 'lacks', 'list_parts', 'part_names', 'resolve', 'unkept',
]  # fmt: skip

TABLES = {'algorithms': 'algorithm', 'callbacks': 'callback', 'loggers': 'logger'}
"""Sections of a run that hold parts by name, with the kind of those."""

_OF_THE_SAME_NAME = ('data', 'autoencoder', 'objective', 'latent_normalization', 'optimizer', 'scheduler')
PARTS = {'model': 'backbone'} | {kind: kind for kind in _OF_THE_SAME_NAME}
"""Sections of a run that are one part, with its kind."""

SECTIONS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    'data': DATA,
    'latent_normalization': NORMALIZATIONS,
    'autoencoder': AUTOENCODERS,
    'backbone': BACKBONES,
    'objective': OBJECTIVES,
    'time_distribution': TIME_DISTRIBUTIONS,
    'weighting': WEIGHTINGS,
}
"""Kinds that only we have, by the tables of their rooms: a run has one of each, in a section that says its ``name``."""

MEASURING: Mapping[str, Mapping[str, Any]] = {
    'sampler': SAMPLERS,
    'guidance': GUIDANCE,
    'metric': METRICS,
    'features': FEATURES,
}
"""Kinds that callbacks and commands name in a setting, such as ``callbacks.evaluation.metrics``."""

KINDS = ('algorithm', 'callback', 'logger', 'optimizer', 'scheduler', *SECTIONS)

FROM_DATA = ('latent_size', 'in_channels', 'num_classes')
"""Arguments of a backbone that are not for YAML: the data decide them."""

# What a part of another package has to inherit from, or to have the methods of.
_BASES: Mapping[str, type] = {
    'algorithm': Algorithm,
    'callback': Callback,
    'logger': composer.loggers.LoggerDestination,
    'optimizer': torch.optim.Optimizer,
}
_PROTOCOLS: Mapping[str, type] = {
    'autoencoder': Autoencoder,
    'backbone': Backbone,
    'objective': Objective,
    'scheduler': ComposerScheduler,
    'time_distribution': TimeDistribution,
    'weighting': Weighting,
}

# Imported when they are used, so that loading a configuration never imports MLflow or diffusers.
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
_OWNERS = {'tread_composer': 'ours', 'composer': 'Composer'}
# Words that a rule for capital letters would tear apart.
_WORDS = {'WandB': 'Wandb', 'MLFlow': 'Mlflow', 'NaN': 'Nan', 'MLPerf': 'Mlperf', 'MosaicML': 'Mosaicml',
          'CometML': 'Cometml', 'AdamW': 'Adamw', 'SGDW': 'Sgdw'}  # fmt: skip


def part_names(kind: str) -> list[str]:
    """All names of a kind, sorted; of a kind of our own, in the order of its table."""
    return list(SECTIONS[kind]) if kind in SECTIONS else sorted(_table(kind))


def list_parts() -> list[tuple[str, str, str, str]]:
    """Every part that a YAML file can name: kind, name, whose it is, and the first line of its docstring."""
    rows = []
    parts = [(kind, name) for kind in KINDS for name in part_names(kind)]
    parts += [(kind, name) for kind, table in MEASURING.items() for name in table]
    for kind, name in parts:
        try:
            target = part_named(name, MEASURING[kind]) if kind in MEASURING else resolve(kind, name)
            text, owner = (inspect.getdoc(target) or '').split('\n\n')[0], target.__module__.partition('.')[0]
        except (ImportError, ValueError) as error:
            text, owner = f'cannot be used here: {error}', 'tread_composer'
        rows.append((kind, name, _OWNERS.get(owner, owner), ' '.join(text.split())))
    return rows


def resolve(kind: str, name: str) -> Callable[..., Any]:
    """The class, or function that makes an object, behind a name; ``ImportError`` if it or a package is not there."""
    target = name if is_reference(name) else _table(kind)[name]
    return import_named(target) if isinstance(target, str) else target


def lacks(kind: str, target: Any) -> str | None:
    """What a class of another package lacks to be a part of this kind, in words; None if it may be one.

    Asked before the class is called: a configuration may come out of a file from anywhere, and ``subprocess:Popen``
    names a class too.
    """
    if not inspect.isclass(target):
        return 'it is no class'
    base = _BASES.get(kind)
    if base is not None:
        return None if issubclass(target, base) else f'it does not inherit from {base.__module__}.{base.__qualname__}'
    if kind not in _PROTOCOLS:
        return 'other packages have none'
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):
        return 'it is no class whose constructor says its arguments'
    missing = [name for name in FROM_DATA if name not in parameters]
    if kind == 'backbone' and missing:
        return f'its constructor has no {", ".join(missing)}, which the data decide ({_source(kind)})'
    methods = [name for name in _promised(kind) if inspect.isfunction(vars(_PROTOCOLS[kind]).get(name))]
    # Not hasattr: each class can be called, and so has a `__call__` of its metaclass.
    missing = [name for name in methods if not any(name in vars(parent) for parent in target.__mro__)]
    return f'it has no {", ".join(missing)} ({_source(kind)})' if missing else None


def unkept(kind: str, part: Any) -> str | None:
    """Which promises of its protocol an object of another package does not keep, in words; None if it keeps all."""
    missing = [name for name in _promised(kind) if not hasattr(part, name)]
    return f'it has no {", ".join(missing)} ({_source(kind)})' if missing else None


def _promised(kind: str) -> list[str]:
    if kind not in _PROTOCOLS:
        return []
    protocol = _PROTOCOLS[kind]
    names = sorted({*vars(protocol), *protocol.__annotations__})
    return [name for name in names if name == '__call__' or name[0] != '_']


def _source(kind: str) -> str:
    return f'{_PROTOCOLS[kind].__module__}.{_PROTOCOLS[kind].__name__}'


@functools.cache
def _table(kind: str) -> Mapping[str, Callable[..., Any] | str]:
    if kind in SECTIONS:
        return SECTIONS[kind]
    ours = _OURS.get(kind, {})
    theirs = {_snake(target.__name__.removesuffix('Scheduler')): target for target in _classes(kind)}
    theirs = {f'composer_{name}' if name in ours else name: target for name, target in theirs.items()}
    if kind == 'logger':  # `mlflow` is ours; the other keeps the pattern of composer_ema
        theirs['composer_mlflow'] = theirs.pop('mlflow_logger')
    return {**theirs, **ours}


def _classes(kind: str) -> list[type]:
    modules = {'algorithm': composer.algorithms, 'callback': composer.callbacks, 'logger': composer.loggers}
    module: Any = modules.get(kind, composer.optim)
    exported = [getattr(module, name) for name in module.__all__]
    classes = [target for target in exported if inspect.isclass(target)]
    if kind == 'scheduler':  # a protocol, which its classes do not inherit from
        return [each for each in classes if each.__name__.endswith('Scheduler') and each is not ComposerScheduler]
    torchs = [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD] if kind == 'optimizer' else []
    base = _BASES[kind]
    return [*(each for each in classes if issubclass(each, base) and each is not base), *torchs]


def _snake(name: str) -> str:
    for word, plain_word in _WORDS.items():
        name = name.replace(word, plain_word)
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', name).lower()
