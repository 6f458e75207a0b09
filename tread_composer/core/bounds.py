"""Bounds of numbers, written where a constructor names its arguments: configurations refuse what lies outside of them.

They are annotations and check nothing by themselves. What is made in Python checks its own arguments: a dataclass by
``core.options.Checked``, any other constructor as it sees fit.
"""

from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

__all__ = [
    'AtLeast1', 'AtLeast2', 'Depth', 'ImageCount', 'MeasuredCount', 'NonNegative', 'Positive', 'Seed', 'Steps', 'Width',
    'Workers',
]  # fmt: skip

# The upper bounds are far above what any run has, and far below what overflows or fills a machine.
Positive = Annotated[float, Gt(0), Le(1e6)]
NonNegative = Annotated[float, Ge(0), Le(1e6)]
AtLeast1 = Annotated[int, Ge(1), Le(2**31)]
AtLeast2 = Annotated[int, Ge(2), Le(2**20)]
Width = Annotated[int, Ge(1), Le(2**16)]
"""Of a layer, a head, a patch."""
Depth = Annotated[int, Ge(1), Le(1024)]
"""Blocks of a network."""
Seed = Annotated[int, Ge(0), Lt(2**32)]
"""What numpy, torch and Python take alike."""
Workers = Annotated[int, Ge(0), Le(1024)]
"""Processes beside each rank."""
Steps = Annotated[int, Ge(1), Le(10_000)]
"""Of a sampler."""
ImageCount = Annotated[int, Ge(1), Le(10_000_000)]
"""To draw or to measure; 200 times what published numbers are of."""
MeasuredCount = Annotated[int, Ge(2), Le(10_000_000)]
"""Images of which a number is made: one alone has no covariance."""
