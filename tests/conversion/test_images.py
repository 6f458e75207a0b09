import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, features

from tests.conversion.layouts import encoded, photographs
from tread_composer.conversion.squares import UnreadableImage, read_image

CHINA, FLOWER = photographs()


def decode_image(data: bytes, resolution: int) -> np.ndarray:
    return read_image(data, resolution).values


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).transpose(2, 0, 1)


# ----- a second implementation of the crop, slow, in numpy


def box(x: float) -> float:
    return 1.0 if -0.5 < x <= 0.5 else 0.0


def bicubic(x: float) -> float:
    """Keys' cubic with a = -1/2."""
    x = abs(x)
    if x < 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def weights(size: int, new: int, kernel: Callable[[float], float], reach: float) -> np.ndarray:
    """Matrix ``[new, size]``: the kernel is stretched when the image shrinks, cut and renormalised at the border."""
    ratio = size / new
    stretch = max(ratio, 1.0)
    matrix = np.zeros((new, size))
    for row in range(new):
        centre = (row + 0.5) * ratio
        first = max(0, int(centre - reach * stretch + 0.5))
        for column in range(first, min(size, int(centre + reach * stretch + 0.5))):
            matrix[row, column] = kernel((column + 0.5 - centre) / stretch)
    return matrix / matrix.sum(axis=1, keepdims=True)


def resized(image_HWC: np.ndarray, height: int, width: int, kernel: Callable, reach: float) -> np.ndarray:
    """Horizontally, round to 8 bits, vertically, round to 8 bits."""
    across = np.einsum('vw,hwc->hvc', weights(image_HWC.shape[1], width, kernel, reach), image_HWC)
    across = np.clip(np.floor(across + 0.5), 0, 255)
    down = np.einsum('gh,hvc->gvc', weights(image_HWC.shape[0], height, kernel, reach), across)
    return np.clip(np.floor(down + 0.5), 0, 255)


