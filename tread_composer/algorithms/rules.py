"""Which algorithms may not stand in one run, and why: declared by ours, asked by the configuration and on INIT.

An algorithm declares ``incompatible_with``: class names of others, each with the reason as a clause. One side of a pair
is enough. A name never means the declaring class itself (our ``EMA`` may so name Composer's).
"""

from composer.core import State

from tread_composer.errors import UserError

__all__ = ['conflict', 'refuse_conflicts']


def conflict(one: type, other: type) -> str | None:
    """Why these two classes may not stand in one run; None if they may."""
    if one is other:
        return None
    for declaring, named in ((one, other), (other, one)):
        rules = getattr(declaring, 'incompatible_with', {})
        if named.__name__ in rules:
            return rules[named.__name__]
    return None


def refuse_conflicts(algorithm: object, state: State) -> None:
    """To be called on ``Event.INIT``, before the algorithm touches the model.

    Raises:
        UserError: The run has an algorithm that this one may not stand beside.
    """
    for other in state.algorithms:
        reason = conflict(type(algorithm), type(other))
        if reason is not None:
            raise UserError(
                f'{type(algorithm).__name__} cannot stand beside {type(other).__name__}: {reason}. Take one of them out'
            )
