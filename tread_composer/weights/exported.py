"""The exported file: weights of one network as safetensors, with all that is needed to use them.

The tensors have the names of our network, which for a DiT are those of the published DiT files. The metadata are
texts: some for people (``time_convention``, ``prediction``, ...), and ``config`` and ``data`` as JSON, from which
``load_trained`` builds the model. Nothing in such a file can run code.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

import tread_composer
from tread_composer.algorithms.power_ema.snapshots import posthoc_width
from tread_composer.config import Config, restore_config
from tread_composer.core.errors import UserError
from tread_composer.data.facts import LatentFacts
from tread_composer.io.tensors import digest_of, write_tensors

__all__ = ['Exported', 'digest_of', 'read_exported', 'write_exported']

_FORMAT = 'tread_composer 1'
_ONLOOKERS = ('callbacks', 'loggers')  # they decide nothing, may not be installed elsewhere, and may hold addresses


@dataclass(frozen=True)
class Exported:
    """One network with its facts.

    Attributes:
        tensors: Weights under the network's names, float32.
        config: Of the run.
        data: Facts of its data.
        weights: ``'ema'``, ``'raw'`` or ``'posthoc:0.13'``.
        batch: Batches that the weights were trained on; 0 where nobody has said it.
        origin: Where they come from, in words.
        average: How a post-hoc average was made (``posthoc.Average.facts``); None for the others.
    """

    tensors: Mapping[str, Tensor]
    config: Config
    data: LatentFacts
    weights: str
    batch: int
    origin: str
    average: Mapping[str, Any] | None = None


def write_exported(path: str | os.PathLike[str], exported: Exported, extra: Mapping[str, str], overwrite: bool) -> str:
    """Write the file in one step; returns the digest of the weights.

    Args:
        path: The file.
        exported: What goes into it.
        extra: Further metadata.
        overwrite: Replace a file that is there.

    Raises:
        UserError: There is such a file already, or it cannot be written.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f'{path}: name it .safetensors; by that the other commands know such a file')
    if path.exists() and not overwrite:
        raise UserError(f'{path}: is there already; give another name, or --overwrite')
    digest = digest_of(exported.tensors)
    metadata = {**_metadata(exported), 'digest': digest, **extra}
    try:
        write_tensors(path, exported.tensors, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {error}') from None
    return digest


def _metadata(exported: Exported) -> dict[str, str]:
    config, data = exported.config, exported.data
    objective = config.objective.instance
    return {
        'format': _FORMAT,
        'tool_version': tread_composer.__version__,
        'weights': exported.weights,
        **({} if exported.average is None else {'average': json.dumps(exported.average)}),
        'batch': str(exported.batch),
        'origin': exported.origin,
        'objective': objective.name,
        'prediction': objective.prediction,
        'time_convention': objective.time_convention,
        'labels': f'0 .. {data.num_classes - 1}, null label {data.num_classes}' if data.num_classes else 'none',
        'class_names': json.dumps(data.class_names),
        'latent_scale': json.dumps(config.latent_scale),
        'latent_shift': json.dumps(config.latent_shift),
        'latents': '(raw latents - latent_shift) * latent_scale',
        'autoencoder': 'none: pixels' if data.autoencoder is None else data.autoencoder,
        'autoencoder_hash': data.autoencoder_hash or ('none' if data.autoencoder is None else 'unknown'),
        'config': json.dumps({name: value for name, value in config.to_dict().items() if name not in _ONLOOKERS}),
        'data': data.model_dump_json(),
    }


def read_exported(path: str | os.PathLike[str], overrides: list[str] | None = None) -> Exported:
    """Read a file of ``write_exported``; of another safetensors file, a refusal.

    Args:
        path: The file.
        overrides: ``key=value`` settings on its configuration.

    Raises:
        UserError: No such file, another kind of file, or one whose weights are not those that were exported.
    """
    try:
        with safe_open(path, framework='pt') as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get('format') != _FORMAT:
                raise UserError(
                    f'{path}: not written by `python -m tread_composer export` (format {metadata.get("format")!r}, not '
                    f'{_FORMAT!r}). Weights of another project: python -m tread_composer import'
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError:
        raise UserError(f'{path}: there is no such file; give a run folder, a checkpoint or an exported file') from None
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: no safetensors file, or a damaged one: {error}') from None
    config, data = _facts_in(metadata, str(path), overrides or [])
    if digest_of(tensors) != metadata['digest']:
        raise UserError(f'{path}: its weights are not those that were exported (their digest differs); copy it again')
    average = None if 'average' not in metadata else json.loads(metadata['average'])
    provenance = (metadata['weights'], int(metadata['batch']), metadata.get('origin', 'unknown'))
    return Exported(tensors, config, data, *provenance, average)


def _facts_in(metadata: Mapping[str, str], path: str, overrides: list[str]) -> tuple[Config, LatentFacts]:
    try:
        missing = {'config', 'data', 'weights', 'batch', 'digest'} - metadata.keys()
        if missing:
            raise ValueError(f'no {", ".join(sorted(missing))}')
        tree: Any = json.loads(metadata['config'])
        data = LatentFacts.model_validate_json(metadata['data'])
        int(metadata['batch'])
        is_posthoc = posthoc_width(metadata['weights']) is not None and isinstance(
            json.loads(metadata.get('average', 'null')), dict
        )
        if not isinstance(tree, dict) or not (metadata['weights'] in ('ema', 'raw') or is_posthoc):
            raise ValueError('config or weights are not what `export` writes')
    except (ValueError, ValidationError) as error:
        raise UserError(f'{path}: its metadata cannot be used: {error}. Export the run again') from None
    return restore_config(tree, overrides, source=f'{path} (config in its metadata)'), data
