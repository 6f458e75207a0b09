"""``python -m tread_composer export``: weights of a run as safetensors, with all that is needed to use them."""

import os
from pathlib import Path
from typing import Any

import torch

from tread_composer.builders.cost import sampling_cost
from tread_composer.builders.model import build_model
from tread_composer.weights.exported import Exported, write_exported
from tread_composer.weights.trained import model_of, read_trained

__all__ = ['export', 'export_in_words', 'write_with_cost']


def export(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    weights: str = 'ema',
    overwrite: bool = False,
    allow_inexact: bool = False,
) -> dict[str, Any]:
    """Write the weights of a run to one file that ``load_trained`` reads back to the bit.

    The tensors have the names of the network: for a dense or routed DiT those of the published DiT files.

    Args:
        path: A run's folder, or a checkpoint in one.
        out: The file, ``.safetensors``; one that is there is replaced with ``overwrite``.
        weights: ``'ema'``, ``'raw'`` or ``'posthoc:0.13'``, as ``load_trained``.
        allow_inexact: Take a post-hoc average even if the snapshots do not come close to it.

    Returns:
        ``out``, ``weights``, ``batch``, ``digest``, ``average`` (see ``WeightFacts``), and of one network call in
        sampling ``parameters`` and ``gmacs``.

    Raises:
        UserError: As ``load_trained``, or the file is there already or cannot be written.
    """
    exported = read_trained(path, weights=weights, allow_inexact=allow_inexact)
    return write_with_cost(exported, str(path), out, overwrite)


def write_with_cost(exported: Exported, source: str, out: str | os.PathLike[str], overwrite: bool) -> dict[str, Any]:
    """Check that weights and facts make a model, count what sampling needs of it, write the file; see ``export``."""
    model_of(exported, source)  # refused here: not when the file is used
    # A fresh one: what was filled has weights, and shapes are enough.
    with torch.device('meta'):
        denoiser = build_model(exported.config, exported.data).denoiser
    cost = sampling_cost(denoiser, exported.data.sizes)
    texts = {'parameters': str(cost['parameters']), 'gmacs': f'{cost["gmacs"]:.6g}'}
    digest = write_exported(out, exported, texts, overwrite)
    facts = {'weights': exported.weights, 'batch': exported.batch, 'average': exported.average}
    return {'out': str(out), **facts, 'digest': digest, **cost}


def export_in_words(result: dict[str, Any]) -> str:
    """What was written, for a terminal."""
    batch = f'after {result["batch"]:,} batches' if result['batch'] else 'after an unknown number of batches'
    size = Path(result['out']).stat().st_size / 1e6
    average = result['average']
    lines = [
        f'written   {result["out"]} ({size:.1f} MB): the {result["weights"]} weights {batch}',
        f'sampling  {result["parameters"]:,} parameters, {result["gmacs"]:.4g} GMACs per network call (one image, no '
        'guidance)',
        f'digest    {result["digest"]}',
    ]
    if average is not None:
        lines.append(
            f'average   width {average["sigma_rel"]:g} of the run (gamma {average["gamma"]:.2f}) from '
            f'{average["snapshots"]} snapshots of batches {average["first"]:,} to {average["last"]:,}; its profile is '
            f'within {average["residual"]:.1%} of the wanted one'
        )
    return '\n'.join(lines)
