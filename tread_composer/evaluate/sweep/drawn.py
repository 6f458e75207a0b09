"""The rows of a trained model: draw images with a row's settings, and measure them against a reference.

On any number of ranks: each draws and looks at its share, the features are gathered, the first one measures.
Shapes: B samples, C channels, R x R pixels.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tread_composer.autoencoders.pixels import to_uint8
from tread_composer.core.errors import UserError
from tread_composer.core.precision import plain_float32
from tread_composer.evaluate.sweep.parts import RowParts
from tread_composer.evaluate.sweep.request import SweepRequest
from tread_composer.evaluate.sweep.rows import combinations, run_sweep
from tread_composer.io.device import choose_device, machine_for
from tread_composer.io.files import full_disk_in_words
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.drawing import drawing_facts
from tread_composer.metrics.features import FeatureSet, joined
from tread_composer.metrics.measurer import Measurer, silent
from tread_composer.metrics.protocol import append_results
from tread_composer.samplers import SamplingSettings, guidance_cost
from tread_composer.weights.exported import digest_of
from tread_composer.weights.trained import Trained, image_size, load_trained, read_trained, weights_name

__all__ = ['rows_of', 'sampling_of', 'sweep']

_TALK_EVERY = 60.0  # seconds
_KEPT = ('ema', 'raw')  # weights that a checkpoint itself may hold


def rows_of(request: SweepRequest, log: Callable[[str], None] = silent) -> list[dict[str, Any]]:
    """The settings of each row; those that come to the same images stand once.

    Without guidance (scale 1, or an interval that is empty) neither its settings nor the interval mean anything.

    Args:
        log: Told how many combinations came to rows that were there.

    Raises:
        UserError: A combination is impossible.
    """
    rows = []
    choices = combinations(
        weights=[weights_name(word) for word in request.weights],
        guidance=request.guidances,
        interval=request.intervals,
        scale=request.guidance_scales,
    )
    for choice in choices:
        weights = choice['weights']
        row = {
            'weights': weights,
            'guidance': choice['guidance']['guidance'],
            'guidance_scale': choice['scale'],
            'guidance_interval': None if choice['interval'] is None else list(choice['interval']),
            **choice['guidance'],
        }
        if not sampling_of(row, request).guides:
            row = {
                'weights': choice['weights'],
                'guidance': 'none',
                'guidance_scale': 1.0,
                'guidance_interval': None,
            }
        rows.append(row)
    different = [entry['row'] for entry in combinations(row=rows)]
    if len(different) < len(rows):
        log(
            f'{len(rows)} combinations come to {len(different)} rows: without guidance (scale 1) the images are '
            'the same whatever its settings and the interval'
        )
    return different


def sampling_of(row: Mapping[str, Any], request: SweepRequest) -> SamplingSettings:
    """How the images of a row are drawn.

    Raises:
        UserError: The settings contradict each other.
    """
    sampling = {name: value for name, value in row.items() if name != 'weights'}
    try:
        return SamplingSettings.from_dict({'sampler': request.sampler, 'num_steps': request.num_steps, **sampling})
    except ValueError as error:
        raise UserError(f'sweep: {error}') from None


def sweep(
    request: SweepRequest, ranks: Ranks, log: Callable[[str], None] = print
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure all rows that are not finished. Under the ``composer`` launcher all ranks call this.

    Each number goes with its protocol into ``results.json`` too.

    Returns:
        All rows of the folder, and what they have in common.

    Raises:
        UserError: The input is at fault. What is finished stays.
    """
    if not ranks.is_first:
        log = silent
    rows = rows_of(request, log)
    device = ranks.agreed(lambda: choose_device(request.device, ranks.local_rank))
    with machine_for(device, 0, ranks.local_world), plain_float32(device):
        # Of the first rank, for all: a run that still trains must not give each of them other weights.
        digests = ranks.from_first(ranks.agreed(lambda: _digests(request) if ranks.is_first else {}))
        bench = ranks.agreed(lambda: _Bench(request, device, ranks, digests, log))
        measured = run_sweep(rows, bench.measure, request.out, bench.contract, log, ranks)
        bench.forget(rows)
    return measured, bench.contract


