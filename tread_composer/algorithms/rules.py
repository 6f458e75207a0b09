"""Which algorithms may not stand in one run, and why: declared by ours, asked by the configuration and on INIT.

An algorithm declares ``incompatible_with``: class names of others, each with the reason as a clause. One side of a pair
is enough. A name never means the declaring class itself (our ``EMA`` may so name Composer's). A model class may
declare the same: what cannot work on it.

What Composer's own algorithms cannot do in any run is here too; ``tests/algorithms/test_contract.py`` tries each pair.
"""

from typing import Literal

from composer.algorithms import EMA, SAM, GradientClipping, LayerFreezing, StochasticDepth
from composer.callbacks import CheckpointSaver
from composer.core import State, TimeUnit
from torch import nn
from torchvision.models.resnet import Bottleneck

from tread_composer.core.errors import UserError

__all__ = ['Limit', 'conflict', 'evaluated_weights', 'limits', 'num_averages', 'refuse_conflicts']

Limit = Literal['train', 'save', 'resume', 'shard']


def conflict(one: type, other: type) -> str | None:
    """Why these two classes may not stand in one run; None if they may."""
    if one is other:
        return None
    pairs = (one, other), (other, one)
    reasons = (getattr(declaring, 'incompatible_with', {}).get(named.__name__) for declaring, named in pairs)
    return next(filter(None, reasons), None)


def limits(algorithm: object, model: nn.Module | None = None) -> dict[Limit, str]:
    """What a run with this algorithm of Composer's cannot do, each with the reason; empty if it can do all.

    The model has the weights that training starts from; None stands for one of our denoisers, freshly made.
    """
    reasons: dict[Limit, str] = {}
    parts = () if model is None else model.modules()
    if isinstance(algorithm, StochasticDepth) and not any(isinstance(part, Bottleneck) for part in parts):
        reasons['train'] = (
            "it exchanges blocks of torchvision's ResNet alone, and the model has none, so it would do nothing"
        )
    if isinstance(algorithm, GradientClipping) and algorithm.clipping_type == 'adaptive':
        named = () if model is None else model.named_parameters()
        trained = ((name, weight) for name, weight in named if weight.requires_grad and not weight.is_meta)
        zero = next((name for name, weight in trained if not weight.any()), None)
        if model is None or zero is not None:
            reasons['train'] = (
                'adaptive clipping cuts a gradient down to a share of its weights, and of weights that start at zero '
                f'{"(gates and head)" if zero is None else f"({zero}, for one)"} that is nothing: they would stay zero '
                "for ever, with no error. Clip by clipping_type 'norm' or 'value'"
            )
    if isinstance(algorithm, LayerFreezing):
        reasons['save'] = (
            'once it has frozen a layer, Composer cannot save a checkpoint any more: it looks for the moments of '
            'weights that it has taken out of the optimizer, and stops with a KeyError'
        )
    if isinstance(algorithm, SAM):
        reasons['resume'] = (
            "its checkpoints hold nothing of the optimizer that SAM wraps: a resumed run would begin with AdamW's "
            'moments at zero, with no more than a warning'
        )
    if isinstance(algorithm, EMA):
        # It needs each rank to hold all parameters, on as many ranks as were saved.
        reasons['shard'] = (
            "Composer's EMA fails under FSDP1 and corrupts training when resumed under FSDP2; take algorithms.ema"
        )
        if algorithm.update_interval.unit == TimeUnit.EPOCH:
            reasons['save'] = (
                "after a checkpoint Composer's EMA leaves its average in the model, and where the next thing is an "
                'update at the end of an epoch, it averages that average, and training goes on from what comes of it; '
                'with half_life in batches (ba), and with our EMA, it does not happen'
            )
    return reasons


def num_averages(algorithm: object) -> int:
    """Copies of the trainable weights that it keeps in float32; Composer's average does not say so itself."""
    return getattr(algorithm, 'num_averages', int(isinstance(algorithm, EMA)))


def refuse_conflicts(algorithm: object, state: State) -> None:
    """On ``Event.INIT``, and again where an algorithm has added weights: ``UserError`` if the run cannot go on so.

    It has an algorithm that this one may not stand beside, the same one twice, or one of Composer's that cannot work.
    """
    name, two = type(algorithm).__name__, getattr(algorithm, 'instead_of_two', 'Take one out')
    saves = any(isinstance(callback, CheckpointSaver) for callback in state.callbacks)
    for partner in state.algorithms:
        if type(partner) is type(algorithm) and partner is not algorithm:
            raise UserError(f'{name}: the run has two, and each would undo or repeat what the other does. {two}')
        title, reason = type(partner).__name__, conflict(type(algorithm), type(partner))
        if reason is not None:
            raise UserError(f'{name} cannot stand beside {title}: {reason}. Take one of them out')
    for partner in state.algorithms:
        title, reasons = type(partner).__name__, limits(partner, state.model)
        reason = conflict(type(state.model), type(partner)) or reasons.get('train')
        if reason is not None:
            raise UserError(f'{title} cannot work in this run: {reason}. Take it out')
        if saves and 'save' in reasons:
            remedy = 'Take it out, or train without saving (no save_folder)'
            raise UserError(f'{title} cannot work in this run: {reasons["save"]}. {remedy}')


def evaluated_weights(state: State) -> str:
    """Which weights an evaluation of this run sees, in words: an algorithm may put an average in their place."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA):
            return "weights averaged by Composer's EMA"
        in_evaluation = getattr(algorithm, 'in_evaluation', None)
        if in_evaluation is not None:
            return in_evaluation(state)
    return 'raw weights'
