import numpy as np
import pytest
import torch

from tread_composer.core.randomness import KeyedRandom


def test_the_same_key_gives_the_same_numbers_and_any_other_gives_others():
    def drawn(seed=17, batch=3, rows=(5, 6), name='noise'):
        return KeyedRandom(seed, batch, rows).normal(name, 4)

    base = drawn()
    assert torch.equal(base, drawn())
    for other in (drawn(seed=18), drawn(batch=4), drawn(rows=(7, 8)), drawn(name='other')):
        assert not (base == other).any()
    whole = KeyedRandom(1, 2, range(8)).normal('noise', 3)  # a row does not depend on its neighbours
    assert torch.equal(whole[4:6], KeyedRandom(1, 2, [4, 5]).normal('noise', 3))
    assert torch.equal(whole[[6, 0]], KeyedRandom(1, 2, [6, 0]).normal('noise', 3))


def test_the_numbers_of_a_row_are_those_of_a_generator_made_for_it_alone():
    # An odd count of float32 numbers leaves half of a word in the generator, which must not reach the next row.
    random, rows = KeyedRandom(17, 2**33, [3, 0, 2**40]), []
    key = np.random.SeedSequence([17, *b'noise']).generate_state(2, np.uint64)
    for row in random.rows:
        counter = np.array([0, 0, row, 2**33], dtype=np.uint64)
        rows.append(np.random.Generator(np.random.Philox(key=key, counter=counter)).random(3))
    expected = torch.from_numpy(np.array(rows)).float()
    assert torch.equal(random.uniform('noise', 3), expected)
    random.normal('noise', 5)
    assert torch.equal(random.uniform('noise', 3), expected)
    assert torch.equal(random.normal('noise', 5)[1:], KeyedRandom(17, 2**33, [0, 2**40]).normal('noise', 5))


def test_distributions():
    random = KeyedRandom(0, 0, range(2000))
    normal, uniform = random.normal('a', 20).flatten(), random.uniform('b', 20).flatten()
    assert normal.dtype == uniform.dtype == torch.float32
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    counts = np.histogram(uniform, bins=10, range=(0, 1))[0] / len(uniform)
    assert np.allclose(counts, 0.1, atol=0.01)
    assert uniform.min() > 0 and uniform.max() < 1
    rows = random.normal('c', 2)
    assert abs(torch.corrcoef(torch.stack([rows[:-1, 0], rows[1:, 0]]))[0, 1]) < 0.1


def test_shapes_negative_keys_and_the_global_generators():
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert KeyedRandom(0, 0, [1, 2, 3]).uniform('t').shape == (3,)
    assert KeyedRandom(0, 0, []).normal('t', 4).shape == (0, 4)
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all()
    with pytest.raises(ValueError, match='must not be negative'):
        KeyedRandom(0, 0, [-1])


def test_streams_of_neighbouring_rows_and_batches_do_not_overlap():
    values = [KeyedRandom(0, batch, range(8)).uniform('a', 64) for batch in range(2)]
    numbers = torch.cat(values).flatten().tolist()
    assert len(set(numbers)) > len(numbers) - 3
