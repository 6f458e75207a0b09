import math

import pytest
import torch

from tread_composer.autoencoders import Pixels, sample_moments, to_uint8


def test_pixels_changes_nothing_not_even_beyond_the_range():
    pixels = torch.tensor([[-3.0, 0.5], [1.0, 7.0]]).reshape(1, 1, 2, 2)
    assert torch.equal(Pixels().decode(pixels), pixels)
    assert torch.equal(Pixels().encode(pixels), pixels)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_every_byte_survives_the_round_trip(dtype: torch.dtype):
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.to(dtype) / 127.5 - 1), values)


@pytest.mark.parametrize(
    ('pixel', 'byte'),
    [
        (-1.0, 0),
        (1.0, 255),
        (-9.0, 0),
        (9.0, 255),
        (math.inf, 255),
        (-math.inf, 0),
        (0.0, 128),  # 127.5: the one tie there is, to even
        (126.4 / 127.5 - 1, 126),
        (126.6 / 127.5 - 1, 127),  # truncation would give 126
    ],
)
def test_rounding_is_to_the_nearest_and_clamped(pixel: float, byte: int):
    result = to_uint8(torch.tensor([pixel]))
    assert (result.item(), result.dtype) == (byte, torch.uint8)


def test_half_precision_is_widened_before_the_arithmetic():
    # In half precision (x + 1) * 127.5 loses up to 1/16 of a byte near 255, enough to change bytes.
    pixels = torch.linspace(-1, 1, 4001).half()
    assert torch.equal(to_uint8(pixels), to_uint8(pixels.float()))


def test_what_has_no_byte_is_refused():
    with pytest.raises(ValueError, match='NaN'):
        to_uint8(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match='uint8'):
        to_uint8(torch.zeros(3, dtype=torch.uint8))


def test_draws_have_the_mean_and_the_deviation_of_the_moments():
    mean, logvar = torch.tensor([3.0, -1.0]), torch.tensor([0.0, math.log(4.0)])
    moments = torch.cat([mean, logvar]).reshape(1, 4, 1, 1).expand(5, 4, 2, 3)
    zeros, ones = torch.zeros(5, 2, 2, 3), torch.ones(5, 2, 2, 3)
    assert torch.equal(sample_moments(moments, zeros)[0, :, 0, 0], mean)
    torch.testing.assert_close(sample_moments(moments, ones)[4, :, 1, 2], torch.tensor([4.0, 1.0]))


def test_half_precision_moments_give_float32():
    moments = torch.full((1, 2, 1, 1), 20.0, dtype=torch.float16)  # exp(20) is beyond half precision
    draw = sample_moments(moments, torch.ones(1, 1, 1, 1, dtype=torch.float16))
    assert draw.dtype == torch.float32
    assert draw.item() == pytest.approx(20 + math.exp(10), rel=1e-6)


@pytest.mark.parametrize('shape', [(2, 4, 3, 3), (2, 4, 3, 2), (1, 2, 3, 3)])
def test_moments_of_another_shape_than_the_noise_are_refused(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match='twice the channels'):
        sample_moments(torch.zeros(2, 4, 3, 3), torch.zeros(shape))
