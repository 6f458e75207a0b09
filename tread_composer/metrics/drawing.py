"""How images are drawn, as a protocol has it: one description for whatever draws some and reports numbers of them.

For ``sample``, ``evaluate``, ``sweep`` and the callbacks, so that the same images have the same protocol.
"""

from collections.abc import Sequence
from typing import Any

from tread_composer.metrics.protocol import UINT8_RULE, UNKNOWN
from tread_composer.routing import Route
from tread_composer.samplers import SamplingSettings

__all__ = ['drawing_facts', 'time_grid']


def time_grid(objective: Any) -> dict[str, Any] | str:
    """The objective and its settings that decide where the steps of a sampler lie.

    Args:
        objective: Of the model; ``'unknown'`` is the answer for None, and for one that says nothing of its grid.
    """
    if not hasattr(objective, 'time_grid'):
        return UNKNOWN
    return {'objective': objective.name, **objective.time_grid()}


def drawing_facts(
    model: Any,
    sampling: SamplingSettings,
    *,
    weights: str,
    labels: str,
    seed: int,
    decode_dtype: str = 'float32',
    routes: Sequence[Route] = (),
    weak: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The part of a ``Protocol`` that says how images came about.

    Args:
        model: What draws: a ``LatentDiffusion``, or something with its ``num_classes``. Without an ``objective`` of
            this project its time grid is unknown, and its numbers compare with none.
        sampling: How.
        weights: ``'ema'`` or ``'raw'``.
        labels: How the classes were chosen; a model without classes makes it ``'none'``.
        seed: Image i has the seed ``seed + i``.
        decode_dtype: What the autoencoder computed in.
        routes: Where the model was trained to do with fewer tokens; guidance may depend on them.
        weak: Of the second network, if there is one: which weights, and their digest.
    """
    autoencoder: Any = getattr(model, 'autoencoder', None)
    encoded = hasattr(autoencoder, 'weight_hash')
    return {
        'weights': weights,
        'labels': labels if model.num_classes else 'none',
        'seed': seed,
        'sampling': sampling.protocol(routes),
        'time_grid': time_grid(getattr(model, 'objective', None)),
        'weak': 'none' if weak is None else f'{weak[0]} {weak[1]}',
        'autoencoder': autoencoder.path if encoded else 'pixels',
        'autoencoder_hash': autoencoder.weight_hash() if encoded else None,
        'decode_dtype': decode_dtype,
        'uint8_rule': UINT8_RULE,
    }
