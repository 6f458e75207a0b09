"""Random numbers keyed by what they are for, so that nothing has to be saved and nothing else can move them.

Composer does not restore the global generators when a StreamingDataset resumes in mid-epoch, and it saves an
algorithm's state from rank 0 only. So every draw that training depends on comes from here instead: a counter-based
generator (Philox 4x64, Salmon et al. 2011) whose key is (seed, purpose) and whose counter is (batch, row). The row is
the sample's position in the data set where the batch carries it, else its position in the global batch. A resumed
run, an out-of-memory retry, a recomputed block and another number of ranks therefore see the same numbers, and the
global generators are left alone: a dense and a routed run with one seed see the same noise.
"""

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ['KeyedRandom']

_ONE_BELOW = 1.0 - 2.0**-24  # the largest float32 below one


class KeyedRandom:
    """Independent random streams, one for each row of a batch.

    Args:
        seed: The run's seed, the same on all ranks (Composer's ``state.rank_zero_seed``).
        batch: The number of the batch within the run; 0 for draws that belong to no batch.
        rows: What tells the samples of one batch apart, one non-negative integer each. Equal rows get equal numbers.

    Each method takes a ``purpose``. Two purposes never share numbers; the same purpose twice gives the same numbers.
    """

    def __init__(self, seed: int, batch: int, rows: Sequence[int]) -> None:
        if min((seed, batch, *rows), default=0) < 0:
            raise ValueError(f'seed, batch and rows must not be negative, got seed={seed}, batch={batch}, rows={rows}')
        self.seed, self.batch, self.rows = int(seed), int(batch), [int(row) for row in rows]

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """Standard normal numbers, float32 ``[len(rows), *shape]`` on the CPU."""
        out = np.empty((len(self.rows), *shape), dtype=np.float32)
        for index, generator in enumerate(self._generators(purpose)):
            out[index] = generator.standard_normal(shape or None, dtype=np.float32)
        return torch.from_numpy(out)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """Uniform numbers strictly between 0 and 1, float32 ``[len(rows), *shape]`` on the CPU."""
        out = np.empty((len(self.rows), *shape), dtype=np.float64)
        for index, generator in enumerate(self._generators(purpose)):
            out[index] = generator.random(shape or None)
        return torch.from_numpy(out.clip(2.0**-25, _ONE_BELOW).astype(np.float32))

    def _generators(self, purpose: str) -> Iterator[np.random.Generator]:
        """The generator of each row in turn: one object, since it is set ten times as fast as it is made."""
        philox = np.random.Philox(key=_key(self.seed, purpose))
        generator, state = np.random.Generator(philox), philox.state
        for row in self.rows:
            state['state']['counter'] = np.array([0, 0, row, self.batch], dtype=np.uint64)
            philox.state = state  # with it goes what the row before has left in the buffer
            yield generator


@functools.lru_cache(maxsize=64)
def _key(seed: int, purpose: str) -> np.ndarray:
    return np.random.SeedSequence([seed, *purpose.encode()]).generate_state(2, np.uint64)
