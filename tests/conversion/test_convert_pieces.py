"""Pieces of the conversion that a whole run reaches only by accident."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.conversion.worlds import make_images
from tread_composer.conversion.decoding import Batch, decoded_batches
from tread_composer.conversion.parts import PartWriter
from tread_composer.conversion.plan import make_plans, permutation
from tread_composer.conversion.settings import Settings
from tread_composer.conversion.sources import open_sources
from tread_composer.core.errors import UserError
from tread_composer.data.columns import columns
from tread_composer.io.progress import RankProgress


def write_part(folder: Path, value: float) -> PartWriter:
    writer = PartWriter(
        folder, 3, columns=columns('samples', (1, 2, 2)), compression=None, kind='samples', content={'seed': 0}
    )
    writer.write([np.full((2, 1, 2, 2), value, np.float16)], [0, 1], ['a', 'b'])
    return writer


def test_a_part_that_somebody_finished_first_stays(tmp_path):
    first, second = write_part(tmp_path, 1.0), write_part(tmp_path, 2.0)
    assert not (tmp_path / '00003').exists()
    second.finish()
    first.finish()
    assert [path.name for path in tmp_path.iterdir()] == ['00003']
    part = json.loads((tmp_path / '00003' / 'part.json').read_text())
    assert (part['samples'], part['sum'], part['sum_of_squares'], part['values_per_channel']) == (2, [16.0], [32.0], 8)


@dataclass
class Few:
    """A source of nothing but names."""

    class_names: tuple[str, ...]
    layout: str = 'few'
    description: str = 'few images'

    def __post_init__(self) -> None:
        self.names = [f'{name}/1.jpg' for name in self.class_names]
        self.labels = np.arange(len(self.names))
        self.ignored = 0

    def __len__(self) -> int:
        return len(self.names)

    def read(self, position: int) -> bytes:
        raise AssertionError(position)


@pytest.mark.parametrize(
    ('val', 'message'), [(('b', 'c'), r'only in train: a \(1\)\n.*only in val: c \(1\)'), (('b', 'a'), 'another order')]
)
def test_labels_must_mean_the_same_in_all_splits(val, message, tmp_path):
    sources = {'train': Few(('a', 'b')), 'val': Few(val)}
    settings = Settings(source=str(tmp_path / 'in'), out=str(tmp_path / 'out'))
    with pytest.raises(UserError, match=message):
        make_plans(sources, settings)


def test_the_permutation_is_this_one_for_ever():
    """What a conversion wrote years ago must still be found to be the same."""
    assert permutation(12, 0, 'train').tolist() == [7, 3, 0, 1, 2, 4, 10, 11, 5, 9, 6, 8]
    orders = [permutation(100, seed, split).tolist() for seed in (0, 1) for split in ('train', 'val')]
    assert all(sorted(order) == list(range(100)) for order in orders) and len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize('workers', [0, 1])
def test_a_file_that_is_gone_is_a_problem_and_a_text_is_unreadable(tmp_path, workers):
    source = open_sources(make_images(tmp_path / 'in', 5), scratch=tmp_path)['train']
    (tmp_path / 'in' / source.names[3]).write_text('no image')
    (tmp_path / 'in' / source.names[4]).unlink()
    batches = [Batch('train', 0, [2, 3]), Batch('train', 0, [4])]
    first, second = decoded_batches({'train': source}, batches, 8, workers=workers, pin_memory=False)
    assert first['images'].shape == (1, 3, 8, 8) and first['positions'] == [2] and first['problem'] is None
    assert [position for position, _ in first['unreadable']] == [3]
    assert second['problem'].startswith(f'train: {source.names[4]}: cannot be read')


def test_too_little_shared_memory_is_said_before_the_bus_error():
    with pytest.raises(UserError, match=r'/dev/shm has .* --shm-size'):
        decoded_batches({}, [Batch('train', 0, list(range(10**6)))], 4096, workers=1, pin_memory=False)


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
