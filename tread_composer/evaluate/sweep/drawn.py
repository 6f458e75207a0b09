"""The rows of a trained model: draw images with a row's settings, as ``sample`` does, and measure them.

On any number of ranks; an interrupted row goes on, since its images stay on the disk until it is in the table.
"""

import contextlib
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from tread_composer.core.errors import ResumeError, UserError
from tread_composer.evaluate.measuring import measure_samples
from tread_composer.evaluate.sweep.request import SweepRequest
from tread_composer.io.device import choose_device
from tread_composer.io.files import read_json, write_json
from tread_composer.io.locks import locked
from tread_composer.io.page import in_words
from tread_composer.io.progress import duration, silent
from tread_composer.io.ranks import Ranks
from tread_composer.metrics.drawing import Draws, drawing_facts
from tread_composer.metrics.measurer import Measurer
from tread_composer.metrics.protocol import append_results
from tread_composer.sample.folder import RECORD
from tread_composer.sample.generate import generate
from tread_composer.sample.request import SamplesRequest
from tread_composer.samplers import SamplingSettings, guidance_defaults
from tread_composer.weights.exported import digest_of
from tread_composer.weights.trained import Trained, image_size, load_trained, read_trained, weights_name

__all__ = ['rows_of', 'sampling_of', 'sweep']

Log = Callable[[str], None]

_STATE = 'sweep.json'
_FORMAT = 2
_KEPT = ('ema', 'raw')  # weights that a checkpoint itself may hold
_UNGUIDED = {'guidance': 'none', 'guidance_scale': 1.0, 'guidance_interval': None}


def rows_of(request: SweepRequest, log: Log = silent) -> list[dict[str, Any]]:
    """The settings of each row; those that come to the same images stand once.

    Without guidance (scale 1, or an interval that is empty) neither its settings nor the interval mean anything.

    Raises:
        UserError: A combination is impossible.
    """
    settings_of, rows = _guidance_settings(request), []
    choices = (map(weights_name, request.weights), request.guidances, request.intervals, request.guidance_scales)
    # Each value once, however it is spelled; the scale varies fastest
    for weights, kind, interval, scale in itertools.product(*map(dict.fromkeys, choices)):
        settings = settings_of[kind]  # type: ignore[index]
        guidance = {'guidance': kind, 'guidance_scale': scale, 'guidance_interval': interval, **settings}
        rows.append({'weights': weights, **(guidance if sampling_of(guidance, request).guides else _UNGUIDED)})
    if not rows:
        raise UserError('sweep: a setting has no value, so there are no rows')
    different = [row for number, row in enumerate(rows) if row not in rows[:number]]
    if len(different) < len(rows):
        log(
            f'{len(rows)} combinations come to {len(different)} rows: without guidance (scale 1) the images are '
            'the same whatever its settings and the interval'
        )
    return json.loads(json.dumps(different))  # as rows come back from the file


def _guidance_settings(request: SweepRequest) -> dict[str, dict[str, Any]]:
    """By kind of guidance, those of the settings that belong to it."""
    try:
        names = {kind: guidance_defaults(kind).keys() for kind in request.guidances}
    except ValueError as error:
        raise UserError(f'--{error}') from None
    unused = request.guidance_settings.keys() - set().union(*names.values())
    if unused:
        kinds = ', '.join(request.guidances)
        raise UserError(f'--guidance-settings: {", ".join(sorted(unused))}: no setting of {kinds}')
    settings = request.guidance_settings.items()
    return {kind: {key: value for key, value in settings if key in names[kind]} for kind in names}


def sampling_of(row: Mapping[str, Any], request: SweepRequest) -> SamplingSettings:
    """How the images of a row are drawn; a ``UserError`` where its settings contradict each other."""
    sampling = {name: value for name, value in row.items() if name != 'weights'}
    try:
        return SamplingSettings.from_dict({'sampler': request.sampler, 'num_steps': request.num_steps, **sampling})
    except ValueError as error:
        raise UserError(f'sweep: {error}') from None


