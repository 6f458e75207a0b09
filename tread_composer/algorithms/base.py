"""What our algorithms share: a handler for each event, and settings that bind a checkpoint."""

import inspect
from typing import Any, ClassVar

from composer.core import Algorithm, Event, State
from composer.loggers import Logger

from tread_composer.algorithms.rules import limits, refuse_conflicts
from tread_composer.core.errors import ResumeError

__all__ = ['AlgorithmBase']

_REMEDY = 'start a new run from the weights alone (load_weights_only: true)'


class AlgorithmBase(Algorithm):
    """Base of our algorithms. A subclass has a method ``_on_<event>`` for each event on which it does something.

    What they draw is keyed and times are the run's, so that most have nothing to save but their settings. A checkpoint
    that is resumed without its algorithm is refused by ``ResumeContract`` alone: nothing of ours is there then.
    """

    joins_later: ClassVar[bool] = False
    """Whether a checkpoint that was trained without it may go on with it."""

    _begun = _resumed = False

    def arguments(self) -> dict[str, Any]:
        """The arguments that make an equal one."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def settings(self) -> dict[str, Any]:
        """What a checkpoint is bound to, as plain types: it then loads without pickled classes."""
        return self.arguments()

    def __repr__(self) -> str:
        arguments = ', '.join(f'{name}={value!r}' for name, value in self.arguments().items())
        return f'{type(self).__name__}({arguments})'

    def match(self, event: Event, state: State) -> bool:
        """Whether ``apply`` has something to do at this event."""
        return hasattr(self, f'_on_{event.value}')

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Do what is due at ``event``."""
        if event != Event.INIT and not self._begun:
            name = type(self).__name__
            raise RuntimeError(f'{name}: it must be in the algorithm list of the Trainer from the start (Event.INIT)')
        getattr(self, f'_on_{event.value}')(state, logger)

    def _on_init(self, state: State, logger: Logger) -> None:
        refuse_conflicts(self, state)
        self._begun = True

    def _on_after_load(self, state: State, logger: Logger) -> None:
        """A checkpoint that was trained without this algorithm, or with one that cannot be resumed, must not go on."""
        name = type(self).__name__
        if not int(state.timestamp.batch):
            return
        for algorithm in state.algorithms:
            if (reason := limits(algorithm).get('resume')) is not None:
                title = type(algorithm).__name__
                raise ResumeError(f'{title}: a run with it cannot be resumed: {reason}. To go on, {_REMEDY}')
        if not self._resumed and not self.joins_later:
            raise ResumeError(
                f'{name}: the checkpoint was trained without {name} up to {state.timestamp.batch}, and this run has '
                f'{self!r}. Take {name} out, or {_REMEDY}.'
            )

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {**super().state_dict(), 'settings': self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the checkpoint's settings with ours; ``ResumeError`` if they differ."""
        self._resumed = True
        if state.get('settings') != self.settings():
            remedy = f'Resume with the saved settings, or {_REMEDY}.'
            source = f'{type(self).__name__}: the checkpoint'
            raise ResumeError.from_differences(source, state.get('settings'), self.settings(), remedy)
