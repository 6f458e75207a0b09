"""The Trainer's keywords that a YAML file may set, read from ``composer.Trainer`` itself."""

import dataclasses
import os
from typing import Annotated, Any, Literal

import torch
from composer import Trainer
from composer.core import Time, TimeUnit
from composer.profiler import Profiler, cyclic_schedule
from composer.utils.parallelism import FSDP2Config, FSDPConfig
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from tread_composer.config.schema import Length, Strict, signature_fields, signature_model, strict_model, yaml_type

__all__ = ['BUILT_BY_US', 'TrainerSettings', 'fsdp_section']

BUILT_BY_US = {
    'model': '',  # a section of our own
    'algorithms': '',
    'callbacks': '',
    'loggers': '',
    'run_name': '',
    'seed': '',
    'train_dataloader': "is made from 'data' and 'global_train_batch_size'",
    'eval_dataloader': "is made from 'data' and 'global_eval_batch_size'",
    'train_dataloader_label': "is always 'train'",
    'optimizers': "is made from 'optimizer'",
    'schedulers': "is made from 'scheduler'",
    'algorithm_passes': 'takes functions, which YAML cannot write; use the Trainer in Python',
    'load_object_store': 'takes an object; write a URI (s3://bucket/...) in load_path',
    'accumulate_train_batch_on_tokens': 'is for text: our batches have no token counts',
}
"""Keywords of the Trainer that are no plain YAML settings, and what is to be done instead."""


_OBJECTS = ('ignored_modules', 'load_planner', 'save_planner', 'process_group')


def fsdp_section(version: str) -> type[Strict]:
    """``parallelism_config.fsdp`` as a strict section, of FSDP1 or 2: Composer takes any name there without a word."""
    kind, foreign = (FSDP2Config, FSDPConfig) if version == '2' else (FSDPConfig, FSDP2Config)
    fsdp1, fsdp2 = 'FSDP1: take FSDP_VERSION=2 out of the environment', 'FSDP2: set FSDP_VERSION=2 in the environment'
    refused = {
        entry.name: f'is a setting of {fsdp1 if version == "2" else fsdp2}' for entry in dataclasses.fields(foreign)
    }
    fields: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        refused.pop(entry.name, None)
        if entry.name in _OBJECTS:
            refused[entry.name] = 'takes an object, which YAML cannot write; use the Trainer in Python'
        elif not entry.name.startswith('_'):
            annotation = str | dict[str, Any] if entry.name == 'mixed_precision' else yaml_type(entry.type, entry.name)
            fields[entry.name] = (annotation, entry.default)
    fields.pop('device_mesh', None)
    degrees = 'data_parallel_replicate_degree', 'data_parallel_shard_degree'
    refused['device_mesh'] = f'is made by Composer; FSDP1 takes {" and ".join(degrees)}'
    if version == '2':
        reason = f'Composer shards over all ranks under FSDP2; replicas of shards (HSDP) are a setting of {fsdp1}'
        refused |= dict.fromkeys(degrees, reason)
    return strict_model(kind.__name__, fields, refused)


class ParallelismSettings(Strict):
    """``parallelism_config``: sharding. Tensor parallelism needs a plan made of objects, so it is left to Python."""

    fsdp: fsdp_section(os.environ.get('FSDP_VERSION', '1')) | None = None  # type: ignore[valid-type]


def _backend(name: str) -> str:
    names = torch.compiler.list_backends(exclude_tags=())
    if name not in names:
        raise PydanticCustomError(
            'rule', '{value} is none of {names}', {'value': repr(name), 'names': ', '.join(names)}
        )
    return name


_MODES = Literal['default', 'reduce-overhead', 'max-autotune', 'max-autotune-no-cudagraphs']


def _compile_section() -> type[Strict]:
    """``compile_config``: arguments of ``torch.compile`` for the whole model."""
    fields, refused = signature_fields(torch.compile, skip=('model',))
    names = {'backend': (Annotated[str, AfterValidator(_backend)], 'inductor'), 'mode': (_MODES | None, None)}
    return strict_model('CompileSettings', fields | names, refused)


def _profiler_section() -> type[Strict]:
    """``profiler``: Composer's arguments, its cyclic ``schedule`` as a section; traces go into the run's folder."""
    fields, refused = signature_fields(Profiler, skip=('schedule', 'trace_handlers'))
    schedule = signature_model(cyclic_schedule)
    # Composer's default would be a folder where the run was started, and uploads.
    own = dict.fromkeys(('torch_prof_folder', 'torch_prof_remote_file_name', 'torch_prof_memory_remote_file_name'))
    fields |= dict.fromkeys(own, (str | None, None))
    refused['trace_handlers'] = 'is made by us: JSON traces beside those of torch'
    return strict_model('ProfilerSettings', {'schedule': (schedule, schedule()), **fields}, refused)


def _training_length(text: str) -> str:
    if Time.from_timestring(text).unit == TimeUnit.DURATION:
        raise PydanticCustomError(
            'time', "{value} is no length of a run; write for example '100ep'", {'value': repr(text)}
        )
    return text


# Tighter than the Trainer's own annotations, or with a default of ours.
_TIGHTER: dict[str, Any] = {
    'max_duration': (Annotated[Length, AfterValidator(_training_length)], ...),
    # Composer's default is the number 1, which is an epoch.
    'eval_interval': (Length, '1ep'),
    'save_interval': (Length, '1ep'),
    'console_stream': (Literal['stdout', 'stderr'], 'stderr'),
    'device': (Literal['cpu', 'gpu', 'mps'] | None, None),
    'python_log_level': (Literal['DEBUG', 'INFO', 'WARNING', 'ERROR', 'CRITICAL'] | None, None),
    'compile_config': (_compile_section() | None, None),
    'profiler': (_profiler_section() | None, None),
    # A number with a point would be a share of tokens: for text only.
    'device_train_microbatch_size': (int | Literal['auto'] | None, None),
    'parallelism_config': (ParallelismSettings | None, None),
    # The loader turns it on wherever there is a save_folder.
    'autoresume': (bool, False),
}


def _settings() -> type[Strict]:
    fields, refused = signature_fields(Trainer, skip=tuple(BUILT_BY_US))
    missing = set(_TIGHTER) - set(fields) - set(refused)
    assert not missing, f'composer.Trainer has no keyword {missing}'
    reasons = {name: reason for name, reason in BUILT_BY_US.items() if reason}
    return strict_model('TrainerSettings', fields | _TIGHTER, refused | reasons)


TrainerSettings: Any = _settings()
"""Strict section with one field for each keyword of the Trainer that YAML can write, under Composer's names."""