def sweep(request: SweepRequest, ranks: Ranks, log: Log = print) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure all rows that are not finished. Under the ``composer`` launcher all ranks call this.

    Every finished row is on the disk at once, in ``sweep.json``, so an interrupted sweep goes on; rows are independent,
    so a later sweep of the same kind may add some. Each number goes with its protocol into ``results.json`` too.

    Returns:
        All rows of the folder, those of earlier sweeps first, each with its ``settings``, its ``values`` and which of
        them are ``better``, and ``seconds``; and what they have in common.

    Raises:
        ResumeError: The folder holds rows of another model, reference or sampler; lists the differences.
        UserError: The input is at fault, or another process is sweeping in the folder. What is finished stays.
    """
    if not ranks.is_first:
        log = silent
    requested = rows_of(request, log)
    device = ranks.agreed(lambda: choose_device(request.device, ranks.local_rank))
    # Those of the first rank count for all: a run that still trains must not give each of them other weights.
    digests = ranks.from_first(ranks.agreed(lambda: _digests(request) if ranks.is_first else {}))
    bench = ranks.agreed(lambda: _Bench(request, device, ranks, digests, log))
    with contextlib.ExitStack() as stack:
        rows = ranks.from_first(ranks.agreed(lambda: bench.begin(stack) if ranks.is_first else []))
        # An earlier sweep of this folder has the others
        pending = [row for row in requested if all(row != finished['settings'] for finished in rows)]
        if len(pending) < len(requested):
            log(f'{len(requested) - len(pending)} of {len(requested)} rows are finished, and kept')
        began = time.monotonic()
        for number, row in enumerate(pending, 1):
            start = time.monotonic()
            measured = ranks.from_first(bench.measure(row))
            rows.append({'settings': row, **measured, 'seconds': time.monotonic() - start})
            if ranks.is_first:
                write_json(Path(request.out) / _STATE, {'format': _FORMAT, 'contract': bench.contract, 'rows': rows})
                shutil.rmtree(bench.images_of(row))  # 50,000 images of 256 pixels are 10 GB
            remaining = (time.monotonic() - began) / number * (len(pending) - number)
            figures = ', '.join(f'{name} {value:.4g}' for name, value in measured['values'].items())
            log(f'{number} of {len(pending)}: {in_words(row)}: {figures} (about {duration(remaining)} left)')
    return rows, bench.contract


class _Bench:
    """What stays the same from row to row: the reference, the feature network, the model while its weights do."""

    def __init__(
        self, request: SweepRequest, device: torch.device, ranks: Ranks, digests: Mapping[str, str], log: Log
    ) -> None:
        self.request, self.device, self.ranks, self.digests, self.log = request, device, ranks, digests, log
        measurement = request.measurement
        self.measurer = Measurer(measurement, device, ranks, log)
        self._trained: Trained | None = None
        self._loaded = ''  # which weights it has, as the rows call them
        trained = self._load(weights_name(request.weights[0]))
        count, classes = request.num_samples, trained.model.num_classes
        draws = Draws.in_turn(count, classes, request.seed)
        if draws.rule == 'in turn':
            raise UserError(
                f'--count {count}: is no multiple of the {classes} classes of the model, so they would not count '
                f'alike; take {max(1, round(count / classes)) * classes}'
            )
        self.measurer.check(count, image_size(trained.model), has_labels=classes > 0)
        facts = drawing_facts(trained.model, SamplingSettings(request.sampler), draws, weights='')
        takes_subsets = any(hasattr(metric, 'kid_subset_size') for metric in self.measurer.metrics)
        contract = {
            # Of the checkpoint, which names its last snapshot: averages of other widths may join the table later.
            'weights_digests': {name: digest for name, digest in digests.items() if name in _KEPT},
            'sampler': request.sampler,
            'num_steps': request.num_steps,
            'num_samples': count,
            **{name: value for name, value in facts.items() if name not in ('weights', 'sampling', 'weak')},
            'metrics': sorted(set(measurement.metrics)),
            'kid_subset_size': measurement.kid_subset_size if takes_subsets else None,
            **self.measurer.facts(),
        }
        self.contract: dict[str, Any] = json.loads(json.dumps(contract))  # as it comes back from the file

    def begin(self, stack: contextlib.ExitStack) -> list[dict[str, Any]]:
        """Take the folder; the rows that it holds."""
        folder = Path(self.request.out)
        # Each process writes all rows that it knows of
        busy = f'--out: another process is sweeping in {str(folder)!r}; wait, or choose another'
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / '.lock', busy))
        except OSError as error:
            raise UserError(f'--out: {str(folder)!r} cannot be written: {error}') from None
        path = folder / _STATE
        if not path.exists():
            return []
        state = read_json(path)
        if not isinstance(state, dict) or state.get('format') != _FORMAT:
            raise UserError(f'{path}: not written by this version of sweep; choose another --out')
        if state['contract'] != self.contract:
            remedy = 'Rows of different settings do not compare: choose another --out.'
            raise ResumeError.from_differences(str(path), state['contract'], self.contract, remedy)
        for row in state['rows']:  # killed while it removed the images of a finished one
            shutil.rmtree(self.images_of(row['settings']), ignore_errors=True)
        return state['rows']

    def images_of(self, row: Mapping[str, Any]) -> Path:
        """Where images are until their row is in the table: another model or reference has a folder of its own."""
        key = hashlib.sha256(json.dumps([self.contract, row], sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.request.out) / f'.row-{key}'

    def measure(self, row: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """The numbers of a row and their better directions, on the first rank; none on the others."""
        request = self.request
        trained = self.ranks.agreed(lambda: self._load(row['weights']))
        self.measurer.prepare()  # before the first row is drawn: an image of it may be damaged
        samples = SamplesRequest(
            path=request.path,
            out=self.images_of(row),
            weights=row['weights'],
            sampling=sampling_of(row, request),
            count=request.num_samples,
            seed=request.seed,
            formats=('npz',),
            batch_size=request.measurement.batch_size,
            device=request.device,
        )
        generate(samples, log=self.log, trained=trained)
        entries = measure_samples(samples.out, self.measurer)
        if not self.ranks.is_first:
            return {}
        append_results(Path(request.out) / 'results.json', [{**entry, 'source': trained.source} for entry in entries])
        cost = read_json(samples.out / RECORD)['gmacs_per_image']
        values = {entry['metric']: entry['value'] for entry in entries}
        better = {entry['metric']: entry['better'] for entry in entries}
        return {'values': {**values, 'gmacs_per_image': cost}, 'better': better}

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
