"""Weights of other projects, brought into the form and the conventions of this one; nowhere else are they converted."""

from tread_composer.weights.foreign.command import Hints, import_weights, read_class_names
from tread_composer.weights.foreign.files import LAYOUTS

__all__ = ['LAYOUTS', 'Hints', 'import_weights', 'read_class_names']
