"""Questions about the present call stack, which eager code can ask and compiled code never does."""

import inspect
import sys
from collections.abc import Iterator, Mapping
from types import FrameType

import torch.utils.checkpoint
from torch import Tensor, nn

__all__ = ['in_forward', 'inside_reentrant']

_MODULE_CALL = nn.Module._call_impl.__code__
_REENTRANT = torch.utils.checkpoint.CheckpointFunction.forward.__code__
_CHECKPOINT_FILE = torch.utils.checkpoint.__file__


def in_forward(block: nn.Module) -> bool:
    """Whether the present call belongs to a forward pass through a model that holds ``block``.

    It does inside of any module's call, inside of torch's checkpointing (which runs parts of a forward pass again
    during the backward pass, where no module is called), and inside of a method of a module that holds the block, with
    tensors among its arguments: ``model.forward_features(x)``. It does not in ``for b in model.blocks: shard(b)``.
    """
    if torch.compiler.is_compiling():
        return True
    if any(frame.f_code is _MODULE_CALL or frame.f_code.co_filename == _CHECKPOINT_FILE for frame in _callers()):
        return True
    # Second, because reading another frame's variables is slow.
    return any(_is_forward_method(frame, block) for frame in _callers())


def inside_reentrant() -> bool:
    """Whether the present call is made by torch's reentrant checkpointing."""
    return any(frame.f_code is _REENTRANT for frame in _callers())


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)  # innermost first
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_forward_method(frame: FrameType, block: nn.Module) -> bool:
    code = frame.f_code
    # Behind the named arguments come *args and **kwargs, where the function has them.
    catching = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + catching]
    if not names:
        return False
    variables = frame.f_locals
    owner, *arguments = [variables.get(name) for name in names]  # of a method: self first
    if not isinstance(owner, nn.Module) or not (code.co_name == 'forward' or any(map(_has_tensor, arguments))):
        return False
    return any(module is block for module in owner.modules())


def _has_tensor(value: object, depth: int = 3) -> bool:
    """Whether a value is a tensor or a batch of them, nested at most ``depth`` times."""
    if isinstance(value, Mapping):
        # A state dict is no batch: its keys are paths. Code that walks over the blocks to load it needs plain ones.
        if any(isinstance(key, str) and '.' in key for key in value):
            return False
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return depth > 0 and any(_has_tensor(member, depth - 1) for member in value)
    return isinstance(value, Tensor)
