"""Whether this machine can do a run: device, precision, kernel, attention, sharding."""

import os
from collections.abc import Iterator

import torch

from tread_composer.config.checks import sharding_needs_gpu
from tread_composer.config.errors import ConfigError, Problem
from tread_composer.config.tree import Config, backbone_arguments
from tread_composer.core.errors import UserError
from tread_composer.models.attention import choose_attention
from tread_composer.models.ssd import fused_refusal

__all__ = ['attention_dtypes', 'check_machine']

_TRAINED_IN = {'amp_bf16': torch.bfloat16, 'amp_fp8': torch.bfloat16, 'amp_fp16': torch.float16}


def check_machine(config: Config, source: str = '') -> None:
    """``ConfigError`` if this machine has no such device, or one that cannot do as precision, kernel or attention say.

    Loading does not ask, so that a laptop can plan for a cluster. ``source`` is what to call the configuration.
    """
    problems = list(_problems(config))
    if problems:
        raise ConfigError.from_problems(problems, lambda path: source)


def _problems(config: Config) -> Iterator[Problem]:
    has_gpu, precision = torch.cuda.is_available(), config.precision_name
    if config.device == 'gpu' and not has_gpu:
        text = "'gpu': torch finds no CUDA device here; take device=cpu or another machine"
        yield Problem(('device',), text)
    if config.device == 'mps' and not torch.backends.mps.is_available():
        yield Problem(('device',), "'mps': this is no Mac with Apple's GPU; take device=cpu")
    on_cpu = config.device == 'cpu' or (config.device is None and not has_gpu)
    if on_cpu:
        yield from sharding_needs_gpu(config)
    if on_cpu and precision in ('amp_bf16', 'amp_fp16', 'amp_fp8'):
        text = f'{precision!r} needs a GPU, and the run would be on the CPU; take precision=fp32'
        yield Problem(('precision',), text)
    if on_cpu and config.optimizer.kwargs.get('capturable'):
        yield Problem(('optimizer', 'capturable'), 'true is for CUDA graphs, and the run would be on the CPU')
    if config.model.kwargs.get('kernel') == 'fused':
        reason = fused_refusal(torch.device('cpu' if on_cpu else 'cuda'))
        if reason is not None:
            text = f"'fused' cannot run here: {reason}; take model.kernel=torch, which gives the same result"
            yield Problem(('model', 'kernel'), text)
    fault = _attention_fault(config, on_cpu)
    if fault is not None:
        yield Problem(('model', 'attention'), fault)
    if on_cpu and precision is None and 'low_precision_layer_norm' in config.algorithms:
        text = 'does nothing here: without a precision, Composer trains in float32 on the CPU; take it out'
        yield Problem(('algorithms', 'low_precision_layer_norm'), text)


def _attention_fault(config: Config, on_cpu: bool) -> str | None:
    """Tries ``model.attention`` with the sizes that the configuration says; torch's own needs no trial."""
    name, sizes = config.model.kwargs.get('attention', 'sdpa'), backbone_arguments(config.model)
    if name == 'sdpa' or not {'hidden_size', 'num_heads'} <= sizes.keys():
        return None
    if name == 'flex' and on_cpu and config.compile:
        return "'flex' has no compiled backward pass on a CPU; take compile: false, or attention: sdpa"
    heads = sizes['num_heads'], sizes['hidden_size'] // sizes['num_heads']
    device = torch.device('cpu') if on_cpu else torch.device('cuda', int(os.environ.get('LOCAL_RANK', '0')))
    try:
        choose_attention(name, device, (heads,), attention_dtypes(config, device), True)
    except UserError as error:
        return str(error)
    return None


def attention_dtypes(config: Config, device: torch.device) -> tuple[torch.dtype, ...]:
    """What attention runs in: the dtype of training on this device, and float32, in which images are drawn."""
    # Composer's default where the configuration has no precision.
    precision = config.precision_name or ('fp32' if device.type == 'cpu' else 'amp_fp16')
    return tuple(dict.fromkeys((_TRAINED_IN.get(precision, torch.float32), torch.float32)))