def slow_crop(image_HWC: np.ndarray, resolution: int) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    while min(height, width) >= 2 * resolution:
        height, width = height // 2, width // 2
        image_HWC = resized(image_HWC, height, width, box, 0.5)
    scale = resolution / min(height, width)
    height, width = round(height * scale), round(width * scale)
    image_HWC = resized(image_HWC, height, width, bicubic, 2.0)
    top, left = (height - resolution) // 2, (width - resolution) // 2
    return image_HWC[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


@pytest.mark.parametrize(
    ('size', 'resolution'),
    [
        ((220, 160), 96),  # shrunk by bicubic alone
        ((131, 199), 32),  # halved twice, odd sizes on the way, upright
        ((199, 131), 65),  # the shorter side is 2 R + 1: halved to R, so that bicubic does nothing to it
        ((150, 128), 64),  # just 2 R: halved, too
        ((151, 127), 64),  # just below: not halved
        ((90, 61), 64),  # enlarged
        ((64, 64), 64),
        ((65, 64), 64),
    ],
)
def test_the_crop_is_that_of_a_slow_second_implementation(size, resolution):
    image = CHINA.crop((200, 150, 200 + size[0], 150 + size[1]))
    found = decode_image(encoded(image), resolution)
    assert (found.shape, found.dtype, found.flags.c_contiguous) == ((3, resolution, resolution), np.uint8, True)
    difference = np.abs(found.astype(int) - slow_crop(np.asarray(image, dtype=np.float64), resolution))
    assert difference.max() <= 1  # PIL's weights have 22 bits
    assert (difference > 0).mean() < 1e-3


def test_the_middle_is_cut_and_odd_remainders_fall_to_the_right_and_bottom():
    columns = np.zeros((32, 35, 3), dtype=np.uint8)
    columns[:, :, 0] = np.arange(35)
    assert decode_image(encoded(Image.fromarray(columns)), 32)[0, 0].tolist() == list(range(1, 33))
    rows = columns.transpose(1, 0, 2).copy()
    assert decode_image(encoded(Image.fromarray(rows)), 32)[0, :, 0].tolist() == list(range(1, 33))


# ----- whatever the file holds


SQUARE = FLOWER.crop((100, 100, 164, 164))
GREY = pixels(SQUARE.convert('L').convert('RGB'))


@pytest.mark.parametrize(
    ('kind', 'options'), [('PNG', {}), ('BMP', {}), ('TIFF', {}), ('PPM', {}), ('WEBP', {'lossless': True})]
)
def test_lossless_formats_give_the_pixels_that_were_stored(kind, options):
    assert np.array_equal(decode_image(encoded(SQUARE, kind, **options), 64), pixels(SQUARE))


@pytest.mark.skipif(not features.check('avif'), reason='this Pillow has no AVIF')
def test_avif_is_read():
    found = decode_image(encoded(SQUARE, 'AVIF', quality=95), 64)
    exact = decode_image(encoded(SQUARE), 64)
    assert np.abs(found.astype(int) - exact).mean() < 3


def test_modes_become_rgb():
    jpeg = decode_image(encoded(SQUARE, 'JPEG', quality=95), 64)
    assert np.abs(jpeg.astype(int) - pixels(SQUARE)).mean() < 8
    for mode in ('L', '1', 'LA'):
        found = decode_image(encoded(SQUARE.convert(mode)), 64)
        assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    assert np.array_equal(decode_image(encoded(SQUARE.convert('L')), 64), GREY)
    palette = SQUARE.convert('P', palette=Image.Palette.ADAPTIVE)
    for kind in ('PNG', 'GIF'):
        assert np.array_equal(decode_image(encoded(palette, kind), 64), pixels(palette.convert('RGB')))
    cmyk = decode_image(encoded(SQUARE.convert('CMYK'), 'JPEG', quality=95), 64)
    assert np.abs(cmyk.astype(int) - pixels(SQUARE)).mean() < 8


ALPHA = np.tile(np.arange(64, dtype=np.uint8) * 4, (64, 1))  # from left to right, 0 to 252


def with_alpha(mode: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file with transparent parts; the colours that are stored, and how opaque each pixel is (0 to 1)."""
    if mode in ('RGBA', 'LA'):
        image = SQUARE.convert(mode)
        image.putalpha(Image.fromarray(ALPHA))
        return encoded(image), pixels(image.convert('RGB')), ALPHA / 255
    if mode == 'P':
        image = SQUARE.convert('P', palette=Image.Palette.ADAPTIVE)
        return encoded(image, transparency=7), pixels(image.convert('RGB')), np.asarray(image) != 7
    if mode == 'I;16':
        values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
        grey = np.broadcast_to(np.round(values / 65535 * 255), (3, 64, 64))
        return encoded(Image.fromarray(values), transparency=160), grey, values != 160
    image = SQUARE.convert(mode)
    colour = image.getpixel((3, 3))
    data = np.asarray(image)
    opaque = (data != colour).any(axis=-1) if mode == 'RGB' else data != colour
    return encoded(image, transparency=colour), pixels(image.convert('RGB')), opaque


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P', 'RGB', 'L', 'I;16'])
def test_what_is_transparent_shows_the_background(mode):
    data, colours, opacity = with_alpha(mode)
    for background in ((255, 255, 255), (0, 128, 64)):
        below = np.array(background).reshape(3, 1, 1)
        found, is_transparent = read_image(data, 64, background)
        assert is_transparent and np.abs(found - (colours * opacity + below * (1 - opacity))).max() <= 1
    assert np.array_equal(decode_image(data, 64), read_image(data, 64, (255, 255, 255))[0])
    stored, is_transparent = read_image(data, 64, None)
    assert is_transparent and np.array_equal(stored, colours)


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
def test_an_opaque_alpha_channel_changes_nothing(mode):
    data = encoded(SQUARE.convert(mode))
    found, is_transparent = read_image(data, 64, (0, 128, 64))
    assert not is_transparent and np.array_equal(found, pixels(SQUARE.convert(mode).convert('RGB')))


@pytest.mark.parametrize('kind', ['PNG', 'TIFF', 'PPM'])
def test_grey_of_16_bits_is_scaled_not_clipped(kind):
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16 + 15
    values[0, 0], values[-1, -1] = 0, 65535
    found = decode_image(encoded(Image.fromarray(values), kind), 64)
    wanted = np.round(values / 65535 * 255)
    assert np.array_equal(found, np.broadcast_to(wanted, (3, 64, 64)))


def test_values_without_a_known_range_are_unreadable():
    for image in (Image.fromarray(np.ones((8, 8), dtype=np.float32)), Image.fromarray(np.ones((8, 8), dtype=np.int32))):
        with pytest.raises(UnreadableImage, match='no known range of values'):
            decode_image(encoded(image, 'TIFF'), 8)


def test_a_rotation_in_the_metadata_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    plain, turned = encoded(SQUARE, 'JPEG'), encoded(SQUARE, 'JPEG', exif=exif)
    assert plain != turned
    assert np.array_equal(decode_image(plain, 64), decode_image(turned, 64))


def test_of_several_frames_the_first_is_taken():
    data = encoded(CHINA.crop((0, 0, 64, 64)), 'TIFF', save_all=True, append_images=[SQUARE])
    assert np.array_equal(decode_image(data, 64), pixels(CHINA.crop((0, 0, 64, 64))))


# ----- what cannot be decoded


def _png_of_size(width: int, height: int) -> bytes:
    """A header that promises many pixels, and nothing behind it."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + name + content + struct.pack('>I', zlib.crc32(name + content))

    header = chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    return b'\x89PNG\r\n\x1a\n' + header + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


JPEG = encoded(CHINA, 'JPEG')
WEBP = encoded(CHINA, 'WEBP')
PNG = encoded(CHINA)


@pytest.mark.parametrize(
    ('data', 'reason'),
    [
        (b'', '0 bytes that are not an image'),
        (b'<html>404 not found</html>', '26 bytes that are not an image'),
        (JPEG[: len(JPEG) // 2], 'truncated'),
        (JPEG[:300], '(?i)truncated'),
        (JPEG[:3], 'not an image'),
        (PNG[: len(PNG) // 2], 'truncated'),
        (PNG[:5000] + bytes(50) + PNG[5050:], 'broken|checksum|stream'),
        (WEBP[: len(WEBP) // 2], 'WebP|decode'),
        (_png_of_size(30000, 30000), 'decompression bomb'),
        (_png_of_size(100, 100), 'truncated'),
        (
            b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n',
            'not an image of a known format',
        ),  # would run Ghostscript
        (encoded(Image.new('L', (1, 30000))), 'too narrow'),
    ],
)
def test_what_cannot_be_decoded_completely_is_unreadable_with_a_reason(data, reason):
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode_image(data, 256)
    assert isinstance(caught.value, ValueError) and str(caught.value)


def test_a_photograph_at_the_limit_of_pil_is_no_bomb(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 640 * 427 - 1)  # there PIL warns; at twice of it, it refuses
    assert decode_image(PNG, 64).shape == (3, 64, 64)
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 640 * 427 // 2 - 1)
    with pytest.raises(UnreadableImage, match='decompression bomb'):
        decode_image(PNG, 64)
