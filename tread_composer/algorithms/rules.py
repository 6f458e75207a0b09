"""Which algorithms may not stand in one run, and why: declared by ours, asked by the configuration and on INIT.

An algorithm declares ``incompatible_with``: class names of others, each with the reason as a clause. One side of a pair
is enough. A name never means the declaring class itself (our ``EMA`` may so name Composer's). A model class may
declare the same: what cannot work on it.

What Composer's own algorithms cannot do in any run is here too; ``tests/algorithms/test_contract.py`` tries each pair.
"""

from composer.algorithms import EMA, SAM, GradientClipping, LayerFreezing, StochasticDepth
from composer.callbacks import CheckpointSaver
from composer.core import State, TimeUnit
from torch import nn
from torchvision.models.resnet import Bottleneck

from tread_composer.core.errors import UserError

__all__ = [
    'cannot_work',
    'conflict',
    'evaluated_weights',
    'never_resumes',
    'never_sharded',
    'num_averages',
    'refuse_conflicts',
    'refuse_unfit',
    'without_checkpoints_only',
]


def conflict(one: type, other: type) -> str | None:
    """Why these two classes may not stand in one run; None if they may."""
    if one is other:
        return None
    pairs = (one, other), (other, one)
    reasons = (getattr(declaring, 'incompatible_with', {}).get(named.__name__) for declaring, named in pairs)
    return next(filter(None, reasons), None)


def cannot_work(algorithm: object, model: nn.Module | None = None) -> str | None:
    """Why this algorithm of Composer's cannot do its work on a model; None if it can.

    The model has the weights that training starts from; None stands for one of our denoisers, freshly made.
    """
    parts = () if model is None else model.modules()
    if isinstance(algorithm, StochasticDepth) and not any(isinstance(part, Bottleneck) for part in parts):
        return "it exchanges blocks of torchvision's ResNet alone, and the model has none, so it would do nothing"
    if isinstance(algorithm, GradientClipping) and algorithm.clipping_type == 'adaptive':
        zero = None if model is None else _all_zero(model)
        if model is None or zero is not None:
            return (
                'adaptive clipping cuts a gradient down to a share of its weights, and of weights that start at zero '
                f'{"(gates and head)" if zero is None else f"({zero}, for one)"} that is nothing: they would stay zero '
                "for ever, with no error. Clip by clipping_type 'norm' or 'value'"
            )
    return None


def without_checkpoints_only(algorithm: object) -> str | None:
    """Why a run with this algorithm of Composer's cannot save checkpoints; None if it can."""
    if isinstance(algorithm, LayerFreezing):
        return (
            'once it has frozen a layer, Composer cannot save a checkpoint any more: it looks for the moments of '
            'weights that it has taken out of the optimizer, and stops with a KeyError'
        )
    if isinstance(algorithm, EMA) and algorithm.update_interval.unit == TimeUnit.EPOCH:
        return (
            "after a checkpoint Composer's EMA leaves its average in the model, and where the next thing is an update "
            'at the end of an epoch, it averages that average, and training goes on from what comes of it; with '
            'half_life in batches (ba), and with our EMA, it does not happen'
        )
    return None


def never_resumes(algorithm: object) -> str | None:
    """Why a run with this algorithm of Composer's cannot be continued from a checkpoint; None if it can."""
    if isinstance(algorithm, SAM):
        return (
            "its checkpoints hold nothing of the optimizer that SAM wraps: a resumed run would begin with AdamW's "
            'moments at zero, with no more than a warning'
        )
    return None


def never_sharded(algorithm: object) -> str | None:
    """Why this algorithm of Composer's needs each rank to hold all parameters, on as many ranks as were saved."""
    if isinstance(algorithm, EMA):
        return "Composer's EMA fails under FSDP1 and corrupts training when resumed under FSDP2; take algorithms.ema"
    return None


def num_averages(algorithm: object) -> int:
    """Copies of the trainable weights that it keeps in float32; Composer's average does not say so itself."""
    return getattr(algorithm, 'num_averages', int(isinstance(algorithm, EMA)))


def refuse_conflicts(algorithm: object, state: State) -> None:
    """To be called on ``Event.INIT``, before the algorithm touches the model.

    Raises:
        UserError: The run has an algorithm that this one may not stand beside, the same one twice, or one of Composer's
            that cannot work in this run.
    """
    name, two = type(algorithm).__name__, getattr(algorithm, 'instead_of_two', 'Take one out')
    for other in state.algorithms:
        if type(other) is type(algorithm) and other is not algorithm:
            raise UserError(f'{name}: the run has two, and each would undo or repeat what the other does. {two}')
        reason = conflict(type(algorithm), type(other))
        if reason is not None:
            raise UserError(f'{name} cannot stand beside {type(other).__name__}: {reason}. Take one of them out')
    refuse_unfit(state)


def refuse_unfit(state: State) -> None:
    """The second half of ``refuse_conflicts``, once more for an algorithm that has added weights to the model.

    Raises:
        UserError: The run has an algorithm of Composer's that cannot work in it.
    """
    saves = any(isinstance(callback, CheckpointSaver) for callback in state.callbacks)
    for algorithm in state.algorithms:
        reason, remedy = conflict(type(state.model), type(algorithm)), 'Take it out'
        reason = reason or cannot_work(algorithm, state.model)
        if reason is None and saves:
            reason, remedy = without_checkpoints_only(algorithm), f'{remedy}, or train without saving (no save_folder)'
        if reason is not None:
            raise UserError(f'{type(algorithm).__name__} cannot work in this run: {reason}. {remedy}')


def _all_zero(model: nn.Module) -> str | None:
    """Name of a trainable parameter without any value but zero."""
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad and not p.is_meta)
    return next((name for name, parameter in named if not parameter.any()), None)


def evaluated_weights(state: State) -> str:
    """Which weights an evaluation of this run sees, in words: an algorithm may put an average in their place."""
    for algorithm in state.algorithms:
        if isinstance(algorithm, EMA):
            return "weights averaged by Composer's EMA"
        in_words = getattr(algorithm, 'in_evaluation', None)
        if in_words is not None:
            return in_words(state)
    return 'raw weights'
