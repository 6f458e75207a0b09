"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): the weak branch is a weaker network.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from tread_composer.routing import Route
from tread_composer.routing.tokens import AlwaysKeep
from tread_composer.samplers.guidance.provider import (
    Branches,
    SamplingRun,
    WeakLabel,
    check_choice,
    needs_classes,
    without_label,
)

__all__ = ['Autoguidance']


@dataclass(frozen=True)
class Autoguidance:
    """A second network of the same objective, for the same latents: an early checkpoint, a smaller model.

    Args:
        weak_label: ``'null'`` takes the class away from the weak branch, too.

    Raises:
        ValueError: No such choice.
    """

    second_network: ClassVar[bool] = True

    weak_label: WeakLabel = 'same'

    def __post_init__(self) -> None:
        """Check the settings."""
        check_choice('weak_label', self.weak_label, WeakLabel)

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """It needs the second network, and classes with ``weak_label`` ``'null'``."""
        del network
        if self.weak_label == 'null':
            needs_classes('auto', num_classes)
        if weak is None:
            raise ValueError(
                "guidance: 'auto' needs a second, weaker network, such as an early checkpoint of the same run"
            )

    def prepare(self, network: nn.Module, *, routes: Sequence[Route], always_keep: AlwaysKeep) -> None:
        """Any network will do."""

    def protocol_facts(self, routes: Sequence[Route]) -> dict[str, Any]:
        """The settings say all; which network it is, the protocol says under ``weak``."""
        return {}

    def branches(self, run: SamplingRun) -> Branches:
        """See ``GuidanceProvider``."""
        weak = without_label(run.weak, run.null_label) if self.weak_label == 'null' else run.weak

        def branches_at(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            return run.denoiser(x_BCHW, t_B, labels_B), weak(x_BCHW, t_B, labels_B)

        return branches_at
