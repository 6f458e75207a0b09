"""Refuses to continue a checkpoint under other settings than those it was trained with."""

from typing import Any

from composer.core import Callback

from tread_composer.core.errors import ResumeError

__all__ = ['ResumeContract']


class ResumeContract(Callback):
    """Writes the settings that decide training, a tree of plain values, into every checkpoint; compares on resuming.

    Composer itself loads a checkpoint without ``Tread``, with another route or another learning rate without a word
    (the optimizer's saved learning rate then wins). Loading weights alone (``load_weights_only``) compares nothing.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def state_dict(self) -> dict[str, Any]:
        """The settings."""
        return {'settings': self.settings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with those of a checkpoint; the ``ResumeError`` lists each difference."""
        if state['settings'] != self.settings:
            raise ResumeError.from_differences(
                'the checkpoint',
                state['settings'],
                self.settings,
                'Resume with the saved settings, or start a new run (another run_name) from the weights alone: '
                'load_path=<checkpoint> load_weights_only=true.',
            )
