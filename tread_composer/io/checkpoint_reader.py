"""Files of ``torch.save``, read without running what a pickle may hold.

A pickle is a program. torch's restricted reader makes tensors, plain values and the few harmless types below, and
refuses whatever else a file names. Composer asks for the unrestricted one: see ``restricted_loading``.
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

__all__ = ['harmless_types', 'read_checkpoint', 'read_pickled', 'refusal']

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


def harmless_types() -> torch.serialization.safe_globals:
    """Within it torch's restricted reader takes what checkpoints hold besides tensors and plain values.

    These are times of Composer's clock, numpy's generator and versions; in those of DiT and SiT, the words of their
    command line.
    """
    # At its end torch forgets what it was given, even if somebody else has allowed that before.
    allowed = torch.serialization.get_safe_globals()
    return torch.serialization.safe_globals([kind for kind in _HARMLESS if kind not in allowed])


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """Read a file of ``torch.save`` on the CPU, without running code that it may name.

    Raises:
        UserError: It cannot be read, is cut off or no such file, or holds objects that only running code could make.
    """
    try:
        with harmless_types():
            # Mapped: of a checkpoint's optimizer and weights only what is taken out is ever read from the disk.
            return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file; give the path of a checkpoint') from None
    except pickle.UnpicklingError as error:
        raise refusal(str(path), error) from None
    except Exception as error:  # a damaged file sends the unpickler anywhere: IndexError, AttributeError, struct.error
        raise UserError(
            f'{path}: cannot be read as a file of torch.save: {_first_line(error)}. Was it copied to its end?'
        ) from None


def refusal(source: str, error: pickle.UnpicklingError) -> UserError:
    """The restricted reader's error in words.

    Args:
        source: What to call the file.
        error: Names the class or function that the file asks for, if that was the reason.
    """
    named = re.search(r'GLOBAL ([\w.]+)', str(error))
    if named is None:
        return UserError(f'{source}: no file of torch.save, or a damaged one: {_first_line(error)}')
    return UserError(
        f'{source}: refused: to read {named[1]} out of it could run code, and weights need no such thing. Nothing '
        f'was run. If you trust the file, save its tensors again in a process of your own: torch.save({{name: '
        f'tensor, ...}})'
    )


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
