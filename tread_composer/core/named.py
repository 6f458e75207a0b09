"""Objects that a user names by ``package.module:Class``."""

import importlib
import os
import sys
from typing import Any

__all__ = ['import_named', 'is_reference']


def is_reference(name: object) -> bool:
    """Whether a name is of the form ``package.module:Class``."""
    return isinstance(name, str) and ':' in name


def import_named(reference: str) -> Any:
    """The object behind ``package.module:Class``.

    Raises:
        ImportError: The module cannot be imported, or has no such attribute.
    """
    module, _, attribute = reference.partition(':')
    if os.getcwd() not in sys.path:
        # A part that lies where the command is started is meant to be used; `python train.py` looks beside train.py.
        sys.path.append(os.getcwd())
    target = importlib.import_module(module)
    if not hasattr(target, attribute):
        raise ImportError(f'{module} has no {attribute!r}')
    return getattr(target, attribute)
