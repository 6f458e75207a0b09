"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the weak branch has no class.

Shapes: B samples, C channels, H x W latent pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tread_composer.samplers.guidance.provider import Branches, GuidanceProvider, SamplingRun, needs_classes

__all__ = ['ClassifierFree']


@dataclass(frozen=True)
class ClassifierFree(GuidanceProvider):
    """The same network, trained with ``label_dropout``, without a class; both branches in one doubled batch."""

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """It needs classes."""
        needs_classes('classifier_free', num_classes)

    def branches(self, run: SamplingRun) -> Branches:
        """See ``GuidanceProvider``."""

        def branches_at(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            labels = torch.cat([labels_B, torch.full_like(labels_B, run.null_label)])
            # [2B, O, H, W]: B with their class, then the same B without.
            predictions = run.denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), labels)
            conditional, unconditional = predictions.chunk(2)
            return conditional, unconditional

        return branches_at
