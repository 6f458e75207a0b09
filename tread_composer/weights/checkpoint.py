"""The weights in a checkpoint of Composer: raw, averaged while training, or averaged afterwards."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tread_composer.core.errors import UserError

__all__ = ['averaged_weights', 'checkpoint_weights']

_NETWORK = 'denoiser.'  # where a LatentDiffusion has it


def checkpoint_weights(state: Mapping[str, Any], weights: str, source: str) -> dict[str, Tensor]:
    """Weights of the network (``'ema'`` or ``'raw'``), float32, under its own names.

    ``state`` is what ``read_checkpoint`` gives of the file or folder ``source``.

    Raises:
        UserError: The checkpoint does not have these weights.
    """
    raw = _network_part(state['model'])
    if not raw:
        raise UserError(f'{source}: its model has no {_NETWORK[:-1]}, so it is not a LatentDiffusion of this project')
    average = dict(state.get('algorithms', {})).get('EMA')
    if average is not None and 'average' not in average:  # Composer's own: `ema_weights_active` says which is which
        present = 'ema' if average.get('ema_weights_active') else 'raw'
        if weights != present:
            raise UserError(
                f"{source}: Composer's EMA has put its {'averaged' if present == 'ema' else 'raw'} weights into this "
                f'checkpoint in place of the others; take weights={present!r}, or train with algorithms.ema'
            )
        return raw
    if weights == 'raw':
        return raw
    if average is None or average['average'] is None:
        raise UserError(
            f'{source}: holds no averaged weights (the run had no algorithms.ema); take the raw ones: weights=raw'
        )
    return averaged_weights(state, average['average'], source)


def averaged_weights(state: Mapping[str, Any], average: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights of the network from an average under the model's names; what is not averaged from the checkpoint."""
    raw, averaged = _network_part(state['model']), _network_part(average)
    foreign = averaged.keys() - raw.keys()
    if foreign:
        raise UserError(f'{source}: averages parameters that the model has not, such as {sorted(foreign)[0]!r}')
    return raw | averaged  # what is not trained (positions) is not averaged


def _network_part(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        # A copy: the file may be overwritten by the run while the weights are in use.
        name.removeprefix(_NETWORK): value.to(torch.float32, copy=True)
        for name, value in state_dict.items()
        if name.startswith(_NETWORK)
    }
