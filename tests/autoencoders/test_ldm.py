"""File against an implementation that reads the file's names directly and uses nothing but torch's functions."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tread_composer.autoencoders import KL, File, Folder, open_autoencoder

pytest.importorskip('diffusers')
save_file = pytest.importorskip('safetensors.torch').save_file

Weights = dict[str, Tensor]


# The layout, written down a second time: what tensors a file has, then what they compute.


def weights_of(
    widths: Sequence[int],
    channels: int,
    blocks: int = 1,
    attention: Sequence[int] = (),
    decoder_attention: Sequence[int] | None = None,
    seed: int = 0,
) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def conv(name: str, inputs: int, outputs: int, size: int = 3) -> None:
        weights[f'{name}.weight'] = draw(outputs, inputs, size, size) / (inputs * size * size) ** 0.5
        weights[f'{name}.bias'] = draw(outputs) * 0.1

    def norm(name: str, width: int) -> None:
        weights[f'{name}.weight'], weights[f'{name}.bias'] = 1 + draw(width) * 0.2, draw(width) * 0.2

    def block(name: str, inputs: int, outputs: int) -> None:
        norm(f'{name}.norm1', inputs)
        conv(f'{name}.conv1', inputs, outputs)
        norm(f'{name}.norm2', outputs)
        conv(f'{name}.conv2', outputs, outputs)
        if inputs != outputs:
            conv(f'{name}.nin_shortcut', inputs, outputs, 1)

    def attend(name: str, width: int) -> None:
        norm(f'{name}.norm', width)
        for part in ('q', 'k', 'v', 'proj_out'):
            conv(f'{name}.{part}', width, width, 1)
        weights[f'{name}.q.weight'] *= 3  # so that the softmax is not flat

    def middle(name: str) -> None:
        block(f'{name}.mid.block_1', widths[-1], widths[-1])
        attend(f'{name}.mid.attn_1', widths[-1])
        block(f'{name}.mid.block_2', widths[-1], widths[-1])

    conv('encoder.conv_in', 3, widths[0])
    width = widths[0]
    for level, wanted in enumerate(widths):
        for index in range(blocks):
            block(f'encoder.down.{level}.block.{index}', width, wanted)
            width = wanted
            if level in attention:
                attend(f'encoder.down.{level}.attn.{index}', wanted)
        if level < len(widths) - 1:
            conv(f'encoder.down.{level}.downsample.conv', wanted, wanted)
    middle('encoder')
    norm('encoder.norm_out', width)
    conv('encoder.conv_out', width, 2 * channels)
    conv('quant_conv', 2 * channels, 2 * channels, 1)
    conv('post_quant_conv', channels, channels, 1)
    conv('decoder.conv_in', channels, width)
    middle('decoder')
    for level in reversed(range(len(widths))):
        for index in range(blocks + 1):
            block(f'decoder.up.{level}.block.{index}', width, widths[level])
            width = widths[level]
            if level in (attention if decoder_attention is None else decoder_attention):
                attend(f'decoder.up.{level}.attn.{index}', width)
        if level > 0:
            conv(f'decoder.up.{level}.upsample.conv', width, width)
    norm('decoder.norm_out', width)
    conv('decoder.conv_out', width, 3)
    return weights


class Reference:
    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def conv(self, name: str, x: Tensor, **options: int) -> Tensor:
        weight = self.weights[f'{name}.weight']
        return functional.conv2d(
            x, weight, self.weights[f'{name}.bias'], **{'padding': weight.shape[-1] // 2, **options}
        )

    def norm(self, name: str, x: Tensor) -> Tensor:
        grouped = x.reshape(x.shape[0], 32, -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, unbiased=False, keepdim=True)
        x = ((grouped - mean) / (var + 1e-6).sqrt()).reshape(x.shape)
        return x * self.weights[f'{name}.weight'][:, None, None] + self.weights[f'{name}.bias'][:, None, None]

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f'{name}.conv1', self.swish(self.norm(f'{name}.norm1', x)))
        h = self.conv(f'{name}.conv2', self.swish(self.norm(f'{name}.norm2', h)))
        return h + (self.conv(f'{name}.nin_shortcut', x) if f'{name}.nin_shortcut.weight' in self.weights else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        if f'{name}.q.weight' not in self.weights:
            return x
        h = self.norm(f'{name}.norm', x)
        q, k, v = (self.conv(f'{name}.{part}', h).flatten(2) for part in 'qkv')
        attention = torch.softmax(torch.einsum('bci,bcj->bij', q, k) * x.shape[1] ** -0.5, dim=2)
        return x + self.conv(f'{name}.proj_out', torch.einsum('bij,bcj->bci', attention, v).reshape(x.shape))

    def swish(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def middle(self, name: str, x: Tensor) -> Tensor:
        x = self.attend(f'{name}.mid.attn_1', self.block(f'{name}.mid.block_1', x))
        return self.block(f'{name}.mid.block_2', x)

    def encode(self, x: Tensor, levels: int, blocks: int) -> Tensor:
        x = self.conv('encoder.conv_in', x)
        for level in range(levels):
            for index in range(blocks):
                x = self.block(f'encoder.down.{level}.block.{index}', x)
                x = self.attend(f'encoder.down.{level}.attn.{index}', x)
            if level < levels - 1:
                x = functional.pad(x, (0, 1, 0, 1))  # at the right and the bottom only
                x = self.conv(f'encoder.down.{level}.downsample.conv', x, stride=2, padding=0)
        x = self.swish(self.norm('encoder.norm_out', self.middle('encoder', x)))
        return self.conv('quant_conv', self.conv('encoder.conv_out', x))

    def decode(self, z: Tensor, levels: int, blocks: int) -> Tensor:
        x = self.middle('decoder', self.conv('decoder.conv_in', self.conv('post_quant_conv', z)))
        for level in reversed(range(levels)):
            for index in range(blocks + 1):
                x = self.block(f'decoder.up.{level}.block.{index}', x)
                x = self.attend(f'decoder.up.{level}.attn.{index}', x)
            if level > 0:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)  # nearest
                x = self.conv(f'decoder.up.{level}.upsample.conv', x)
        return self.conv('decoder.conv_out', self.swish(self.norm('decoder.norm_out', x)))


def write(path: Path, content: dict) -> str:
    save_file(content, path) if path.suffix == '.safetensors' else torch.save(content, path)
    return str(path)


@pytest.fixture(scope='module')
def small() -> Weights:
    return weights_of((32, 64), channels=3)


ARCHITECTURES = {
    'no attention in levels': {'widths': (32, 64), 'channels': 3},
    'attention at the lowest level': {'widths': (32, 32, 64), 'channels': 5, 'blocks': 2, 'attention': (2,)},
    'attention higher up, other widths': {'widths': (64, 32), 'channels': 4, 'attention': (0,)},
    'attention in the encoder only': {'widths': (32, 32), 'channels': 4, 'attention': (1,), 'decoder_attention': ()},
    'one level': {'widths': (32,), 'channels': 2},
}


@pytest.mark.parametrize('architecture', ARCHITECTURES.values(), ids=list(ARCHITECTURES))
def test_encodes_and_decodes_as_the_layout_says(architecture: dict, tmp_path: Path):
    weights, levels = weights_of(**architecture), len(architecture['widths'])
    blocks, channels = architecture.get('blocks', 1), architecture['channels']
    ldm, reference = File(write(tmp_path / 'vae.safetensors', weights)), Reference(weights)
    step = 2 ** (levels - 1)
    assert (ldm.channels, ldm.downsampling) == (channels, step)
    pixels = torch.rand(2, 3, 8 * step, 4 * step) * 2 - 1
    wanted = reference.encode(pixels, levels, blocks)
    moments = ldm.encode(pixels)
    assert moments.shape == (2, 2 * channels, 8, 4) and wanted.std() > 0.1
    torch.testing.assert_close(moments, wanted, rtol=1e-4, atol=1e-4)
    latents = torch.randn(2, channels, 4, 3)
    pixels = reference.decode(latents, levels, blocks)
    assert pixels.std() > 0.1
    torch.testing.assert_close(ldm.decode(latents), pixels, rtol=1e-4, atol=1e-4)
    assert not ldm.network.training and not any(p.requires_grad for p in ldm.network.parameters())


@pytest.mark.parametrize(
    'wrap',
    [
        lambda w: {'state_dict': w, 'epoch': 3},
        lambda w: {'model': w},
        lambda w: {'state_dict': {**w, 'loss.logvar': torch.zeros(()), 'linear_proj.weight': torch.zeros(2, 2)}},
        lambda w: (
            {f'first_stage_model.{name}': value for name, value in w.items()}
            | {'model.diffusion_model.a': torch.zeros(1), 'model.diffusion_model.b': torch.zeros(1)}
            | {'first_stage_model.loss.logvar': torch.zeros(())}
        ),
    ],
    ids=['state_dict', 'model', 'training parts', 'part of a larger model'],
)
def test_the_autoencoder_is_found_in_its_wrapping(wrap, small: Weights, tmp_path: Path):
    ldm = File(write(tmp_path / 'vae.ckpt', wrap(small)))
    assert ldm.weight_hash() == File(write(tmp_path / 'vae.safetensors', small)).weight_hash()


def test_hash_and_results_are_those_of_the_folder_that_diffusers_writes(small: Weights, tmp_path: Path):
    ldm = File(write(tmp_path / 'vae.pt', {name: value.half() for name, value in small.items()}))
    ldm.network.save_pretrained(tmp_path / 'folder')
    kl = KL(str(tmp_path / 'folder'))
    assert ldm.weight_hash() == kl.weight_hash() and kl.weight_hash().startswith('sha256:')
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(ldm.encode(pixels), kl.encode(pixels)) and ldm.encode(pixels).dtype == torch.float32
    other = File(write(tmp_path / 'other.pt', weights_of((32, 64), channels=3, seed=1)))
    assert other.weight_hash() != ldm.weight_hash()


def test_linear_attention_weights_are_the_same_as_convolutions_of_size_one(small: Weights, tmp_path: Path):
    flat = {name: value[..., 0, 0] if 'attn_1' in name and value.ndim == 4 else value for name, value in small.items()}
    hashes = {File(write(tmp_path / f'{len(w["encoder.mid.attn_1.q.weight"].shape)}.pt', w)).weight_hash()
              for w in (small, flat)}  # fmt: skip
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ('name', 'shape', 'message'),  # None: the tensor is missing
    [
        ('encoder.mid.block_2.norm1.bias', None, r'encoder\.mid\.block_2\.norm1\.bias: missing'),
        ('decoder.up.0.block.1.conv2.weight', None, r'decoder\.up\.0\.block\.1\.conv2\.weight: missing'),
        ('encoder.down.0.downsample.conv.weight', None, r'encoder\.down\.0\.downsample\.conv\.weight: missing'),
        ('decoder.conv_out.weight', None, r'decoder\.conv_out\.weight is missing, without which'),
        ('encoder.conv_in.weight', None, r'0 tensors are named encoder\.conv_in\.weight'),
        ('quantize.embedding.weight', (2, 2), r'quantize\.embedding.*for no such tensor'),
        ('model_ema.decay', (1,), r'model_ema\.decay: \[1\], .*no such tensor'),
        ('quant_conv.weight', (8, 6, 1, 1), r'quant_conv\.weight: \[8, 6, 1, 1\], the rest asks for \[6, 6, 1, 1\]'),
        ('a.encoder.conv_in.weight', (1,), '2 tensors are named'),
        ('encoder.down.1.block.0.conv1.weight', (48, 32, 3, 3), r'\[32, 48\] channels.*multiple of 32'),
        ('encoder.down.1.block.0.conv1.weight', (0, 32, 3, 3), r'\[32, 0\] channels.*multiple of 32'),
        ('decoder.conv_in.weight', (64,), r'decoder\.conv_in\.weight is \[64\], no convolution'),
        ('encoder.conv_in.weight', (32, 1, 3, 3), 'made for images of 1, 3 channels; images have 3 here'),
    ],
)
def test_a_file_that_is_not_quite_such_an_autoencoder_is_refused(
    name: str, shape: tuple[int, ...] | None, message: str, small: Weights, tmp_path: Path
):
    weights = dict(small)
    if shape is None:
        del weights[name]
    else:
        weights[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        File(write(tmp_path / 'vae.pt', weights)).network  # noqa: B018


class Anything:
    """An object that a file of tensors has no business with."""


def test_files_that_are_no_tensors_are_refused(tmp_path: Path, small: Weights):
    torch.save({'state_dict': small, 'hyper': Anything()}, tmp_path / 'objects.ckpt')
    (tmp_path / 'text.safetensors').write_text('not tensors')
    torch.save(torch.zeros(2), tmp_path / 'tensor.pt')
    (tmp_path / 'vae.onnx').touch()
    for name, message in {
        'objects.ckpt': 'could run code',
        'text.safetensors': 'no safetensors file, or a damaged one',
        'tensor.pt': 'holds a Tensor',
        'none.pt': 'no such file',
        'vae.onnx': 'files end with one of',
    }.items():
        with pytest.raises(ValueError, match=message):
            File(str(tmp_path / name)).network  # noqa: B018


def test_open_autoencoder_tells_files_from_folders(small: Weights, tmp_path: Path):
    path = write(tmp_path / 'vae.pt', small)
    assert type(open_autoencoder(path)) is File and type(open_autoencoder('owner/name.of.it')) is Folder
    assert type(open_autoencoder(str(tmp_path / 'none.ckpt'))) is File  # and not asked of the hub
    with pytest.raises(ValueError, match='no subfolder and no revision'):
        open_autoencoder(path, revision='main')
