"""TREAD as a Composer algorithm."""

from tread_composer.algorithms.tread.tread import Tread
from tread_composer.routing import Route, apply_tread

__all__ = ['Route', 'Tread', 'apply_tread']
