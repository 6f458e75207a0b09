"""Algorithms whose settings bind a checkpoint: saved in it, and a run that resumes it with others is refused."""

from abc import abstractmethod
from typing import Any

from composer.core import Algorithm, State

from tread_composer.algorithms.rules import refuse_resume
from tread_composer.core.errors import ResumeError

__all__ = ['BoundAlgorithm']


class BoundAlgorithm(Algorithm):
    """Base of algorithms that have nothing to save but their settings: what they draw is keyed, times are the run's.

    A subclass gives ``settings()`` and calls ``refuse_foreign_checkpoint`` on ``Event.AFTER_LOAD``.

    The other way round, a checkpoint of a run with it resumed without it, nothing of ours is there to refuse, and
    Composer says nothing. A run from a YAML file is refused by ``ResumeContract``, which a Trainer written by hand may
    have among its callbacks too.
    """

    _resumed = False

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What decides how the model is trained, as plain types: a checkpoint then loads without pickled classes."""

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {**super().state_dict(), 'settings': self.settings()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare the checkpoint's settings with ours.

        Raises:
            ResumeError: They differ.
        """
        saved = state.get('settings')
        self._resumed = True
        if saved != self.settings():
            raise ResumeError.from_differences(
                f'{type(self).__name__}: the checkpoint',
                saved,
                self.settings(),
                'Resume with the saved settings, or start a new run from the weights alone (load_weights_only: true).',
            )

    def refuse_foreign_checkpoint(self, state: State) -> None:
        """For ``Event.AFTER_LOAD``: a checkpoint that was trained without this algorithm must not go on with it.

        Raises:
            ResumeError: Training was resumed from such a checkpoint, or with an algorithm that cannot be resumed.
        """
        refuse_resume(state)
        name = type(self).__name__
        if int(state.timestamp.batch) > 0 and not self._resumed:
            raise ResumeError(
                f'{name}: the checkpoint was trained without {name} up to {state.timestamp.batch}, and this run has '
                f'{self!r}. Take {name} out, or start a new run from the weights alone (load_weights_only: true).'
            )
