"""Draws images from the model in training without leaving a trace in it: the base of callbacks that need samples."""

import contextlib
import inspect
import random
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from composer.core import Callback, Event, State
from composer.loggers import Logger
from composer.utils import create_interval_scheduler, dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tread_composer.core.bounds import Steps
from tread_composer.core.errors import UserError
from tread_composer.core.inference import evaluating, plain_float32
from tread_composer.core.options import check_bounds
from tread_composer.io.progress import Progress, silent, to_stderr
from tread_composer.metrics.drawing import Draws, drawing_facts
from tread_composer.samplers import Evaluations, SamplingSettings, check_sampler, default_guidance

__all__ = ['SamplingCallback', 'Weights', 'bare_model', 'log_file']

Weights = Literal['ema', 'raw']


def bare_model(state: State) -> Any:
    """The ComposerModel itself, out of the wrapper that data-parallel training puts around it."""
    return state.model.module if isinstance(state.model, DistributedDataParallel) else state.model


class SamplingCallback(Callback):
    """Draws samples at an interval and at the end of training, into a folder whose files go to the loggers too.

    Acts on ``Event.BATCH_CHECKPOINT`` or ``Event.EPOCH_CHECKPOINT`` (after the weights were averaged), and on
    ``Event.FIT_END`` unless it has acted on that batch already. The model is in evaluation mode meanwhile, so token
    routing is off.

    Args:
        interval: A Composer time string, e.g. ``'1ep'`` or ``'200ba'``; None for the end alone.
        folder: Where files go. ``{run_name}`` is filled in.
        sampler: Name of a sampler.
        num_steps: Its steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        weights: ``'ema'`` for the averaged weights, ``'raw'`` for those in training.

    Raises:
        UserError: A setting is impossible; or at ``Event.FIT_START`` it does not go with the model, or there are no
            averaged weights.
    """

    owner: ClassVar[str]
    """Name of the callback in a configuration, for messages."""

    def __init__(
        self, interval: str | None, folder: str, sampler: str, num_steps: int, guidance_scale: float, weights: Weights
    ) -> None:
        check_bounds('weights', Weights, weights)
        check_bounds('num_steps', Steps, num_steps)
        self.folder, self.weights = folder, weights
        self.sampler, self.num_steps, self.guidance_scale = sampler, num_steps, guidance_scale
        self._is_due = create_interval_scheduler(interval or '0ba', include_end_of_training=False)  # 0ba is never due
        self._last_batch = -1
        self._evaluations = Evaluations()

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

    def problems(self, config: Any) -> Iterator[tuple[str, str]]:
        """What speaks against it in a run with this ``Config``, before data and model exist: a setting and a text."""
        averages = any(hasattr(part.instance, 'averaged') for part in config.algorithms.values())
        if self.weights == 'ema' and not averages:
            yield 'weights', "'ema', but there is no algorithms.ema to average the weights; add it, or set weights: raw"
        try:
            check_sampler(self.sampler, config.objective.instance)
        except ValueError as error:
            yield 'sampler', str(error)
        most = getattr(config.objective.instance, 'num_timesteps', None)
        if most is not None and self.num_steps > most:
            yield 'num_steps', f'{self.num_steps} steps, but the objective has {most} timesteps; take at most {most}'

    def folder_of(self, state: State) -> Path:
        """The folder of this run."""
        return Path(self.folder.format(run_name=state.run_name))

    def check(self, state: State) -> int:
        """Refuse at the start what would fail at the first picture: draw one in a single step; its side in pixels."""
        if not hasattr(bare_model(state), 'sample'):
            raise UserError(
                f'callbacks.{self.owner}: the model is a {type(bare_model(state)).__name__}, which cannot draw samples '
                '(it has no sample method). Use it with LatentDiffusion, or remove it.'
            )
        if self.weights == 'ema' and _average(state) is None:
            raise UserError(
                f"callbacks.{self.owner}.weights: 'ema' needs averaged weights, but no algorithm of this run keeps "
                'them. Add `ema: {decay: 0.9999}` under algorithms, or set weights: raw.'
            )
        try:
            return self._draw(state, [0], [0], num_steps=1).shape[-1]
        except ValueError as error:
            raise UserError(f'callbacks.{self.owner}: {error}') from None

    @property
    def sampling(self) -> SamplingSettings:
        """How it draws."""
        return SamplingSettings(
            sampler=self.sampler,
            num_steps=self.num_steps,
            guidance=default_guidance(self.guidance_scale),
            guidance_scale=self.guidance_scale,
        )

    def taken(self) -> list[int]:
        """Evaluations of each image of the last call of `images` on this rank, where the sampler decides them."""
        return self._evaluations.taken if self.sampling.is_adaptive else []

    def facts(self, state: State, draws: Draws) -> dict[str, Any]:
        """The part of a ``Protocol`` that says how the images came about."""
        return drawing_facts(bare_model(state), self.sampling, draws, weights=self.weights)

    def images(
        self, state: State, draws: Draws, batches: Sequence[Sequence[int]]
    ) -> Iterator[tuple[Sequence[int], list[int], Tensor]]:
        """Draw batch by batch: numbers, labels and images, float32 ``[B, C, H, W]`` on the CPU, about -1 to 1.

        ``batches`` are numbers of images. Every rank has to draw equally many: a sharded model gathers its weights on
        all of them. The first one prints rate and remaining time.
        """
        label = f'{self.owner} at batch {int(state.timestamp.batch)}'
        log = to_stderr if dist.get_global_rank() == 0 else silent
        progress = Progress(label, sum(map(len, batches)), 'images', log=log)
        self._evaluations.taken = []
        self._evaluations.begun = lambda number: progress.within(number, 'evaluations')
        for indices in batches:
            labels, seeds = draws.of(indices)
            yield indices, labels, self._draw(state, labels, seeds, self.num_steps)
            progress.add(len(indices))  # behind what was done with them: measuring takes time, too

    def _draw(self, state: State, labels: list[int], seeds: list[int], num_steps: int) -> Tensor:
        model = bare_model(state)
        average = _average(state) if self.weights == 'ema' else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(_undisturbed(model, state))
            # Training may round to TF32; images that a number is reported of are drawn as `sample` draws them.
            stack.enter_context(plain_float32('cuda' if state.device.name == 'gpu' else 'cpu'))
            stack.enter_context(average.averaged(state) if average is not None else contextlib.nullcontext())
            # What any model with a method `sample` takes
            settings: dict[str, Any] = {
                'sampler': self.sampler, 'num_steps': num_steps, 'guidance_scale': self.guidance_scale,
            }  # fmt: skip
            if 'evaluations' in inspect.signature(model.sample).parameters:  # a LatentDiffusion
                settings['evaluations'] = self._evaluations
            return model.decode(model.sample(labels, seeds, **settings)).float().cpu()


def log_file(logger: Logger, path: Path, *artifact_folder: str) -> None:
    """Hand a file to every logger that stores files."""
    for destination in logger.destinations:
        if hasattr(destination, 'log_file'):
            destination.log_file(path, *artifact_folder)  # type: ignore[attr-defined]


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
