"""Parts of other packages, named ``package.module:name`` in a configuration or on a command line."""

import importlib
import os
import sys
from typing import Any

__all__ = ['imported', 'is_reference']


def is_reference(name: object) -> bool:
    """Whether a name is of the form ``package.module:Class``."""
    return isinstance(name, str) and ':' in name


def imported(reference: str) -> Any:
    """What a reference names.

    Raises:
        ImportError: There is no such module, or it has no such name.
    """
    module, _, attribute = reference.partition(':')
    if os.getcwd() not in sys.path:
        # A part that lies where the command is started is meant to be used; `python train.py` looks beside train.py.
        sys.path.append(os.getcwd())
    target = importlib.import_module(module)
    if not hasattr(target, attribute):
        raise ImportError(f'{module} has no {attribute!r}')
    return getattr(target, attribute)
