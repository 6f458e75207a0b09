"""What is known of a network's weights, and the exported file: weights as safetensors with all that their use needs.

The tensors have the names of our network, which for a DiT are those of the published DiT files. The metadata are
texts: some for people (``time_convention``, ``prediction``, ...), and ``config`` and ``data`` as JSON, from which
``load_trained`` builds the model. Nothing in such a file can run code.
"""

import json
import os
from collections.abc import Mapping, Sequence
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
from tread_composer.data.manifest import LatentFacts
from tread_composer.io.tensors import digest_of, write_tensors

__all__ = ['Exported', 'WeightFacts', 'digest_of', 'exported_run', 'read_exported', 'write_exported']

_FORMAT = 'tread_composer 1'  # another number: a file that earlier versions cannot read
_NEEDED = {'config', 'data', 'weights', 'batch', 'digest'}
_ONLOOKERS = ('callbacks', 'loggers')  # they decide nothing, may not be installed elsewhere, and may hold addresses


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """What is known of the weights of one network."""

    config: Config  # of the run
    data: LatentFacts  # of its training data
    weights: str  # `ema`, `raw` or `posthoc:0.13`
    batch: int  # how many they were trained on; 0 where nobody has said it (imported weights)
    origin: str  # where they come from, in words
    average: Mapping[str, Any] | None = None  # how a post-hoc average was made (`posthoc.Average.facts`)

    @property
    def immaturity(self) -> str:
        """Behind a semicolon, what share of the average is the weights of the start; empty where it is below 1 %."""
        algorithms = (part.instance for part in self.config.algorithms.values())
        averaging = [algorithm for algorithm in algorithms if hasattr(algorithm, 'immaturity')]
        text = averaging[0].immaturity(self.batch) if self.weights == 'ema' and self.batch and averaging else ''
        return f'; {text}' if text else ''


@dataclass(frozen=True, kw_only=True)
class Exported(WeightFacts):
    """The weights themselves, with their facts; ``tensors`` have the network's names, float32."""

    tensors: Mapping[str, Tensor]


def write_exported(path: str | os.PathLike[str], exported: Exported, extra: Mapping[str, str], overwrite: bool) -> str:
    """Write the file in one step, with ``extra`` metadata; returns the digest of the weights.

    Raises:
        UserError: There is such a file already, it cannot be written, or a weight is not finite.
    """
    path = Path(path)
    if path.suffix != '.safetensors':
        raise UserError(f'{path}: name it .safetensors; by that the other commands know such a file')
    if path.exists() and not overwrite:
        raise UserError(f'{path}: is there already; give another name, or --overwrite')
    broken = [name for name, tensor in exported.tensors.items() if not tensor.isfinite().all()]
    if broken:
        text = f'{len(broken)} of {len(exported.tensors)} weights hold NaN or infinity, such as {broken[0]}'
        raise UserError(f'{path}: not written: {text}. Take an earlier checkpoint')
    digest = digest_of(exported.tensors)
    try:
        write_tensors(path, exported.tensors, {**_metadata(exported), 'digest': digest, **extra})
    except (OSError, SafetensorError) as error:
        raise UserError(f'{path}: cannot be written: {error}') from None
    return digest


def _metadata(facts: WeightFacts) -> dict[str, str]:
    config, data, objective = facts.config, facts.data, facts.config.objective.instance
    return {
        'format': _FORMAT,
        'tool_version': tread_composer.__version__,
        'weights': facts.weights,
        **({} if facts.average is None else {'average': json.dumps(facts.average)}),
        'batch': str(facts.batch),
        'origin': facts.origin,
        'objective': objective.name,
        'prediction': objective.prediction,
        'time_convention': objective.time_convention,
        # For people; the two at the end are what the model is built from.
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


def read_exported(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Exported:
    """Read a file of ``write_exported``, with ``key=value`` settings on its configuration.

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
    try:
        missing = _NEEDED - metadata.keys()
        if missing:
            raise ValueError(f'no {", ".join(sorted(missing))}')
        tree, average = json.loads(metadata['config']), json.loads(metadata.get('average', 'null'))
        data, batch, weights = LatentFacts.model_validate_json(metadata['data']), metadata['batch'], metadata['weights']
        is_posthoc = posthoc_width(weights) is not None and isinstance(average, dict)
        if not isinstance(tree, dict) or not (weights in ('ema', 'raw') or is_posthoc):
            raise ValueError('config or weights are not what `export` writes')
        facts = {'data': data, 'weights': weights, 'batch': int(batch), 'average': average}
    except (ValueError, ValidationError) as error:
        raise UserError(f'{path}: its metadata cannot be used: {error}. Export the run again') from None
    # Texts of a file from anywhere: nothing in them is looked up here (``document_of``).
    config = restore_config(tree, overrides, source=f'{path} (config in its metadata)')
    # safetensors has no checksums of its own.
    if digest_of(tensors) != metadata['digest']:
        raise UserError(f'{path}: its weights are not those that were exported (their digest differs); copy it again')
    return Exported(tensors=tensors, config=config, origin=metadata.get('origin', 'unknown'), **facts)


def exported_run(path: str | os.PathLike[str]) -> str | None:
    """The run that an exported file says it is of; None if it says none, or is no such file. Reads no weights."""
    try:
        with safe_open(path, framework='pt') as file:
            config = json.loads((file.metadata() or {}).get('config', '{}'))
    except (OSError, SafetensorError, ValueError):
        return None
    return config.get('run_name') if isinstance(config, dict) else None
