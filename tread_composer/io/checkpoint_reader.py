"""Files of ``torch.save``, read without running what a pickle may hold.

Composer itself reads its checkpoints with ``weights_only=False``. Here, where only weights are wanted, torch's
restricted reader does: it makes tensors, plain values and the few harmless types below, and refuses whatever else the
file names.
"""

import argparse
import datetime
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.torch_version import TorchVersion

from tread_composer.core.errors import UserError

__all__ = ['read_checkpoint', 'read_pickled']

# What checkpoints hold besides tensors and plain values: times of Composer's clock, numpy's generator, versions; and in
# those of DiT and SiT, the words of their command line.
_HARMLESS = [
    argparse.Namespace,
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    # What rebuilds arrays and numbers: their module has another name in older versions of numpy.
    np.zeros(0).__reduce__()[0],  # type: ignore[index]
    np.float64(0).__reduce__()[0],  # type: ignore[index]
    *(type(np.dtype(name)) for name in ('bool', 'uint8', 'int32', 'uint32', 'int64', 'uint64', 'float32', 'float64')),
]


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Read a file of ``torch.save`` on the CPU, without running code that it may name.

    Raises:
        UserError: It cannot be read, is cut off or no such file, or holds objects that only running code could make.
    """
    try:
        with torch.serialization.safe_globals(_HARMLESS):
            # Mapped: of a checkpoint's optimizer and weights only what is taken out is ever read from the disk.
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file; give the path of a checkpoint') from None
    except pickle.UnpicklingError as error:
        name = re.search(r'GLOBAL ([\w.]+)', str(error))
        if name is None:
            raise UserError(f'{path}: no file of torch.save, or a damaged one: {_first_line(error)}') from None
        raise UserError(
            f'{path}: refused: to read {name[1]} out of it could run code, and weights need no such thing. Nothing '
            f'was run. If you trust the file, save its tensors again in a process of your own: torch.save({{name: '
            f'tensor, ...}})'
        ) from None
    except Exception as error:  # a damaged file sends the unpickler anywhere: IndexError, AttributeError, struct.error
        raise UserError(
            f'{path}: cannot be read as a file of torch.save: {_first_line(error)}. Was it copied to its end?'
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """``state`` of a checkpoint of Composer.

    Raises:
        UserError: As ``read_pickled``, or the file is of something else.
    """
    content = read_pickled(path)
    state = content.get('state') if isinstance(content, Mapping) else None
    if not isinstance(state, Mapping) or not isinstance(state.get('model'), Mapping):
        raise UserError(
            f'{path}: no checkpoint of a run (it has no state/model). Weights of another project: '
            f'python -m tread_composer import'
        )
    return dict(state)
