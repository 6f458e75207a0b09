"""An image file to the square of pixels that is encoded: ADM's centre crop, RGB whatever the file holds.

Legend: R resolution, side of the square.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, features

__all__ = ['Colour', 'Sample', 'UnreadableImage', 'centre_crop', 'read_image']

Colour = tuple[int, int, int]

# Nothing else is tried: PIL would hand some formats to other programs (EPS to Ghostscript).
_FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', *(['AVIF'] if features.check('avif') else []))


class UnreadableImage(ValueError):  # noqa: N818  (the name is the contract with the pipeline, which counts these)
    """The file is not an image, or is damaged; the text says why."""


class Sample(NamedTuple):
    """What a worker prepares for the encoder: an image, or latents."""

    values: np.ndarray
    is_transparent: bool = False  # anything of it


def read_image(data: bytes, resolution: int, background: Colour | None = (255, 255, 255)) -> Sample:
    """Decode, convert to RGB, crop: uint8 ``[3, R, R]``.

    The content decides about the format, not the file's extension (ImageNet's ``n02105855_2933.JPEG`` is a PNG). Any
    mode becomes RGB by PIL's ``convert('RGB')``, as in ADM: grey is repeated, CMYK converted without a colour
    profile, a palette looked up. What is transparent shows ``background``; without one the colours that are stored
    below it, as in ADM, which nobody was meant to see. Grey of 16 bits is scaled to 8, where PIL would clip it to
    white. An EXIF rotation is NOT applied, as in ADM: statistics and reference batches of the published models come
    from images taken as they are stored. Of several frames the first is used.

    Raises:
        UnreadableImage: PIL cannot decode all of it, or it has more pixels than any photograph. Damage in the middle of
            a JPEG, which its decoder conceals, is not noticed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about odd metadata; what matters is raised
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                image.load()
                opaque, is_transparent = _to_rgb(image, background)
                square = centre_crop(opaque, resolution)
    except UnreadableImage:
        raise
    except Exception as error:  # of damaged files the decoders raise anything: OSError, SyntaxError, MemoryError, ...
        reason = f'{type(error).__name__}: {error}'
        if isinstance(error, Image.UnidentifiedImageError):  # its own text is the address of a buffer
            reason = f'{len(data):,} bytes that are not an image of a known format'
        raise UnreadableImage(reason) from error
    return Sample(np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1)), is_transparent)


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """ADM's centre crop (Dhariwal & Nichol 2021, 2105.05233; DiT, SiT and their followers use the same).

    Halve with a box filter while the shorter side is at least ``2 * resolution``, bring it to ``resolution`` with
    bicubic interpolation, cut the middle. ``UnreadableImage`` if the longer side would pass PIL's limit for images.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if Image.MAX_IMAGE_PIXELS is not None and width * height > 2 * Image.MAX_IMAGE_PIXELS:
        raise UnreadableImage(f'{image.width} x {image.height} pixels: too narrow to be scaled to {resolution}')
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def _to_rgb(image: Image.Image, background: Colour | None) -> tuple[Image.Image, bool]:
    """RGB, and whether any pixel is transparent."""
    if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):
        raise UnreadableImage(f'mode {image.mode!r} of PIL has no known range of values')
    if image.mode.startswith('I'):  # I;16 and its byte orders; I is what PIL makes of a PPM with 16 bits
        image = _to_8_bits(image)
    if image.mode not in ('LA', 'La', 'PA', 'RGBA', 'RGBa') and 'transparency' not in image.info:
        return image.convert('RGB'), False
    coloured = (image.convert('LA') if image.mode == 'La' else image).convert('RGBA')
    if coloured.getchannel('A').getextrema()[0] == 255:
        return image.convert('RGB'), False
    if background is None:
        return coloured.convert('RGB'), True
    canvas = Image.new('RGBA', image.size, (*background, 255))
    canvas.alpha_composite(coloured)
    return canvas.convert('RGB'), True


def _to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f'grey values from {values.min()} to {values.max()}, not within 16 bits')
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))  # 65535 = 257 * 255
    if 'transparency' in image.info:  # one value of the 16 bits
        grey.putalpha(Image.fromarray((values != image.info['transparency']).astype(np.uint8) * 255))
    return grey
