"""Drawing a set of images, on any number of ranks, interrupted at any moment.

The first rank decides and holds the lock; each rank draws every so-manieth part that is not there yet; the first rank
joins them. Nothing but finished parts is remembered in between.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tread_composer import __version__
from tread_composer.autoencoders import KL
from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.core.errors import UserError
from tread_composer.core.precision import plain_float32
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words
from tread_composer.io.progress import RankProgress
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.drawing import drawing_facts
from tread_composer.sample.folder import PART_SIZE, SamplesFolder
from tread_composer.sample.outputs import write_grid, write_mds, write_npz, write_pngs
from tread_composer.sample.request import Draws, SamplesRequest, draws_of
from tread_composer.samplers import SamplingCost, guidance_cost
from tread_composer.weights.trained import Trained, load_trained

__all__ = ['generate']

Log = Callable[[str], None]


@dataclass(frozen=True)
class _Networks:
    """What draws.

    Args:
        trained: The model.
        weak: The second one, if there is one.
        draws: Labels and seeds.
        cost: Of an image.
    """

    trained: Trained
    weak: Trained | None
    draws: Draws
    cost: SamplingCost


def generate(request: SamplesRequest, *, log: Log = print) -> None:
    """Draw the images, or go on with what an earlier call began.

    Under the ``composer`` launcher all ranks call this.

    Args:
        request: What and how.
        log: Gets the lines for people, on the first rank.

    Raises:
        UserError: The input is at fault. What is finished stays.
    """
    ranks = Ranks.start()
    if not ranks.is_first:
        log = _silent
    with contextlib.ExitStack() as stack:
        device = ranks.agreed(lambda: choose_device(request.device, ranks.local_rank))
        stack.enter_context(machine_for(device, 0, ranks.local_world))
        stack.enter_context(plain_float32(device))
        # The first rank has fetched what a hub id names before the others look for it.
        fetched = ranks.agreed(lambda: _networks(request, device) if ranks.is_first else None)
        networks = ranks.agreed(lambda: fetched or _networks(request, device))
        made_with = ranks.agreed(lambda: _made_with(request, networks))
        ranks.agreed(lambda: _same(ranks.from_first(made_with), made_with))
        folder = SamplesFolder(request.out)
        undone = ranks.from_first(
            ranks.agreed(lambda: _begin(folder, stack, made_with, networks, request, log) if ranks.is_first else None)
        )
        if undone is None:
            log(f'{request.out}: finished already, nothing to do')
            return
        ranks.check_shared(folder.path, '--out')
        _draw_parts(folder, undone, request, networks, ranks, log)
        if ranks.is_first:
            with full_disk_in_words(request.out):
                _write_outputs(folder, request, networks, log)


def _silent(line: str) -> None:
    del line


def _networks(request: SamplesRequest, device: torch.device) -> _Networks:
    trained = load_trained(request.path, weights=request.weights, device=device, overrides=request.overrides)
    weak = None
    if request.weak is not None:
        weak = load_trained(
            request.weak,
            weights=request.weak_weights,
            device=device,
            overrides={key: value for key, value in request.overrides.items() if key == 'model.attention'},
        )
        _check_pair(trained, weak)
    for network in (trained, weak):
        if network is not None:
            network.prepare_for(request.sampling)
    model = trained.model
    try:
        cost = guidance_cost(
            model.denoiser,
            model.objective,
            request.sampling,
            latent_shape=model.latent_shape,
            null_label=model.null_label,
            weak=None if weak is None else weak.model.denoiser,
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    if isinstance(model.autoencoder, KL):
        _ = model.autoencoder.network  # loaded now, so that one that is missing or another one is refused at once
    elif request.decode_dtype != 'float32':
        raise UserError(f'--decode-dtype {request.decode_dtype}: this model has pixels, there is nothing to decode')
    return _Networks(trained, weak, draws_of(request, model.num_classes), cost)


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
        lines = [f'  {key}: {facts[0].get(key)!r} and {facts[1].get(key)!r}' for key in different]
        text = '\n'.join(lines)
        raise UserError(f'--weak {weak.source}: does not predict what {trained.source} predicts:\n{text}')


def _made_with(request: SamplesRequest, networks: _Networks) -> dict[str, Any]:
    """What decides the images and their files. A protocol of evaluation has the same names."""
    trained, weak, draws = networks.trained, networks.weak, networks.draws
    facts = drawing_facts(
        trained.model,
        request.sampling,
        weights=trained.weights,
        labels=draws.rule,
        seed=draws.first_seed,
        decode_dtype=request.decode_dtype,
        routes=trained.routes,
        weak=None if weak is None else (weak.weights, weak.digest),
    )
    return {
        **facts,
        'weights_digest': trained.digest,
        'num_samples': len(draws.labels),
        'labels_digest': draws.digest,
        'formats': sorted(set(request.formats)),
    }


def _same(facts_of_rank_0: dict[str, Any], facts: dict[str, Any]) -> None:
    if facts_of_rank_0 != facts:
        raise UserError('this rank has found other weights or labels than rank 0; give all nodes the same files')


def _begin(
    folder: SamplesFolder,
    stack: contextlib.ExitStack,
    made_with: dict[str, Any],
    networks: _Networks,
    request: SamplesRequest,
    log: Log,
) -> list[int] | None:
    """Take the folder; the parts that are to be drawn, or None where all is finished."""
    trained, cost, count = networks.trained, networks.cost, len(networks.draws.labels)
    with full_disk_in_words(request.out):
        stack.enter_context(folder)
        about = {
            'source': trained.source,
            'run': trained.config.run_name,
            'batch': trained.batch or None,
            'class_names': list(trained.class_names),
            'gmacs_per_image': cost.gmacs,
            'evaluations': cost.evaluations,
            'guided_evaluations': cost.guided,
            'tread_composer': __version__,
        }
        if folder.begin(made_with, about):
            return None
        RankProgress.clear(folder.scratch)
    undone = folder.undone(count)
    sampling = request.sampling
    log(f'{trained.source}: {trained.weights} weights {_age(trained)}')
    if 'model.attention' in request.overrides:
        log(trained.attention)
    if networks.draws.rule == 'in turn':
        log(f'{count:,} images are no multiple of the {trained.model.num_classes} classes: the first classes have one '
            'more, and the protocol calls the labels "in turn", not "balanced"')  # fmt: skip
    log(
        f'{sampling.sampler}, {sampling.num_steps} steps, guidance {sampling.guidance}: '
        f'{cost.evaluations} evaluations, {cost.guided} of them guided, {cost.gmacs:.4g} GMACs per image'
    )
    if len(undone) * PART_SIZE < count:
        log(f'going on: {_done(undone, count):,} of {count:,} images are there')
    return undone


def _age(trained: Trained) -> str:
    return f'after {trained.batch:,} batches' if trained.batch else 'after a number of batches that nobody has said'


def _done(undone: Sequence[int], count: int) -> int:
    return count - sum(len(_indices(part, count)) for part in undone)


def _indices(part: int, count: int) -> range:
    return range(part * PART_SIZE, min((part + 1) * PART_SIZE, count))


def _draw_parts(
    folder: SamplesFolder,
    undone: Sequence[int],
    request: SamplesRequest,
    networks: _Networks,
    ranks: Ranks,
    log: Log,
) -> None:
    count = len(networks.draws.labels)
    progress = RankProgress(
        folder.scratch, ranks.rank, total=count, done_before=_done(undone, count), log=log
    )  # fmt: skip
    own_parts, together = undone[ranks.rank :: ranks.world], max(1, request.batch_size // PART_SIZE)
    try:
        for start in range(0, len(own_parts), together):
            parts = own_parts[start : start + together]
            images = _images(parts, request, networks)
            with full_disk_in_words(request.out):
                for part in parts:
                    images_BHWC, images = np.split(images, [len(_indices(part, count))])
                    if 'png' in request.formats:
                        write_pngs(folder, part, images_BHWC, networks.draws)
                    folder.write_part(part, images_BHWC)
                    progress.add(len(images_BHWC))
                    progress.tick()
    except UserError as error:
        progress.tell_failure(str(error))
        raise
    ranks.wait_for_all(progress.tick)
    log(f'{"rank 0 drew " if ranks.world > 1 else ""}{progress.summary()}')


def _images(parts: Sequence[int], request: SamplesRequest, networks: _Networks) -> np.ndarray:
    """The images of these parts, one after the other, uint8 ``[B, H, W, C]``."""
    model, draws = networks.trained.model, networks.draws
    weak = None if networks.weak is None else networks.weak.model.denoiser
    indices = [index for part in parts for index in _indices(part, len(draws.labels))]
    try:
        latents = model.draw(
            [draws.labels[index] for index in indices],
            [draws.seed(index) for index in indices],
            request.sampling,
            weak=weak,
            batch_size=request.batch_size,
        )
        dtype = getattr(torch, request.decode_dtype)
        chunks = [model.decode(chunk, dtype) for chunk in latents.split(request.batch_size)]
    except torch.OutOfMemoryError as error:
        raise UserError(
            f'the GPU has too little memory for --batch-size {request.batch_size}; lower it and run the same command '
            'again (what is finished stays)'
        ) from error
    pixels = torch.cat(chunks).cpu()
    broken = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f'{len(broken)} images are not finite, the first is that of seed {draws.seed(indices[broken[0]])}: the '
            'model or the sampler has diverged; take an earlier checkpoint or a lower guidance scale'
        )
    return to_uint8(pixels).permute(0, 2, 3, 1).contiguous().numpy()


def _write_outputs(folder: SamplesFolder, request: SamplesRequest, networks: _Networks, log: Log) -> None:
    trained, draws, sampling = networks.trained, networks.draws, request.sampling
    writers = {'npz': write_npz, 'mds': write_mds}
    written = [writers[name](folder, draws) for name in request.formats if name in writers]
    title = (
        f'{trained.config.run_name}, batch {trained.batch or "unknown"}, {trained.weights} weights, {sampling.sampler} '
    )
    title += f'{sampling.num_steps} steps, guidance {sampling.guidance} {sampling.guidance_scale:g}'
    written.append(write_grid(folder, draws, trained.class_names, title))
    folder.finish()
    log(f'{len(draws.labels):,} images in {folder.path}: {", ".join(path.name for path in written)}, samples.json'
        f'{", images/" if "png" in request.formats else ""}')  # fmt: skip
