"""A number that can be reported: under which name, in which unit, and which of two is better."""

from dataclasses import dataclass
from typing import Literal

__all__ = ['FULL_COUNT', 'Better', 'Quantity']

Better = Literal['lower', 'higher']

FULL_COUNT = 50_000
"""Samples of a published FID. Below, the metric's name says how many there were."""


@dataclass(frozen=True)
class Quantity:
    """What a number is a number of.

    Args:
        name: As it is published, with Inception's features.
        better: Which values are better.
        unit: What one of it is.
        other: Its name with other features, whose own name follows: only Inception's make an FID, a KID or an
            Inception Score. (Default: the same name.)
    """

    name: str
    better: Better
    unit: str
    other: str = ''

    def reported(self, features: str, num_samples: int) -> str:
        """The name of a number: ``'fid'``, ``'fid_10000'`` below 50,000 samples, ``'fd_digits_500'``."""
        name = self.name if features == 'inception' else f'{self.other or self.name}_{features}'
        return name if num_samples >= FULL_COUNT else f'{name}_{num_samples}'

    def reports(self, reported: str) -> bool:
        """Whether a reported name is one of this quantity."""
        return any(reported == name or reported.startswith(f'{name}_') for name in (self.name, self.other or self.name))
