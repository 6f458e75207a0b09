"""Drawing a set of images, on any number of ranks, interrupted at any moment.

The first rank decides and holds the lock; rank r draws every world-th part that is not there yet, or workers of Ray
draw them all; the first rank joins them. Nothing but finished parts is remembered in between.
Shapes: B images drawn together, H x W pixels, C channels.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tread_composer import __version__
from tread_composer.autoencoders import Pretrained
from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.core.inference import plain_float32
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words
from tread_composer.io.progress import Progress, RankProgress, silent
from tread_composer.io.ranks import Ranks, check_equal
from tread_composer.io.ray_pool import check_ray, on_ray
from tread_composer.metrics.drawing import drawing_facts
from tread_composer.sample.folder import PART_SIZE, PLACES, RECORD, WRITERS, SamplesFolder, write_grid, write_pngs
from tread_composer.sample.request import SamplesRequest, draws_of
from tread_composer.samplers import Evaluations, guidance_cost
from tread_composer.weights.trained import Trained, load_trained

__all__ = ['generate']

Log = Callable[[str], None]

_MACHINE = contextlib.ExitStack()  # of a worker of Ray; held here, as long as the process lives


def generate(request: SamplesRequest, *, log: Log = print, trained: Trained | None = None) -> None:
    """Draw the images, or go on with what an earlier call began. Under the ``composer`` launcher all ranks call this.

    The first rank logs; of a ``trained`` model that is loaded already, only the progress.

    Raises:
        UserError: The input is at fault. What is finished stays.
    """
    ranks = Ranks.start()
    if not ranks.is_first:
        log = silent
    with contextlib.ExitStack() as stack:
        if request.engine == 'ray':
            check_ray()
        name = 'cpu' if request.engine == 'ray' else request.device  # this process then only plans
        device = ranks.agreed(lambda: choose_device(name, ranks.local_rank))
        stack.enter_context(machine_for(device, 0, ranks.local_world))
        stack.enter_context(plain_float32(device))
        # The first rank has fetched what a hub id names before the others look for it.
        loaded = ranks.agreed(lambda: _Job(request, device, log, trained) if ranks.is_first else None)
        job = ranks.agreed(lambda: loaded or _Job(request, device, log, trained))
        check_equal(job.made_with)
        undone = ranks.from_first(ranks.agreed(lambda: job.begin(stack) if ranks.is_first else None))
        if undone is None:
            log(f'{request.out}: finished already, nothing to do')
            return
        if request.engine == 'ray':
            job.draw_on_ray(undone)
        else:
            ranks.check_shared(request.out, 'folder of the images')
            job.draw(undone, ranks)
        if ranks.is_first:
            with full_disk_in_words(request.out):
                job.finish()


def _ray_drawer(
    request: SamplesRequest, made_with: dict[str, Any], workers_here: int
) -> Callable[[Sequence[int]], None]:
    """Set up a worker of Ray and load the networks; what draws parts there. The work was planned for ``made_with``."""
    device = choose_device(request.device, 0)
    _MACHINE.enter_context(machine_for(device, 0, workers_here))
    _MACHINE.enter_context(plain_float32(device))
    job = _Job(request, device, silent, None)
    if job.made_with != made_with:
        remedy = 'Give all machines the same files.'
        raise ResumeError.from_differences('a worker of Ray', made_with, job.made_with, remedy)
    return job.draw_parts


class _Job:
    """The networks of a request, loaded and checked, and the folder that they fill."""

    def __init__(self, request: SamplesRequest, device: torch.device, log: Log, trained: Trained | None) -> None:
        self.request, self.log, self.about = request, log, silent if trained else log
        self.evaluations = Evaluations()  # of the images drawn last
        self.trained = trained or load_trained(
            request.path, weights=request.weights, device=device, overrides=request.overrides
        )
        weak = None
        if request.weak is not None:
            attention = {key: value for key, value in request.overrides.items() if key == 'model.attention'}
            weak = load_trained(request.weak, weights=request.weak_weights, device=device, overrides=attention)
            _check_pair(self.trained, weak)
            weak.prepare_for(request.sampling)
        self.trained.prepare_for(request.sampling)
        self.weak = None if weak is None else weak.model.denoiser
        model = self.model = self.trained.model
        facts = {'latent_shape': model.latent_shape, 'null_label': model.null_label, 'weak': self.weak}
        try:
            self.cost = guidance_cost(model.denoiser, model.objective, request.sampling, **facts)
        except ValueError as error:
            raise UserError(str(error)) from None
        if isinstance(model.autoencoder, Pretrained):
            _ = model.autoencoder.network  # loaded now, so that one that is missing or another one is refused at once
        elif request.decode_dtype != 'float32':
            raise UserError(f'--decode-dtype {request.decode_dtype}: this model has pixels, there is nothing to decode')
        self.draws = draws_of(request, model.num_classes)
        self.folder = SamplesFolder(request.out, len(self.draws.labels))
        drawn = drawing_facts(
            model,
            request.sampling,
            self.draws,
            weights=self.trained.weights,
            decode_dtype=request.decode_dtype,
            routes=self.trained.config.routes(),
            weak=None if weak is None else (weak.weights, weak.digest),
        )
        # What decides the images and their files. A protocol of evaluation has the same names.
        self.made_with = {
            **drawn,
            'weights_digest': self.trained.digest,
            'num_samples': self.folder.count,
            'labels_digest': self.draws.digest,
            'formats': sorted(set(request.formats)),
        }

    def begin(self, stack: contextlib.ExitStack) -> list[int] | None:
        """Take the folder; the parts that are to be drawn, or None where all is finished."""
        trained, cost, count, log = self.trained, self.cost, self.folder.count, self.about
        with full_disk_in_words(self.request.out):
            stack.enter_context(self.folder)
            about = {
                'source': trained.source,
                'run': trained.config.run_name,
                'batch': trained.batch or None,
                'class_names': list(trained.data.class_names),
                'gmacs_per_image': None if cost.evaluations is None else cost.gmacs,
                'evaluations': cost.evaluations,
                'guided_evaluations': cost.guided,
                'tread_composer': __version__,
            }
            if self.folder.begin(self.made_with, about):
                return None
            RankProgress.clear(self.folder.scratch)
        age = f'after {trained.batch:,} batches' if trained.batch else 'after a number of batches that nobody has said'
        log(f'{trained.source}: {trained.weights} weights {age}{trained.immaturity}')
        if 'model.attention' in self.request.overrides:
            log(trained.attention)
        if self.draws.rule == 'in turn':
            log(
                f'{count:,} images are no multiple of the {self.model.num_classes} classes: the first classes '
                'have one more, and the protocol calls the labels "in turn", not "balanced"'
            )
        sampling, undone = self.request.sampling, self.folder.undone()
        needs = f'{cost.evaluations} evaluations, {cost.guided} of them guided, {cost.gmacs:.4g} GMACs per image'
        if cost.evaluations is None:
            needs = f'as many evaluations of {cost.gmacs:.4g} GMACs as each image needs'
        log(f'{sampling.in_words.replace(" ", ", ", 1)}, guidance {sampling.guidance}: {needs}')
        num_undone = len(self.folder.indices(undone))
        if num_undone < count:
            self.log(f'going on: {count - num_undone:,} of {count:,} images are there')
        return undone

    def draw(self, undone: Sequence[int], ranks: Ranks) -> None:
        """Draw and keep these parts; every rank takes its share, and waits for the others."""
        folder, num_undone = self.folder, len(self.folder.indices(undone))
        progress = RankProgress(
            folder.scratch, ranks.rank, total=folder.count, done_before=folder.count - num_undone, log=self.log
        )
        try:
            for chunk in self._chunks(undone[ranks.rank :: ranks.world]):  # interleaved: all work on the beginning
                self.draw_parts(chunk, lambda number: progress.within(number, 'evaluations'))
                progress.add(len(folder.indices(chunk)))
                progress.tick()  # prints, and learns whether another rank has failed
        except UserError as error:
            progress.tell_failure(str(error))
            raise
        ranks.wait_for_all(progress.tick)
        self.about(f'{"rank 0 drew " if ranks.world > 1 else ""}{progress.summary()}')

    def draw_on_ray(self, undone: Sequence[int]) -> None:
        """Workers of Ray draw and keep these parts."""
        folder, request, num_undone = self.folder, self.request, len(self.folder.indices(undone))
        progress = Progress('', unit='images', total=folder.count, done_before=folder.count - num_undone, log=self.log)
        on_ray(
            self._chunks(undone),
            functools.partial(_ray_drawer, request, self.made_with),
            lambda chunk, _: progress.add(len(folder.indices(chunk))),
            scratch=folder.scratch,
            workers=request.ray_workers,
            device=request.device,
            log=self.log,
        )
        self.about(progress.summary())

    def draw_parts(self, chunk: Sequence[int], begun: Callable[[int], None] = lambda number: None) -> None:
        """Draw a few parts together, and keep each. ``begun`` is called with the number of every evaluation."""
        folder, request = self.folder, self.request
        images_BHWC = self._images(begun, *self.draws.of(folder.indices(chunk)))
        # The last part may be shorter
        pieces = np.split(images_BHWC, range(PART_SIZE, len(images_BHWC), PART_SIZE))
        taken = self.evaluations.taken if self.cost.evaluations is None else []
        with full_disk_in_words(request.out):
            for place, (part, part_BHWC) in enumerate(zip(chunk, pieces, strict=True)):
                if 'png' in request.formats:
                    write_pngs(folder, part, part_BHWC, self.draws)
                folder.write_part(part, part_BHWC, taken[place * PART_SIZE : (place + 1) * PART_SIZE])

    def _chunks(self, parts: Sequence[int]) -> list[tuple[int, ...]]:
        """Parts that fill a batch together."""
        together = max(1, self.request.batch_size // PART_SIZE)
        return [tuple(parts[start : start + together]) for start in range(0, len(parts), together)]

    def _images(self, begun: Callable[[int], None], labels: list[int], seeds: list[int]) -> np.ndarray:
        """One image for each label and seed, uint8 ``[B, H, W, C]``."""
        self.evaluations = Evaluations(begun)
        request, batch_size = self.request, self.request.batch_size
        try:
            latents = self.model.draw(
                labels, seeds, request.sampling, weak=self.weak, batch_size=batch_size, evaluations=self.evaluations
            )
            dtype = getattr(torch, request.decode_dtype)
            pixels = torch.cat([self.model.decode(chunk, dtype).cpu() for chunk in latents.split(batch_size)])
        except torch.OutOfMemoryError as error:
            raise UserError(
                f'the GPU has too little memory for --batch-size {batch_size}; lower it and run the same command again '
                '(what is finished stays)'
            ) from error
        broken = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:
            raise UserError(
                f'{len(broken)} images are not finite, the first is that of seed {seeds[broken[0]]}: the model or the '
                'sampler has diverged; take an earlier checkpoint or a lower guidance scale'
            )
        return to_uint8(pixels).permute(0, 2, 3, 1).contiguous().numpy()

    def finish(self) -> None:
        """Join the parts to the files that are asked for."""
        trained, sampling, formats = self.trained, self.request.sampling, self.request.formats
        written = [WRITERS[name](self.folder, self.draws).name for name in formats if name in WRITERS]
        title = f'{trained.config.run_name}, batch {trained.batch or "unknown"}, {trained.weights} weights, '
        title += f'{sampling.in_words}, guidance '
        title += f'{sampling.guidance} {sampling.guidance_scale:g}'
        written += [write_grid(self.folder, self.draws, trained.data.class_names, title).name, RECORD]
        written += [f'{PLACES["png"]}/'] if 'png' in formats else []
        cost = self.cost
        mean = self.folder.mean_taken() if cost.evaluations is None else None  # known before, of all others
        self.folder.finish({} if mean is None else {'evaluations': mean, 'gmacs_per_image': mean * cost.gmacs})
        if mean is not None:
            self.about(f'{mean:.1f} evaluations and {mean * cost.gmacs:.4g} GMACs per image, on average')
        self.about(f'{self.folder.count:,} images in {self.folder.path}: {", ".join(written)}')


def _check_pair(trained: Trained, weak: Trained) -> None:
    """What is predicted must be the same thing, in the same units, or the difference of predictions means nothing."""
    facts = [
        {
            'objective': network.model.objective.name,
            **network.model.objective.target(),
            'latent_shape': tuple(network.model.latent_shape),
            'num_classes': network.model.num_classes,
            'latent_scale': network.model.latent_scale.flatten().tolist(),
            'latent_shift': network.model.latent_shift.flatten().tolist(),
        }
        for network in (trained, weak)
    ]
    different = [key for key in {**facts[0], **facts[1]} if facts[0].get(key) != facts[1].get(key)]
    if different:
        text = '\n'.join(f'  {key}: {facts[0].get(key)!r} and {facts[1].get(key)!r}' for key in different)
        raise UserError(f'--weak {weak.source}: does not predict what {trained.source} predicts:\n{text}')
