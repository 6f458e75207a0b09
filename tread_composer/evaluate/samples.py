"""What is measured: images on disk and how they were made, or a model that has to be sampled first.

Samples that ``sample`` wrote say themselves how they were made (``samples.json``); of others it has to be said, or
their numbers compare with none.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tread_composer.config import restore_config
from tread_composer.conversion.files import read_json
from tread_composer.errors import UserError
from tread_composer.generate.folder import IMAGES, RECORD
from tread_composer.metrics.images import ImageSet, open_images
from tread_composer.metrics.protocol import UNKNOWN

__all__ = ['facts_of', 'facts_said', 'folder_of', 'is_model', 'open_samples', 'run_name']

Log = Callable[[str], None]

_DESCRIBED = (
    'weights', 'labels', 'seed', 'sampling', 'autoencoder', 'autoencoder_hash', 'decode_dtype', 'uint8_rule',
)  # fmt: skip


def is_model(path: str | Path) -> bool:
    """Whether a path is a trained model (run folder, checkpoint, exported file), and not images."""
    path = Path(path)
    return path.suffix in ('.pt', '.safetensors') or (path / 'config.yaml').is_file()


def folder_of(source: str | Path) -> Path:
    """The folder of a run, a checkpoint or samples."""
    path = Path(source)
    return path if path.is_dir() else path.parent


def run_name(source: str) -> str | None:
    """Of the run that a checkpoint or a folder is of; None where no configuration says it."""
    config = folder_of(source) / 'config.yaml'
    return restore_config(config).run_name if config.is_file() else None


def open_samples(path: Path) -> tuple[ImageSet, dict[str, Any] | None]:
    """The images at a path, and what ``sample`` wrote about them."""
    inside = path.name in (IMAGES, 'samples.npz', 'mds')
    folder = path if (path / RECORD).is_file() else path.parent if inside else None
    if folder is None or not (folder / RECORD).is_file():
        return open_images(path), None
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or 'made_with' not in record:
        raise UserError(f'{folder / RECORD}: not written by sample')
    if not record.get('complete'):
        raise UserError(f'{folder}: is not finished; run the same sample command again, which goes on')
    if folder == path:
        places = {'png': IMAGES, 'npz': 'samples.npz', 'mds': 'mds'}
        path = folder / next(places[name] for name in places if name in record['made_with']['formats'])
    images, wanted = open_images(path), record['made_with']['num_samples']
    if images.count != wanted:
        raise UserError(f'{path}: holds {images.count} images, and {folder / RECORD} says {wanted}; sample them again')
    return images, record


def facts_of(record: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a protocol that ``samples.json`` holds."""
    made = record['made_with']
    facts = {name: made[name] for name in _DESCRIBED}
    # Balanced labels follow from the count; of others the list itself decides.
    if made['labels'] not in ('balanced', 'none'):
        facts['labels'] = f'{made["labels"]} {made["labels_digest"]}'
    sampling = dict(made['sampling'])
    if made['weak'] is not None:
        sampling['weak'] = made['weak']['weights']
    if made['routes'] is not None:
        sampling['routes'] = made['routes']
    return {**facts, 'sampling': sampling}


def facts_said(describe: Mapping[str, Any], log: Log) -> dict[str, Any]:
    """The part of a protocol that somebody has to say; ``sampling.num_steps`` is a key within ``sampling``."""
    facts: dict[str, Any] = {}
    for key, value in describe.items():
        name, _, inner = key.partition('.')
        if name not in _DESCRIBED or (name == 'sampling') != bool(inner):
            known = ', '.join('sampling.<setting>' if one == 'sampling' else one for one in _DESCRIBED)
            raise UserError(f'--describe: {key!r} is not known; known are {known}')
        if inner:
            facts.setdefault(name, {})[inner] = value
        else:
            facts[name] = value
    missing = [name for name in _DESCRIBED if name not in facts]
    if missing:
        log(
            f'there is no {RECORD} beside these images, and nobody has said {", ".join(missing)} (--describe '
            f'key=value): the numbers will compare with no others'
        )
    return {**dict.fromkeys(missing, UNKNOWN), **facts}
