"""Whether this machine can compute attention as ``model.attention`` says, asked before data or ranks are waited for."""

import os

import torch

from tread_composer.config.errors import Problem
from tread_composer.config.tree import Config, backbone_arguments
from tread_composer.core.errors import UserError
from tread_composer.models.attention import choose_attention

__all__ = ['attention_dtypes', 'attention_problems']

_TRAINED_IN = {'amp_bf16': torch.bfloat16, 'amp_fp8': torch.bfloat16, 'amp_fp16': torch.float16}


def attention_problems(config: Config, on_cpu: bool) -> list[Problem]:
    """The probe of ``model.attention``, with the sizes that the configuration says; none for torch's own.

    Args:
        config: A loaded configuration.
        on_cpu: Whether the run would be on the CPU.
    """
    name, sizes = config.model.kwargs.get('attention', 'sdpa'), backbone_arguments(config.model)
    if name == 'sdpa' or not {'hidden_size', 'num_heads'} <= sizes.keys():
        return []
    if name == 'flex' and on_cpu and config.compile:
        text = "'flex' has no compiled backward pass on a CPU; take compile: false, or attention: sdpa"
        return [Problem(('model', 'attention'), text)]
    heads = sizes['num_heads'], sizes['hidden_size'] // sizes['num_heads']
    device = torch.device('cpu') if on_cpu else torch.device('cuda', int(os.environ.get('LOCAL_RANK', '0')))
    try:
        choose_attention(name, device, (heads,), attention_dtypes(config, device), True)
    except UserError as error:
        return [Problem(('model', 'attention'), str(error))]
    return []


def attention_dtypes(config: Config, device: torch.device) -> tuple[torch.dtype, ...]:
    """What attention runs in: the dtype of training, and float32, in which images are drawn.

    Args:
        config: A loaded configuration.
        device: Of the run; it decides the precision where the configuration says none.
    """
    precision = getattr(config.precision, 'value', config.precision)
    if precision is None:  # Composer's default
        precision = 'fp32' if device.type == 'cpu' else 'amp_fp16'
    return tuple(dict.fromkeys((_TRAINED_IN.get(precision, torch.float32), torch.float32)))
