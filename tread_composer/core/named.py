"""Objects imported by name: what a user writes as ``package.module:Class``, and a package's own on first use."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ['import_named', 'is_reference', 'lazy_names', 'part_named']


def is_reference(name: object) -> bool:
    """Whether a name is of the form ``package.module:Class``."""
    return isinstance(name, str) and ':' in name


def import_named(reference: str) -> Any:
    """The class or function behind ``package.module:Class``.

    Raises:
        ImportError: A half of the reference is empty, the module cannot be imported, for whichever reason, or it has
            no such class or function.
    """
    module, _, attribute = reference.partition(':')
    if not module or not attribute:
        raise ImportError(f'{reference!r} is not of the form package.module:Class')
    if os.getcwd() not in sys.path:
        # A part that lies where the command is started is meant to be used; `python train.py` looks beside train.py.
        sys.path.append(os.getcwd())
    try:
        home = importlib.import_module(module)
    except ImportError:
        raise
    except (Exception, SystemExit) as error:  # somebody's module may fail in any way, or be a script
        raise ImportError(f'{module} fails while it is imported: {_described(error)}') from error
    if not hasattr(home, attribute):
        raise ImportError(f'{module} has no {attribute!r}')
    target = getattr(home, attribute)
    if not callable(target):
        raise ImportError(f'{reference} is of type {type(target).__name__}, not a class or function')
    return target


def part_named(name: str, table: Mapping[str, Any]) -> Any:
    """The part behind a name in ``table``, perhaps by reference, or behind a reference; ``ValueError`` if none."""
    if name not in table and not is_reference(name):
        raise ValueError(f'{name!r} is none of {", ".join(table)}')
    part = table.get(name, name)
    if not isinstance(part, str):
        return part
    try:
        return import_named(part)
    except ImportError as error:
        raise ValueError(f'{name!r} cannot be imported: {error}') from error


def lazy_names(package: str, homes: Mapping[str, str], submodules: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562), so that its import stays as cheap as the names that are used.

    ``homes`` has the module of each name; ``submodules`` are attributes of the package too, whoever has imported them.
    The function raises ``AttributeError`` for any further name.
    """

    def load(name: str) -> Any:
        if name in submodules:
            return importlib.import_module(f'{package}.{name}')  # which sets the attribute
        if name not in homes:
            raise AttributeError(f'module {package!r} has no attribute {name!r}')
        value = getattr(importlib.import_module(homes[name]), name)
        setattr(sys.modules[package], name, value)  # asked once
        return value

    return load


def _described(error: BaseException) -> str:
    """The error in a line, with the file and line of the module that it comes from."""
    if isinstance(error, SyntaxError):
        return f'{type(error).__name__}: {error.msg} ({error.filename}, line {error.lineno})'
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f'{type(error).__name__}: {error} ({frame.filename}, line {frame.lineno})'
