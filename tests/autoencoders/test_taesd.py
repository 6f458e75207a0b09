"""The taesd repository's pairs of files, against an implementation that reads their names with torch's functions."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tread_composer.autoencoders import open_autoencoder
from tread_composer.core.errors import UserError

Weights = dict[str, Tensor]

# Numbers of the layers that have weights: blocks, convolutions with a bias, and those that change the resolution.
ENCODER = {'blocks': (1, 3, 4, 5, 7, 8, 9, 11, 12, 13), 'ends': (0, 14), 'between': (2, 6, 10), 'lowest': (11, 12, 13)}
DECODER = {'blocks': (3, 4, 5, 8, 9, 10, 13, 14, 15, 18), 'ends': (1, 19), 'between': (7, 12, 17), 'lowest': (3, 4, 5)}


def weights_of(layout: dict[str, tuple[int, ...]], inputs: int, outputs: int, pooled: bool, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def conv(name: str, into: int, out: int, size: int = 3, bias: bool = True) -> None:
        weights[f'{name}.weight'] = torch.randn(out, into, size, size, generator=generator) / (into * size**2) ** 0.5
        if bias:
            weights[f'{name}.bias'] = torch.randn(out, generator=generator) * 0.1

    conv(f'{layout["ends"][0]}', inputs, 64)
    conv(f'{layout["ends"][1]}', 64, outputs)
    for number in layout['between']:
        conv(f'{number}', 64, 64, bias=False)
    for number in layout['blocks']:
        for layer in (0, 2, 4):
            conv(f'{number}.conv.{layer}', 64, 64)
        if pooled and number in layout['lowest']:
            conv(f'{number}.pool.0', 64, 256, 1, bias=False)
            weights[f'{number}.pool.1.weight'] = 1 + torch.randn(256, generator=generator) * 0.2
            weights[f'{number}.pool.1.bias'] = torch.randn(256, generator=generator) * 0.2
            conv(f'{number}.pool.3', 256, 64, 1, bias=False)
    return weights


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    size = weights[f'{name}.weight'].shape[-1]
    return functional.conv2d(x, weights[f'{name}.weight'], weights.get(f'{name}.bias'), stride, padding=size // 2)


def block(weights: Weights, number: int, x: Tensor) -> Tensor:
    if f'{number}.pool.0.weight' in weights:
        y = conv(weights, f'{number}.pool.0', x)
        grouped = y.reshape(len(y), 4, -1)  # four groups of channels, over the whole image
        variance = grouped.var(-1, unbiased=False, keepdim=True)
        y = ((grouped - grouped.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()).reshape(y.shape)
        y = y * weights[f'{number}.pool.1.weight'].view(-1, 1, 1) + weights[f'{number}.pool.1.bias'].view(-1, 1, 1)
        x = x + conv(weights, f'{number}.pool.3', y.clamp(min=0))
    y = x
    for layer in (0, 2, 4):
        y = conv(weights, f'{number}.conv.{layer}', y)
        y = y.clamp(min=0) if layer < 4 else y
    return (x + y).clamp(min=0)


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    x = conv(weights, '0', (pixels + 1) / 2)
    for number in range(1, 14):
        x = conv(weights, f'{number}', x, stride=2) if number in (2, 6, 10) else block(weights, number, x)
    return conv(weights, '14', x)


def decode(weights: Weights, latents: Tensor) -> Tensor:
    x = conv(weights, '1', 3 * torch.tanh(latents / 3)).clamp(min=0)
    for number in range(3, 19):
        if number in (6, 11, 16):
            x = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
        else:
            x = conv(weights, f'{number}', x) if number in (7, 12, 17) else block(weights, number, x)
    return conv(weights, '19', x) * 2 - 1


def write_pair(folder: Path, channels: int, pooled: bool) -> tuple[Weights, Weights]:
    encoder, decoder = weights_of(ENCODER, 3, channels, pooled), weights_of(DECODER, channels, 3, pooled, seed=1)
    torch.save(encoder, folder / 'taef2_encoder.pth')
    torch.save(decoder, folder / 'taef2_decoder.pth')
    return encoder, decoder


@pytest.mark.parametrize(('channels', 'pooled'), [(32, True), (4, False)])
def test_against_a_second_implementation(channels: int, pooled: bool, tmp_path: Path):
    encoder, decoder = write_pair(tmp_path, channels, pooled)
    assert len(encoder) == (79 if pooled else 67)
    ours = open_autoencoder(str(tmp_path / 'taef2_encoder.pth'))
    assert (ours.is_variational, ours.channels, ours.downsampling) == (False, channels, 8)
    pixels = torch.rand(2, 3, 24, 16) * 2 - 1
    latents = ours.encode(pixels)
    assert latents.shape == (2, channels, 3, 2) and latents.std() > 0.1
    torch.testing.assert_close(latents, encode(encoder, pixels), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.decode(4 * latents), decode(decoder, 4 * latents), rtol=0, atol=1e-5)


def test_both_halves_count_and_either_names_the_pair(tmp_path: Path):
    _, decoder = write_pair(tmp_path, 8, True)
    names = [str(tmp_path / f'taef2_{part}.pth') for part in ('encoder', 'decoder')]
    first, second = (open_autoencoder(name).weight_hash() for name in names)
    assert first == second
    torch.save({**decoder, '19.bias': torch.zeros(3)}, names[1])
    assert open_autoencoder(names[0]).weight_hash() != first


def test_what_is_missing_left_over_or_of_another_shape_is_named(tmp_path: Path):
    path = tmp_path / 'taef2_encoder.pth'

    def refusal() -> str:
        with pytest.raises(UserError) as caught:
            _ = open_autoencoder(str(path)).network
        return str(caught.value)

    encoder, decoder = write_pair(tmp_path, 8, True)
    torch.save({**encoder, '3.skip.weight': torch.zeros(1)}, path)
    assert 'encoder.3.skip.weight: [1], the rest asks for no such tensor' in refusal()
    del encoder['12.pool.3.weight']
    torch.save({**encoder, '2.weight': torch.zeros(64, 64, 1, 1)}, path)
    message = refusal()
    assert 'encoder.12.pool.3.weight: missing' in message and 'encoder.2.weight: [64, 64, 1, 1], ' in message
    torch.save(decoder, path)
    assert f'{path} holds no encoder' in refusal()
    write_pair(tmp_path, 8, True)
    (tmp_path / 'taef2_decoder.pth').unlink()
    assert f'the decoder is missing: {tmp_path / "taef2_decoder.pth"}' in refusal()
