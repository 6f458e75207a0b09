"""Draws images from the model in training without leaving a trace in it: shared by the callbacks that need samples."""

import contextlib
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tread_composer.core.errors import UserError
from tread_composer.core.evaluating import evaluating
from tread_composer.core.precision import plain_float32
from tread_composer.metrics.drawing import drawing_facts
from tread_composer.samplers import SamplingSettings, default_guidance

__all__ = ['AtInterval', 'Sampling', 'bare_model', 'log_file']

Weights = Literal['ema', 'raw']


def bare_model(state: State) -> Any:
    """The ComposerModel itself, out of the wrapper that data-parallel training puts around it."""
    return state.model.module if isinstance(state.model, DistributedDataParallel) else state.model


class AtInterval(Callback):
    """Acts at an interval and at the end of training, into a folder whose files go to the loggers too.

    Runs on ``Event.BATCH_CHECKPOINT`` or ``Event.EPOCH_CHECKPOINT`` (after the weights were averaged), and on
    ``Event.FIT_END`` unless it has acted on that batch already.

    Args:
        interval: A Composer time string; None for the end alone.
        folder: Where files go. ``{run_name}`` is filled in.
    """

    def __init__(self, interval: str | None, folder: str) -> None:
        self.folder = folder
        self._is_due = create_interval_scheduler(interval or '0ba', include_end_of_training=False)
        self._last_batch = -1

    @abstractmethod
    def act(self, state: State, logger: Logger) -> None:
        """Do the work that is due; called on all ranks."""

    def run_event(self, event: Event, state: State, logger: Logger) -> None:
        """Act when the interval says so, and at the end."""
        super().run_event(event, state, logger)
        batch = int(state.timestamp.batch)
        at_end = event == Event.FIT_END and self._last_batch != batch
        if at_end or (event in (Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT) and self._is_due(state, event)):
            self._last_batch = batch
            self.act(state, logger)

    def folder_of(self, state: State) -> Path:
        """The folder of this run."""
        return Path(self.folder.format(run_name=state.run_name))


def log_file(logger: Logger, path: Path, *artifact_folder: str) -> None:
    """Hand a file to every logger that stores files."""
    for destination in logger.destinations:
        if hasattr(destination, 'log_file'):
            destination.log_file(path, *artifact_folder)  # type: ignore[attr-defined]


class Sampling:
    """How samples are made during training.

    The model is in evaluation mode, so token routing is off. Every rank has to call `images` (a sharded model
    gathers its weights on all ranks), and every rank gets the same images.

    Args:
        sampler: Name of a sampler.
        num_steps: Its steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        weights: ``'ema'`` for the averaged weights, ``'raw'`` for those in training.

    Raises:
        UserError: ``weights`` is neither, or ``num_steps`` is below 1.
    """

    def __init__(self, sampler: str, num_steps: int, guidance_scale: float, weights: Weights) -> None:
        if weights not in get_args(Weights):
            raise UserError(f"weights: {weights!r} is neither 'ema' nor 'raw'")
        if num_steps < 1:
            raise UserError(f'num_steps: {num_steps} must be at least 1')
        self.sampler, self.num_steps, self.guidance_scale, self.weights = sampler, num_steps, guidance_scale, weights

    def facts(self, state: State, *, labels: str, seed: int) -> dict[str, Any]:
        """The part of a ``Protocol`` that says how the images came about.

        Args:
            state: Of the run.
            labels: How the classes were chosen.
            seed: Image i has the seed ``seed + i``.
        """
        settings = SamplingSettings(
            sampler=self.sampler,
            num_steps=self.num_steps,
            guidance=default_guidance(self.guidance_scale),
            guidance_scale=self.guidance_scale,
        )
        return drawing_facts(bare_model(state), settings, weights=self.weights, labels=labels, seed=seed)

    def check(self, state: State, owner: str) -> None:
        """Refuse at the start what would fail at the first picture, by drawing one in a single step.

        Raises:
            UserError: The model cannot sample or decode like this, or there are no averaged weights to sample with.
        """
        if not hasattr(bare_model(state), 'sample'):
            raise UserError(
                f'callbacks.{owner}: the model is a {type(bare_model(state)).__name__}, which cannot draw samples '
                '(it has no sample method). Use it with LatentDiffusion, or remove it.'
            )
        if self.weights == 'ema' and _average(state) is None:
            raise UserError(
                f"callbacks.{owner}.weights: 'ema' needs averaged weights, but no algorithm of this run keeps them. "
                'Add `ema: {decay: 0.9999}` under algorithms, or set weights: raw.'
            )
        try:
            self.images(state, [0], [0], num_steps=1)
        except ValueError as error:
            raise UserError(f'callbacks.{owner}: {error}') from None

    def images(self, state: State, labels: Sequence[int], seeds: Sequence[int], num_steps: int | None = None) -> Tensor:
        """Pixels, float32 ``[N, C, H, W]`` on the CPU, about -1 to 1: one image for each label and seed."""
        model = bare_model(state)
        average = _average(state) if self.weights == 'ema' else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_undisturbed(model, state))
            # Training may round to TF32; images that a number is reported of are drawn as `sample` draws them.
            stack.enter_context(plain_float32('cuda' if state.device.name == 'gpu' else 'cpu'))
            stack.enter_context(average.averaged(state) if average is not None else contextlib.nullcontext())
            latents = model.sample(
                list(labels),
                list(seeds),
                sampler=self.sampler,
                num_steps=num_steps or self.num_steps,
                guidance_scale=self.guidance_scale,
            )
            return model.decode(latents).float().cpu()


def _average(state: State) -> Any:
    return next((algorithm for algorithm in state.algorithms if hasattr(algorithm, 'averaged')), None)


@contextlib.contextmanager
def _undisturbed(model: nn.Module, state: State) -> Iterator[None]:
    """Evaluation mode, no gradients, and the global random streams as they were afterwards."""
    streams = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if state.device.name == 'gpu' else []
    try:
        with evaluating(model), torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        random.setstate(streams[0])
        np.random.set_state(streams[1])
