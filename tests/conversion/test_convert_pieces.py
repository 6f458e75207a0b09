"""Pieces of the conversion that a whole run reaches only by accident."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conversion.worlds import make_images, read
from tread_composer.conversion.contents import channel_sums
from tread_composer.conversion.conversion import Conversion
from tread_composer.conversion.encoding import ImageEncoder, image_encoder
from tread_composer.conversion.making import prepared_batches
from tread_composer.conversion.parts import PartWriter
from tread_composer.conversion.settings import ImageSettings
from tread_composer.conversion.sources.detect import open_sources
from tread_composer.conversion.splits import permutation
from tread_composer.conversion.verify import verify
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import Manifest
from tread_composer.io.progress import RankProgress


def pixels(folder: Path, resolution: int) -> ImageEncoder:
    settings = ImageSettings(source=str(folder / 'in'), out=str(folder / 'out'), resolution=resolution, mirror=False)
    return image_encoder(settings, torch.device('cpu'))


def write_part(folder: Path, value: float) -> PartWriter:
    writer = PartWriter(folder, 3, pixels(folder, 2), {'seed': 0})
    writer.write([np.full((2, 3, 2, 2), value, np.float16)], [0, 1], ['a', 'b'])
    return writer


def test_a_part_that_somebody_finished_first_stays(tmp_path):
    first, second = write_part(tmp_path, 1.0), write_part(tmp_path, 2.0)
    assert not (tmp_path / '00003').exists()
    second.finish()
    first.finish()
    assert [path.name for path in tmp_path.iterdir()] == ['00003']
    part = json.loads((tmp_path / '00003' / 'part.json').read_text())
    assert (part['samples'], part['sum'], part['sum_of_squares'], part['values_per_channel']) == (
        2, [16.0] * 3, [32.0] * 3, 8,
    )  # fmt: skip


class Pooled(ImageEncoder):
    """Means of squares of pixels."""

    kind, title, autoencoder, autoencoder_hash = 'samples', 'pooled', 'pool', 'sha256:0'

    def __init__(self, settings: ImageSettings, device: torch.device) -> None:
        super().__init__(settings, device, channels=3, downsampling=4)

    def stored(self, pixels_B3RR: torch.Tensor, purpose: str, positions: Sequence[int]) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(pixels_B3RR, 4)


def test_another_encoder_is_one_small_class(tmp_path):
    source, out = str(make_images(tmp_path / 'in', 5)), tmp_path / 'out'
    settings = ImageSettings(source=source, out=str(out), resolution=16, mirror=False, workers=0)
    Conversion(settings, functools.partial(Pooled, settings)).run()
    assert Manifest.load(out / 'train').latent_shape == (3, 4, 4) and verify(out) == []
    rows, data = read(out / 'train'), pixels(tmp_path, 16)
    image = torch.from_numpy(data.prepare((tmp_path / 'in' / rows['name'][0]).read_bytes()).values)[None]
    expected = torch.nn.functional.avg_pool2d(image.float() / 127.5 - 1, 4)[0].half()
    np.testing.assert_array_equal(rows['latents'][0], expected.numpy())


def test_the_permutation_is_this_one_for_ever():
    """What a conversion wrote years ago must still be found to be the same."""
    assert permutation(12, 0, 'train').tolist() == [7, 3, 0, 1, 2, 4, 10, 11, 5, 9, 6, 8]
    orders = [permutation(100, seed, split).tolist() for seed in (0, 1) for split in ('train', 'val')]
    assert all(sorted(order) == list(range(100)) for order in orders) and len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_is_gone_is_a_problem_and_a_text_is_unreadable(tmp_path, workers):
    settings = ImageSettings(str(make_images(tmp_path / 'in', 5)), 'unused')
    source = open_sources(settings, tmp_path)['train']
    (tmp_path / 'in' / source.names[3]).write_text('no image')
    (tmp_path / 'in' / source.names[4]).unlink()
    batches = [('train', 0, [2, 3]), ('train', 0, [4])]
    first, second = prepared_batches({'train': source}, batches, pixels(tmp_path, 8), workers=workers, remedy='')
    assert first.samples.shape == (1, 3, 8, 8) and first.positions == [2] and first.problem is None
    assert [position for position, _ in first.unreadable] == [3]
    assert second.problem.startswith(f'train: {source.names[4]}: cannot be read')


def test_too_little_shared_memory_is_said_before_the_bus_error(tmp_path):
    batches = [('train', 0, list(range(10**6)))]
    with pytest.raises(UserError, match=r'/dev/shm has .* --shm-size.* or read less$'):
        prepared_batches({}, batches, pixels(tmp_path, 4096), workers=1, remedy='read less')


def test_progress_adds_up_the_ranks(tmp_path):
    lines: list[str] = []
    first, second = (
        RankProgress(tmp_path, rank, total=1000, done_before=100, log=lines.append, interval=0) for rank in range(2)
    )
    second.add(300)
    second.tick()
    first.add(200)
    first.tick()
    assert len(lines) == 1 and lines[0].startswith('600 of 1,000 images (60.0%), ') and lines[0].endswith(' left')
    second.tell_failure('the disk is full')
    with pytest.raises(UserError, match='on rank 1: the disk is full'):
        RankProgress(tmp_path, 0, total=1, done_before=0, log=lines.append).tick()
    RankProgress.clear(tmp_path)
    assert not any(tmp_path.iterdir())


def test_statistics_do_not_depend_on_the_order_in_memory():
    rows = np.random.default_rng(0).normal(size=(3, 4, 16, 16)).astype(np.float16)
    channels_last = np.ascontiguousarray(rows.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert channel_sums(rows, 'moments').tolist() == channel_sums(channels_last, 'moments').tolist()
