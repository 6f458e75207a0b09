"""Latents that other projects have made, as data sets of this one."""

from tread_composer.conversion.importers.settings import ImportSettings
from tread_composer.conversion.importers.stored import import_latents

__all__ = ['ImportSettings', 'import_latents']
