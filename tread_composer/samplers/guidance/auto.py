"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): the weak branch is a weaker network.

Shapes: B samples, C channels, H x W latent pixels.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tread_composer.core.options import Checked
from tread_composer.samplers.guidance.provider import (
    Branches,
    GuidanceProvider,
    SamplingRun,
    Unlabelled,
    WeakLabel,
    needs_classes,
)

__all__ = ['Autoguidance']


@dataclass(frozen=True)
class Autoguidance(Checked, GuidanceProvider):
    """A second network of the same objective, for the same latents: an early checkpoint, a smaller model.

    Args:
        weak_label: ``'null'`` takes the class away from the weak branch, too.
    """

    second_network: ClassVar[bool] = True

    weak_label: WeakLabel = 'same'

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """It needs the second network, and classes with ``weak_label`` ``'null'``."""
        if self.weak_label == 'null':
            needs_classes('auto', num_classes)
        if weak is None:
            raise ValueError(
                "guidance: 'auto' needs a second, weaker network, such as an early checkpoint of the same run"
            )

    def branches(self, run: SamplingRun) -> Branches:
        """See ``GuidanceProvider``."""
        weak = Unlabelled(run.weak, run.null_label) if self.weak_label == 'null' else run.weak

        def branches_at(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            # Two calls: the networks may differ in size, so they cannot share a batch.
            return run.denoiser(x_BCHW, t_B, labels_B), weak(x_BCHW, t_B, labels_B)

        return branches_at
