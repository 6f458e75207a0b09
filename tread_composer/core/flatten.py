"""Trees of settings as one table: the names by which files, loggers and pages know a nested value."""

from collections.abc import Mapping
from typing import Any

__all__ = ['flatten']


def flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Nested mappings by dotted keys, each behind ``prefix``: ``{'a': {'b': 1}}`` as ``{'a.b': 1}``.

    An empty mapping stays a value: without it an empty section could not be told from an absent one.
    """
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, Mapping) and value
        rows |= flatten(value, f'{prefix}{key}.') if is_section else {f'{prefix}{key}': value}
    return rows
