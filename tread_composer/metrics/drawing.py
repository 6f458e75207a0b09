"""How images are drawn: which labels and seeds, and what a protocol says of it.

For ``sample``, ``evaluate``, ``sweep`` and the callbacks, so that the same images have the same protocol.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tread_composer.core.randomness import KeyedRandom
from tread_composer.metrics.protocol import UINT8_RULE, UNKNOWN
from tread_composer.routing import Route
from tread_composer.samplers import SamplingSettings, sampler_facts

__all__ = ['Draws', 'drawing_facts', 'time_grid']


@dataclass(frozen=True)
class Draws:
    """Labels and seeds of all images (image i has ``first_seed + i``), and by which rule.

    Attributes:
        rule: ``'balanced'``: all classes in turn, each as often; ``'in turn'``: the first ones once more;
            ``'classes'``: some in turn; ``'random'``; ``'none'`` without classes.
        columns: In a grid of so many columns the images of a column share the seed ``first_seed + column``.
    """

    labels: tuple[int, ...]
    first_seed: int
    rule: str
    columns: int | None = None

    @classmethod
    def in_turn(cls, count: int, num_classes: int, first_seed: int) -> 'Draws':
        """All classes in turn; a model without classes has its null label, 0."""
        if not num_classes:
            return cls((0,) * count, first_seed, 'none')  # 0 is the null label of such a model
        rule = 'in turn' if count % num_classes else 'balanced'  # balanced: as many of each class
        return cls(tuple(index % num_classes for index in range(count)), first_seed, rule)

    @classmethod
    def at_random(cls, count: int, num_classes: int, first_seed: int) -> 'Draws':
        """Classes drawn independently, by the seed."""
        if not num_classes:
            return cls.in_turn(count, 0, first_seed)
        # Uniform in (0, 1), one for each image, from its own seed
        shares = KeyedRandom(first_seed, 0, range(count)).uniform('label').double()
        return cls(tuple((shares * num_classes).long().tolist()), first_seed, 'random')

    @property
    def digest(self) -> str:
        """SHA-256 over the labels, in order."""
        return f'sha256:{hashlib.sha256(" ".join(map(str, self.labels)).encode()).hexdigest()}'

    def seed(self, index: int) -> int:
        """The seed of image ``index``."""
        return self.first_seed + (index % self.columns if self.columns else index)

    def of(self, indices: Sequence[int]) -> tuple[list[int], list[int]]:
        """Labels and seeds of the images of these numbers."""
        return [self.labels[index] for index in indices], [self.seed(index) for index in indices]


def time_grid(objective: Any, sampler: str) -> dict[str, Any] | str:
    """The objective's name, what decides where the steps of a sampler lie, and how the last one ends.

    ``'unknown'`` of None, and of an objective that says nothing of its grid.
    """
    if not hasattr(objective, 'time_grid'):
        return UNKNOWN
    return {'objective': objective.name, **objective.time_grid(), **sampler_facts(sampler, objective)}


def drawing_facts(
    model: Any,
    sampling: SamplingSettings,
    draws: Draws,
    *,
    weights: str,
    decode_dtype: str = 'float32',
    routes: Sequence[Route] = (),
    weak: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The part of a ``Protocol`` that says how images came about.

    ``model`` is a ``LatentDiffusion``; without an ``objective`` its numbers compare with none. On ``routes`` it was
    trained to do with fewer tokens, which guidance may depend on; ``weak`` names the second network's weights and their
    digest.
    """
    autoencoder: Any = getattr(model, 'autoencoder', None)
    encoded = hasattr(autoencoder, 'weight_hash')  # pixels are decoded by arithmetic alone
    return {
        'weights': weights,
        'labels': draws.rule,
        'seed': draws.first_seed,
        'sampling': sampling.protocol(routes),
        'time_grid': time_grid(getattr(model, 'objective', None), sampling.sampler),
        'weak': 'none' if weak is None else f'{weak[0]} {weak[1]}',
        'autoencoder': autoencoder.path if encoded else 'pixels',
        'autoencoder_hash': autoencoder.weight_hash() if encoded else None,
        'decode_dtype': decode_dtype,
        'uint8_rule': UINT8_RULE,
    }
