"""``Equation``: what a sampler walks along, bound for one run on one batch; and what a sampler is.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Callable
from typing import Any, Concatenate, TypeVar

from torch import Tensor

from tread_composer.core.protocols import Denoiser, StepNoise

__all__ = ['Clock', 'Equation', 'Evaluations', 'Sampler', 'marked', 'needs']


class Evaluations:
    """What a caller learns of the evaluations: ``begun(number)`` as each begins, from 0 in its batch."""

    def __init__(self, begun: Callable[[int], None] = lambda number: None) -> None:
        self.begun = begun
        self.taken: list[int] = []
        """Evaluations of each image that is drawn, in order."""


class Clock:
    """The times at which one run of a sampler has evaluated its denoiser so far, the present one last."""

    def __init__(self, begun: Callable[[int], None] = lambda number: None) -> None:
        self.times: list[float | Tensor] = []
        self._begun = begun
        self.taken_B: Tensor | None = None
        """Evaluations of each sample, where they take steps of their own; set at the end."""

    def begin(self, time: Tensor) -> None:
        """An evaluation at this time begins."""
        self._begun(len(self.times))
        self.times.append(time if time.dim() else float(time))

    def taken(self, count: int) -> list[int]:
        """Evaluations of each of ``count`` samples."""
        return [len(self.times)] * count if self.taken_B is None else self.taken_B.tolist()

    @property
    def time(self) -> float | Tensor:
        """The present evaluation's time, in the objective's sampling equation; ``[B]`` where samples differ."""
        if not self.times:
            raise RuntimeError('no evaluation recorded yet: give the denoiser the clock of its Equation')
        return self.times[-1]

    @property
    def evaluation(self) -> int:
        """The present evaluation's number, from 0."""
        return len(self.times) - 1


class Equation:
    """The sampling equation of a ``protocols.Objective`` for one denoiser, guided or not, and the labels of one batch.

    It has ``transition`` or ``score`` where the objective has. ``clock`` is what the denoiser's guidance looks at.
    """

    def __init__(self, objective: Any, denoiser: Denoiser, labels_B: Tensor, clock: Clock | None = None) -> None:
        self.objective, self.clock = objective, clock or Clock()
        self._denoiser, self._labels_B = denoiser, labels_B  # int64 [B]

    @property
    def drift_at_zero(self) -> bool:
        """Whether ``drift`` may be asked for at time 0; no, of an objective that does not say it."""
        return getattr(self.objective, 'drift_at_zero', False)

    def drift(self, x_BCHW: Tensor, time: Tensor) -> Tensor:
        """``dx/dtime`` at a time, a float64 scalar, or ``[B]`` as ``protocols.Drift`` says; float64."""
        self.clock.begin(time)  # before the network runs: its guidance may depend on the time
        return self.objective.drift(self._denoiser, self._labels_B)(x_BCHW, time)

    def transition(self, x_BCHW: Tensor, time: Tensor, next_time: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of x at ``next_time``, float64, of a ``protocols.ReverseChain``."""
        self.clock.begin(time)  # one network call, as for a drift
        return self.objective.transition(self._denoiser, self._labels_B)(x_BCHW, time, next_time)

    def score(self, x_BCHW: Tensor, drift_BCHW: Tensor, time: Tensor) -> Tensor:
        """The score that belongs to a drift at this place."""
        return self.objective.score(x_BCHW, drift_BCHW, time)  # arithmetic alone: the clock stands still


Sampler = Callable[Concatenate[Equation, Tensor, Tensor, StepNoise, ...], Tensor]
"""``sampler(equation, x_BCHW, times, noise, /, **settings) -> x_BCHW`` at ``times[-1]``, float64.

It walks from ``x_BCHW`` at ``times[0]`` through ``times`` ``[num_steps + 1]``, descending, in the time of the
objective's equation. ``noise(k)`` is fresh noise for the step that begins at ``times[k]``; a sampler that draws nothing
does not ask. Its settings are keyword-only arguments with defaults. To be called under ``torch.no_grad()``.
"""

_Marked = TypeVar('_Marked', bound=Callable[..., Tensor])


def needs(attribute: str, does: str, instead: str) -> Callable[[_Marked], _Marked]:
    """Says of a sampler which attribute of an objective it needs; without it, it fits all.

    ``does`` goes on in the message to a user, "'sde' follows the ...", and ``instead`` is for other objectives.
    """
    return marked(needs=(attribute, does, instead))


def marked(**facts: Any) -> Callable[[_Marked], _Marked]:
    """Says of a sampler what callers look for.

    ``corrects``: it corrects the step to time 0 by the drift there, where the objective has one. ``adaptive``: it
    chooses its steps by their errors, and of ``times`` it takes the ends alone. ``needs``: see there.
    """

    def mark(sampler: _Marked) -> _Marked:
        vars(sampler).update(facts)
        return sampler

    return mark
