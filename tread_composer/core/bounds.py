"""Bounds of numbers, written where a constructor names its arguments: configurations refuse what lies outside of them.

They are annotations and check nothing by themselves; a constructor that is called from Python checks its own arguments.
"""

from typing import Annotated

from annotated_types import Ge, Gt

__all__ = ['AtLeast1', 'AtLeast2', 'NonNegative', 'Positive']

Positive = Annotated[float, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
AtLeast1 = Annotated[int, Ge(1)]
AtLeast2 = Annotated[int, Ge(2)]