class _Bench:
    """What stays the same from row to row: the reference, the feature network, the model while its weights do."""

    def __init__(
        self,
        request: SweepRequest,
        device: torch.device,
        ranks: Ranks,
        digests: Mapping[str, str],
        log: Callable[[str], None],
    ) -> None:
        self.request, self.device, self.ranks, self.digests, self.log = request, device, ranks, digests, log
        self.measurer = Measurer(request.measurement, device, ranks, log)
        self._trained: Trained | None = None
        self._loaded = ''  # which weights it has, as the rows call them
        self._measured: RowParts | None = None  # the row before
        trained = self._load(weights_name(request.weights[0]))
        self._check_classes(trained)
        self.size = image_size(trained.model)
        self.measurer.check(request.num_samples, self.size)
        facts = self._facts(trained, SamplingSettings())
        self.contract: dict[str, Any] = {
            # Of the checkpoint, which names its last snapshot: averages of other widths may join the table later.
            'weights_digests': {name: digest for name, digest in digests.items() if name in _KEPT},
            'sampler': request.sampler,
            'num_steps': request.num_steps,
            'num_samples': request.num_samples,
            **{name: value for name, value in facts.items() if name not in ('weights', 'sampling', 'weak')},
            **request.measurement.contract(),
            **self.measurer.facts(),
        }

    def measure(self, row: Mapping[str, Any]) -> dict[str, float]:
        """The numbers of a row, on the first rank; none on the others."""
        if self._measured is not None:
            self._measured.remove()  # that row is in the table
        self._measured = parts = self._parts(row)
        sampling = sampling_of(row, self.request)
        trained = self.ranks.agreed(lambda: self._load(row['weights']))
        self.ranks.agreed(lambda: trained.prepare_for(sampling))
        model = trained.model
        try:
            cost = guidance_cost(
                model.denoiser, model.objective, sampling, latent_shape=model.latent_shape, null_label=model.null_label
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        self.measurer.prepare()  # before the first row is drawn: an image of it may be damaged
        # Refused together: a rank whose images are broken must not leave the others waiting.
        finished = self.ranks.from_first(parts.finished())
        if finished:
            num_finished = sum(len(parts.indices(part)) for part in finished)
            self.log(f'going on: {num_finished:,} of {self.request.num_samples:,} images of this row are there')
        features = self.ranks.agreed(lambda: self._look(trained, sampling, parts, finished))
        figures = self.measurer.figures(features)
        if not self.ranks.is_first:
            return {}
        entries = self.measurer.entries(
            figures,
            self._facts(trained, sampling),
            num_samples=self.request.num_samples,
            resolution=self.size,
            source=trained.source,
            run=trained.config.run_name,
            batch=trained.batch or None,
            weights_digest=trained.digest,
        )
        append_results(Path(self.request.out) / 'results.json', entries)
        return {**{entry['metric']: entry['value'] for entry in entries}, 'gmacs_per_image': cost.gmacs}

    def forget(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Remove what is kept of the images of finished rows."""
        for row in rows:
            self._parts(row).remove()

    def _load(self, weights: str) -> Trained:
        if self._trained is None or self._loaded != weights:
            self._trained = None  # two models need not fit
            request = self.request
            loaded = load_trained(request.path, weights=weights, device=self.device, overrides=request.overrides)
            if loaded.digest != self.digests[weights]:
                raise UserError(
                    f'{request.path}: holds other {weights} weights than at the start of this sweep (now those after '
                    f'{loaded.batch:,} batches), so its rows would not compare: does the run still train? Sweep one of '
                    'its checkpoints (a file ep*-ba*-rank0.pt, which stays as it is), with another --out. Finished '
                    'rows stay'
                )
            self._trained, self._loaded = loaded, weights
        return self._trained

    def _check_classes(self, trained: Trained) -> None:
        classes, count = trained.model.num_classes, self.request.num_samples
        if classes and count % classes:
            raise UserError(
                f'--count {count}: is no multiple of the {classes} classes of the model, so they would not count '
                f'alike; take {max(1, round(count / classes)) * classes}'
            )

    def _parts(self, row: Mapping[str, Any]) -> RowParts:
        label = {'contract': self.contract, 'row': row, 'weights_digest': self.digests[row['weights']]}
        return RowParts(Path(self.request.out), label, self.request.num_samples)

    def _look(
        self, trained: Trained, sampling: SamplingSettings, parts: RowParts, finished: Sequence[int]
    ) -> list[FeatureSet]:
        """Features of this rank's images of a row; the first rank's have those of finished parts among them.

        Raises:
            UserError: Some images are not finite, or a finished part is damaged.
        """
        features = [parts.read(part) for part in finished] if self.ranks.is_first else []
        undone = [part for part in range(len(parts)) if part not in set(finished)]
        own_parts, batch_size = undone[self.ranks.rank :: self.ranks.world], self.request.measurement.batch_size
        together, reported = max(1, batch_size // len(parts.indices(0))), time.monotonic()
        for start in range(0, len(own_parts), together):
            chunk = own_parts[start : start + together]
            images_BCRR = self._draw(trained, sampling, [index for part in chunk for index in parts.indices(part)])
            if not images_BCRR.isfinite().all():
                raise UserError('images came out that are not finite: the model or the sampler has diverged')
            pieces = to_uint8(images_BCRR).split([len(parts.indices(part)) for part in chunk])
            for part, piece_BCRR in zip(chunk, pieces, strict=True):
                features.append(joined(self.measurer.look(piece_BCRR.split(batch_size))))
                with full_disk_in_words(Path(self.request.out)):
                    parts.write(part, features[-1])
            if time.monotonic() - reported > _TALK_EVERY:
                reported = time.monotonic()
                num_done = len(finished) + (start + len(chunk)) * self.ranks.world
                self.log(f'  about {min(num_done / len(parts), 1):.0%} of {self.request.num_samples:,} images')
        return features

    def _draw(self, trained: Trained, sampling: SamplingSettings, indices: Sequence[int]) -> Tensor:
        """Images ``[B, C, R, R]``, about -1 to 1."""
        classes, model = trained.model.num_classes, trained.model
        batch_size = self.request.measurement.batch_size
        labels = [index % classes if classes else 0 for index in indices]
        seeds = [self.request.seed + index for index in indices]
        try:
            latents = model.draw(labels, seeds, sampling, batch_size=batch_size)
        except ValueError as error:
            raise UserError(f'sweep: {error}') from None
        return torch.cat([model.decode(chunk).float() for chunk in latents.split(batch_size)])

    def _facts(self, trained: Trained, sampling: SamplingSettings) -> dict[str, Any]:
        return drawing_facts(
            trained.model,
            sampling,
            weights=trained.weights,
            labels='balanced',
            seed=self.request.seed,
            routes=trained.routes,
        )


def _digests(request: SweepRequest) -> dict[str, str]:
    """Of all weights that the file holds, so that a sweep of others may be added and one of a later checkpoint not."""
    digests, requested = {}, [weights_name(word) for word in request.weights]
    for weights in dict.fromkeys((*_KEPT, *requested)):
        try:
            digests[weights] = digest_of(read_trained(request.path, weights=weights).tensors)
        except UserError:
            if weights in requested:
                raise
    return digests
