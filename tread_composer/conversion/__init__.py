"""From images in any usual layout to MDS data sets of latents.

``sources`` finds and lists the images, ``images`` makes squares of pixels of them; other files are imported directly.
"""

from tread_composer.conversion.images import UnreadableImage, decode_image
from tread_composer.conversion.sources.base import Source
from tread_composer.conversion.sources.detect import open_sources

__all__ = ['Source', 'UnreadableImage', 'decode_image', 'open_sources']
