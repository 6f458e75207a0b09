"""Latents that other projects have made, as data sets of this one."""

from tread_composer.conversion.importers.layouts import LAYOUTS, Layout, open_layout
from tread_composer.conversion.importers.writing import Facts, import_latents

__all__ = ['LAYOUTS', 'Facts', 'Layout', 'import_latents', 'open_layout']
