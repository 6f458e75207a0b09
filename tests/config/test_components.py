"""Components by name: Composer's and ours, with their constructors as schemas."""

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer.core import Algorithm, Callback, Event

from tread_composer.config import Component, part_names
from tread_composer.config.components import check_component, component_schema
from tread_composer.config.registry import KINDS, resolve

EVERY = [(kind, name) for kind in KINDS for name in part_names(kind)]


def classes(module, base):
    found = [getattr(module, name) for name in module.__all__]
    return {one for one in found if isinstance(one, type) and issubclass(one, base) and one is not base}


@pytest.mark.parametrize(
    ('kind', 'module', 'base'),
    [
        ('algorithm', composer.algorithms, Algorithm),
        ('callback', composer.callbacks, Callback),
        ('logger', composer.loggers, composer.loggers.LoggerDestination),
        ('optimizer', composer.optim, torch.optim.Optimizer),
    ],
)
def test_every_class_of_composer_has_a_name(kind, module, base):
    assert classes(module, base) <= {resolve(kind, name) for name in part_names(kind)}


def test_every_scheduler_of_composer_has_a_name():
    expected = {name for name in composer.optim.__all__ if name.endswith('Scheduler')} - {'ComposerScheduler'}
    assert {resolve('scheduler', name).__name__ for name in part_names('scheduler')} == expected


@pytest.mark.parametrize(('kind', 'name'), EVERY)
def test_unknown_arguments_are_refused(kind, name):
    _, problems = check_component(kind, name, {'no_such_argument': 1}, ('x',), ('x',))
    assert ('x', 'no_such_argument') in [problem.path for problem in problems]


def test_names():
    for kind, names in {
        'algorithm': {'mix_up', 'ema', 'composer_ema', 'tread', 'swa'},
        'callback': {'lr_monitor', 'nan_monitor', 'oom_observer', 'sample_grid', 'digits_quality'},
        'logger': {'mlflow', 'composer_mlflow', 'wandb_logger', 'tensorboard_logger'},
    }.items():
        assert names <= set(part_names(kind))
    assert {'adam', 'adamw', 'sgd', 'decoupled_adamw', 'decoupled_sgdw'} == set(part_names('optimizer'))
    assert resolve('algorithm', 'ema').__module__.startswith('tread_composer.')
    assert resolve('algorithm', 'composer_ema') is composer.algorithms.EMA


def test_build():
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = Component('optimizer', 'adamw', {'lr': 1.0, 'betas': [0.5, 0.6]}).build([weight])
    assert optimizer.param_groups[0]['lr'] == 1.0
    assert optimizer.param_groups[0]['betas'] == (0.5, 0.6)
    assert optimizer.param_groups[0]['params'][0] is weight
    clipping = Component('algorithm', 'gradient_clipping', {'clipping_type': 'norm', 'clipping_threshold': 2.0}).build()
    assert clipping.clipping_threshold == 2.0
    norm = Component('algorithm', 'low_precision_layer_norm', {'apply_at': 'init'}).build()
    assert norm.apply_at is Event.INIT
    grid = Component('callback', 'sample_grid', {'weights': 'raw'}).build(classes=[1])
    assert grid.classes == [1]


def test_schema_is_the_constructor():
    schema = component_schema('scheduler', 'cosine_annealing_with_warmup')
    assert list(schema.model_fields) == ['t_warmup', 't_max', 'alpha_f', 'scale_warmup']
    assert schema.model_fields['t_warmup'].is_required()
