"""The commands that draw images from a trained model: ``sample``, ``sweep``, ``evaluate``."""

import dataclasses
import functools
from pathlib import Path
from typing import Annotated

from tread_composer.cli.flags import Typed
from tread_composer.core.errors import UserError
from tread_composer.core.named import part_named
from tread_composer.core.options import Flag
from tread_composer.core.process import importing
from tread_composer.evaluate.sweep.request import SweepRequest
from tread_composer.metrics.measurement import Measurement
from tread_composer.sample.request import SamplesRequest
from tread_composer.samplers.settings import SamplingSettings

__all__ = ['evaluate', 'sample', 'sweep']

# What `evaluate` takes for images that are there already, and what it decides itself of those that it draws.
_OF_IMAGES = {'path', 'overrides', 'device', 'out', *(entry.name for entry in dataclasses.fields(Measurement))}
_EVALUATED = {'out': Path(), 'classes': None, 'formats': ('npz',), 'decode_dtype': 'float32'}

_print_now = functools.partial(print, flush=True)


def sample(typed: Typed, request: SamplesRequest) -> None:
    """Draw images from a trained model; after an interruption the same command continues.

    Example: runs/digits_tread --count 100 --guidance-scale 1.5 --out samples
    """
    _check_sampling(request.sampling, typed)
    with importing():
        from tread_composer.sample.generate import generate

    generate(request, log=_print_now)


def sweep(typed: Typed, request: SweepRequest) -> None:
    """Measure a model for each combination of sampling settings, and mark the best.

    Example: runs/digits_tread --reference data/digits/train --features digits --count 500 --guidance-scale 1 1.5 2
        --guidance-interval none 0.1:0.9 --out sweep
    """
    with importing():
        from tread_composer.evaluate.sweep.drawn import sweep as measure_rows
        from tread_composer.evaluate.sweep.rows import format_sweep, write_sweep
        from tread_composer.io.ranks import Ranks

    _check_steps(request.sampler, typed)
    ranks = Ranks.start()  # only once the words are right: it waits for the others
    rows, contract = measure_rows(request, ranks)
    if ranks.is_first:
        files = write_sweep(rows, request.out, contract, str(typed))
        print(format_sweep(rows))
        print('\n'.join(f'written: {file}' for file in files))


def evaluate(
    typed: Typed,
    model: Annotated[SamplesRequest, Flag(fixed=_EVALUATED)],
    measurement: Measurement,
    out: str | None = None,
    samples_folder: Annotated[str | None, Flag('--samples-folder', '--samples')] = None,
) -> None:
    """Measure samples or a model: FID, KID, precision, recall and more.

    PATH may also hold images: a folder, an npz, MDS, or what `sample` has written.

    Args:
        out: File for the numbers (results.json in the folder of the run or the samples).
        samples_folder: Folder for the images that a model draws (one in the folder of the run).

    Example: runs/digits_tread --reference data/digits/train --features digits --count 500
    """
    _check_sampling(model.sampling, typed)
    with importing():
        from tread_composer.evaluate import measuring
        from tread_composer.io.device import choose_device
        from tread_composer.metrics.measurer import Measurer

    if measuring.is_model(model.path):
        entries = measuring.evaluate_model(model, measurement, samples=samples_folder, log=_print_now)
    else:
        foreign = [f'--{key.replace("_", "-")}' for key in sorted(typed.given - _OF_IMAGES)]
        foreign += [f'{key}={value}' for key, value in model.overrides.items()]
        if foreign:
            raise UserError(f'{", ".join(foreign)}: of a model that is sampled first, and {model.path} holds images')
        measuring.open_samples(Path(model.path))  # refused before the network is loaded
        entries = measuring.measure_samples(
            model.path, Measurer(measurement, choose_device(model.device, 0), log=_print_now)
        )
    if entries:
        print(measuring.format_entries(entries))
        measuring.publish(entries, model.path, out=out, log=_print_now)


def _check_sampling(sampling: SamplingSettings, typed: Typed) -> None:
    if sampling.guidance != 'none' and 'guidance_scale' not in typed.given:
        raise UserError(f'--guidance {sampling.guidance} needs a --guidance-scale, for example 1.5')
    from tread_composer.samplers import SAMPLERS

    try:
        part_named(sampling.sampler, SAMPLERS)  # refused before anything is loaded
    except ValueError as error:
        raise UserError(f'--sampler: {error}') from None
    _check_steps(sampling.sampler, typed)


def _check_steps(sampler: str, typed: Typed) -> None:
    from tread_composer.samplers import adaptive_settings

    tolerances = adaptive_settings(sampler)
    if tolerances is not None and 'steps' in typed.given:
        raise UserError(
            f'--steps: has no effect with --sampler {sampler}, which chooses its steps; leave it out, or set '
            f'{", ".join(tolerances)} by --sampler-settings'
        )
