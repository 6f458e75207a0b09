"""What is measured: images on disk and how they were made, or a model that has to be sampled first.

Samples that ``sample`` wrote say themselves how they were made (``samples.json``); of others it has to be said, or
their numbers compare with none.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tread_composer.config import restore_config
from tread_composer.core.errors import UserError
from tread_composer.io.files import read_json
from tread_composer.metrics.images import ImageSet, open_images
from tread_composer.metrics.protocol import UNKNOWN
from tread_composer.objectives import OBJECTIVES
from tread_composer.sample.folder import PLACES, RECORD
from tread_composer.samplers import SamplingSettings
from tread_composer.weights.exported import exported_run

__all__ = ['facts_of', 'facts_said', 'folder_of', 'is_model', 'open_samples', 'origin_of', 'run_name']

Log = Callable[[str], None]

_DESCRIBED = (
    'weights', 'labels', 'seed', 'sampling', 'time_grid', 'weak', 'autoencoder', 'autoencoder_hash', 'decode_dtype',
    'uint8_rule',
)  # fmt: skip
_CORRECTED = 'corrected_at_zero'  # `samplers.sampler_facts`; not said: the last step is Euler's
_GRIDS = dict.fromkeys(name for part in OBJECTIVES.values() for name in part().time_grid())
_SECTIONS = {
    'sampling': (*SamplingSettings.names(), 'routes'),
    'time_grid': ('objective', *_GRIDS, _CORRECTED),
}


def is_model(path: str | Path) -> bool:
    """Whether a path is a trained model (run folder, checkpoint, exported file), and not images."""
    path = Path(path)
    return path.suffix in ('.pt', '.safetensors') or (path / 'config.yaml').is_file()


def folder_of(source: str | Path) -> Path:
    """The folder of a run, a checkpoint or samples."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def run_name(source: str) -> str | None:
    """Name of the run that a checkpoint, a folder or an exported file is of; None where nothing says it.

    An exported file says so itself: the folder in which it lies may be of another run.
    """
    if Path(source).suffix == '.safetensors':
        return exported_run(source)
    config = folder_of(source) / 'config.yaml'
    return restore_config(config).run_name if config.is_file() else None


def open_samples(path: Path) -> tuple[ImageSet, dict[str, Any] | None]:
    """The images at a path, and what ``sample`` wrote about them."""
    inside = path.name in PLACES.values() and not (path / RECORD).is_file()
    folder = path.parent if inside else path
    if not (folder / RECORD).is_file():
        return open_images(path), None
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or 'made_with' not in record:
        raise UserError(f'{folder / RECORD}: not written by sample')
    if not record.get('complete'):
        raise UserError(f'{folder}: is not finished; run the same sample command again, which goes on')
    if folder == path:
        path = folder / next(PLACES[name] for name in PLACES if name in record['made_with']['formats'])
    images, count = open_images(path), record['made_with']['num_samples']
    if images.count != count:
        raise UserError(f'{path}: holds {images.count} images, and {folder / RECORD} says {count}; sample them again')
    return images, record


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a protocol that ``samples.json`` holds; what an older one does not say is unknown."""
    made_with = record['made_with']
    facts = {name: made_with.get(name, UNKNOWN) for name in _DESCRIBED}
    # Balanced labels follow from the count; of others the list itself decides.
    if made_with['labels'] not in ('balanced', 'none'):
        facts['labels'] = f'{made_with["labels"]} {made_with["labels_digest"]}'
    return facts


def origin_of(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Which weights drew the samples, as far as ``samples.json`` says it."""
    if record is None:  # images of somebody else
        return {}
    return {
        'run': record.get('run') or run_name(record['source']),
        'batch': record['batch'] or None,  # 0: imported, and nobody has said it
        'weights_digest': record['made_with']['weights_digest'],
    }


def facts_said(describe: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """The part of a protocol that somebody has to say; ``sampling.num_steps`` is a key within ``sampling``.

    What nobody says is unknown, within a section too: half a description compares with nothing.

    Raises:
        UserError: A key does not exist, or a value cannot be.
    """
    facts: dict[str, Any] = {}
    for key, value in describe.items():
        name, _, inner = key.partition('.')
        if name not in _DESCRIBED or (name in _SECTIONS) != bool(inner) or (inner and inner not in _SECTIONS[name]):
            keys = [f'{part}.<{", ".join(_SECTIONS[part])}>' if part in _SECTIONS else part for part in _DESCRIBED]
            raise UserError(f'--describe: {key!r} is not known; known are {", ".join(keys)}')
        if inner:
            facts.setdefault(name, {})[inner] = value
        else:
            facts[name] = value
    for name, complete in (('sampling', _whole_sampling), ('time_grid', _whole_grid)):
        if name in facts:
            facts[name] = complete(facts[name])
    missing = [name for name in _DESCRIBED if facts.get(name, UNKNOWN) == UNKNOWN]
    sections = [(name, facts[name]) for name in _SECTIONS if isinstance(facts.get(name), dict)]
    missing += [f'{name}.{inner}' for name, section in sections for inner, value in section.items() if value == UNKNOWN]
    if missing:
        log(
            f'there is no {RECORD} beside these images, and nobody has said {", ".join(missing)} (--describe '
            f'key=value): the numbers will compare with no others'
        )
    return {**dict.fromkeys(_DESCRIBED, UNKNOWN), **facts}


def _whole_sampling(described: dict[str, Any]) -> dict[str, Any]:
    settings_tree = {name: value for name, value in described.items() if name != 'routes'}
    if 'guidance' not in settings_tree:
        needed = SamplingSettings().to_dict()
    else:
        try:
            settings = SamplingSettings.from_dict(settings_tree)
        except (TypeError, ValueError) as error:
            raise UserError(f'--describe: sampling: {error}') from None
        needed = settings.protocol()
        settings_tree = {name: needed.get(name, value) for name, value in settings_tree.items()}
        if settings.provider is None:
            settings_tree['guidance_scale'] = 1.0  # which is what none means
    routes = {'routes': described['routes']} if 'routes' in described else {}
    return {**dict.fromkeys(needed, UNKNOWN), **settings_tree, **routes}


def _whole_grid(described: dict[str, Any]) -> dict[str, Any]:
    name = described.get('objective', UNKNOWN)
    if name == UNKNOWN:
        return {'objective': UNKNOWN, **described}
    if name not in OBJECTIVES:
        raise UserError(f'--describe: time_grid.objective={name}: choose one of {", ".join(OBJECTIVES)}')
    settings = {key: value for key, value in described.items() if key not in ('objective', _CORRECTED)}
    # What else there is to say may depend on what is said: a cosine schedule has no betas.
    said = {key: settings[key] for key in OBJECTIVES[name]().time_grid() if settings.get(key, UNKNOWN) != UNKNOWN}
    try:
        needed = OBJECTIVES[name](**said).time_grid()
    except ValueError as error:
        raise UserError(f'--describe: time_grid: {error}') from None
    foreign = [key for key in settings if key not in needed]
    if foreign:
        raise UserError(f'--describe: time_grid.{foreign[0]}: of no meaning here; {name} has {", ".join(needed)}')
    return {**dict.fromkeys(('objective', *needed), UNKNOWN), **described}
