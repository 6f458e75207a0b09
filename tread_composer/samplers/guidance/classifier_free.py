"""Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the weak branch has no class.

Shapes: B samples, C channels, H x W latent pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tread_composer.routing import Route
from tread_composer.routing.tokens import AlwaysKeep
from tread_composer.samplers.guidance.provider import Branches, SamplingRun, needs_classes

__all__ = ['ClassifierFree']


@dataclass(frozen=True)
class ClassifierFree:
    """The same network, trained with ``label_dropout``, without a class; both branches in one doubled batch."""

    second_network: ClassVar[bool] = False

    def check(self, network: nn.Module, *, num_classes: int, weak: nn.Module | None) -> None:
        """It needs classes."""
        del network, weak
        needs_classes('classifier_free', num_classes)

    def prepare(self, network: nn.Module, *, routes: Sequence[Route], always_keep: AlwaysKeep) -> None:
        """Any network will do."""

    def protocol_facts(self, routes: Sequence[Route]) -> dict[str, Any]:
        """The settings say all."""
        return {}

    def branches(self, run: SamplingRun) -> Branches:
        """See ``GuidanceProvider``."""

        def branches_at(x_BCHW: Tensor, t_B: Tensor, labels_B: Tensor) -> tuple[Tensor, Tensor]:
            labels = torch.cat([labels_B, torch.full_like(labels_B, run.null_label)])
            predictions = run.denoiser(torch.cat([x_BCHW, x_BCHW]), torch.cat([t_B, t_B]), labels)
            conditional, unconditional = predictions.chunk(2)
            return conditional, unconditional

        return branches_at
