"""Components by name: Composer's and ours, with their constructors as schemas."""

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import pytest
import torch
from composer.core import Algorithm, Callback, Event

from tread_composer.config import Component, load_config, part_names
from tread_composer.config.components import check_component, component_schema
from tread_composer.config.registry import KINDS, resolve
from tread_composer.routing import Route

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
    assert {'mix_up', 'ema', 'composer_ema', 'tread', 'swa'} <= set(part_names('algorithm'))
    assert {'lr_monitor', 'nan_monitor', 'oom_observer', 'sample_grid', 'digits_quality'} <= set(part_names('callback'))
    assert {'mlflow', 'composer_mlflow', 'wandb_logger', 'tensorboard_logger'} <= set(part_names('logger'))
    assert {'adam', 'adamw', 'sgd', 'decoupled_adamw', 'decoupled_sgdw'} == set(part_names('optimizer'))
    assert resolve('algorithm', 'ema').__module__.startswith('tread_composer.')
    assert resolve('algorithm', 'composer_ema') is composer.algorithms.EMA


@pytest.mark.parametrize(
    ('override', 'part'),
    [
        ('algorithms.gradient_clipping={}', 'algorithms.gradient_clipping.clipping_threshold: is missing'),
        (
            'algorithms.gradient_clipping={clipping_type: foo, clipping_threshold: 1}',
            "clipping_type: 'foo' is not one of 'adaptive', 'norm', 'value'",
        ),
        ('algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: x}', "'x' is not a number"),
        ('algorithms.gated_linear_units={act_fn: relu}', 'which YAML cannot write'),
        ('algorithms.composer_ema={half_life: null, smoothing: 0.9}', 'EMA refuses these arguments'),
        ('algorithms.composer_ema={half_life: 10}', 'algorithms.composer_ema.half_life: a bare number has no unit'),
        ('algorithms.swa={swa_start: soon}', "algorithms.swa.swa_start: 'soon' is not a time"),
        ('algorithms.low_precision_layer_norm={apply_at: never}', "'never' is not one of 'init', "),
        ('algorithms.tread=half', "algorithms.tread: 'half' is not a mapping of arguments"),
        ('algorithms.tread.selection_rate=1.5', 'algorithms.tread: Tread refuses these arguments: selection_rate: 1.5'),
        ('algorithms.tread.end_time=0.9', 'algorithms.tread.end_time: a bare number has no unit'),
        ('algorithms.tread.end_time=0.9durr', "algorithms.tread.end_time: '0.9durr' is not a time"),
        ('algorithms.tread.token_arguments=rope', "'rope' is not a list"),
        ('algorithms.tread.start=7', 'algorithms.tread: the route from block 7 to block -4 does not fit 8 blocks'),
        ('algorithms.tread={start: 1, routes: [{start: 3}]}', 'give either routes or start'),
        ('callbacks.generate={prompts: [a], interval: 1ba, top_k: 3}', 'callbacks.generate.top_k: unknown setting'),
        ('callbacks.nan_monitor={x: 1}', 'callbacks.nan_monitor.x: unknown setting'),
        ('callbacks.sample_grid={}', "callbacks.sample_grid.weights: 'ema', but there is no algorithms.ema"),
        ('callbacks.digits_quality={num_samples: 5, weights: raw}', 'DigitsQuality refuses these arguments'),
        ('callbacks.speed_monitor.window_size=many', "'many' is not a whole number"),
        ('callbacks.early_stopper={monitor: a, dataloader_label: b, patience: 3}', 'a bare number has no unit'),
        ('loggers.mlflow={}', 'loggers.mlflow.experiment_name: is missing'),
        ('loggers.mlflow={experiment_name: 3}', 'loggers.mlflow.experiment_name: 3 is not text'),
        ('optimizer.betas=[0.9]', 'optimizer.betas'),
        ('optimizer.lr=-1.0', 'AdamW refuses these arguments: Invalid learning rate'),
        ('optimizer={name: sgd}', 'optimizer.lr: is missing'),
        ('optimizer.params=[1]', 'optimizer.params: unknown setting'),
        ('scheduler={t_warmup: 3ba}', 'scheduler.name: is missing; say which scheduler'),
        ('scheduler={name: constant_with_warmup}', 'scheduler.t_warmup: is missing'),
        ('scheduler={name: multi_step, milestones: [1ep, 2]}', 'scheduler.milestones.1: a bare number has no unit'),
    ],
)
def test_refused(override, part, message):
    assert part in message(override)


def test_overlapping_routes(base, message):
    base.write_text(base.read_text().replace('{start: 2, end: -4, selection_rate: 0.5}', '{}'))
    assert 'overlap' in message('algorithms.tread={routes: [{start: 1, end: 3}, {start: 3, end: 5}]}')
    config = load_config(base, ['algorithms.tread={routes: [{start: 1, end: 2}, {start: 3}]}'])
    assert config.algorithms['tread'].build().routes == (Route(1, 2), Route(3, -4))


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
    grid = Component('callback', 'sample_grid', {'weights': 'raw'}).build(class_names=['a'])
    assert grid.class_names == ['a']


def test_schema_is_the_constructor():
    schema = component_schema('scheduler', 'cosine_annealing_with_warmup')
    assert list(schema.model_fields) == ['t_warmup', 't_max', 'alpha_f', 'scale_warmup']
    assert schema.model_fields['t_warmup'].is_required()
