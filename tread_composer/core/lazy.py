"""Names of a package that are imported when they are first used."""

import importlib
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ['lazy_names']


def lazy_names(package: str, homes: Mapping[str, str], submodules: Collection[str] = ()) -> Callable[[str], Any]:
    """A package's ``__getattr__`` (PEP 562), so that its import stays as cheap as the names that are used.

    Args:
        package: ``__name__`` of the package.
        homes: The module of each name.
        submodules: Names of the package's modules that are attributes of it too, whoever has imported them.

    Returns:
        The function; it raises ``AttributeError`` for any further name.
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
