"""Images with their labels from every layout in which people have them, each read at random."""

from tread_composer.conversion.sources.base import Source
from tread_composer.conversion.sources.detect import open_sources

__all__ = ['Source', 'open_sources']
