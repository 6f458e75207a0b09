"""A trained network looked at from inside: similarity maps on real latents, and what they and the guidelines say.

Legend: S samples, B samples of a batch, L blocks, C channels (2C stored, for moments), H x W latent pixels.
"""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tread_composer.advisor.placement import (
    SCORE_RULE,
    RouteAdvice,
    candidate_spans,
    propose_route,
    rank_routes,
    read_route,
)
from tread_composer.advisor.similarity import token_similarity
from tread_composer.algorithms.rules import conflict
from tread_composer.algorithms.tread import Tread
from tread_composer.builders.cost import count_macs
from tread_composer.builders.model import build_denoiser
from tread_composer.builders.run_data import split_folders
from tread_composer.config import Config
from tread_composer.core.batch import POSTERIOR_NOISE, RAW_LATENTS
from tread_composer.core.errors import UserError
from tread_composer.core.inference import plain_float32
from tread_composer.core.randomness import KeyedRandom
from tread_composer.data.checks import check_agreement, check_shards
from tread_composer.data.columns import LABEL, LATENTS
from tread_composer.data.digits import digits_manifest, load_digits_arrays
from tread_composer.data.manifest import MANIFEST_NAME, LatentFacts, Manifest
from tread_composer.io.device import choose_device, machine_for
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.routing import Route, find_blocks
from tread_composer.weights.trained import Trained, load_trained

__all__ = ['Inspection', 'inspect_run', 'network_call']

_SHOWN = 5  # candidates at the top of the ranking
_SEED = 0  # of the noise
_FLAT = 0.99  # similarity above which a map says little


@dataclass(frozen=True)
class Inspection:
    """Similarity maps of a trained model, and what follows from them."""

    title: str  # which weights these are
    maps: dict[float, Tensor]  # by time, [L + 1, L + 1]
    mean: Tensor  # over the times
    routes: tuple[tuple[int, int], ...]  # the run's own, first and last block
    advice: RouteAdvice
    facts: dict[str, Any]  # the content of `inspection.json`: plain values alone


@dataclass(frozen=True)
class RealLatents:
    """Some samples of a split, and where they were read, in words."""

    raw: Tensor  # as stored, float32 [S, C or 2C, H, W]
    labels: Tensor  # int64 [S]
    sample_ids: tuple[int, ...]  # positions in the split
    manifest: Manifest
    source: str


def inspect_run(
    path: str, times: Sequence[float], count: int, weights: str, batch_size: int, data: str | None, device: str | None
) -> Inspection:
    """Look at a trained network at times in (0, 1), 0 being data; the command ``inspect`` explains the arguments.

    Raises:
        UserError: They do not fit the run or its data.
    """
    place = choose_device(device, 0)
    with machine_for(place, 0, 1), plain_float32(place):
        trained = load_trained(path, weights=weights, device=place)
        latents = read_latents(trained.config, trained.data, count, data)
        try:
            fresh = _fresh(trained)
            blocks = find_blocks(fresh, 'blocks' if hasattr(fresh, 'blocks') else None)[0]
            levels = [trained.model.objective.noise_level(time) for time in times]
            maps: dict[float, Tensor] = {}
            for time in times:
                calls = _calls(trained, latents, time, batch_size)
                maps[time] = token_similarity(trained.model.denoiser, calls, blocks=blocks)
        except ValueError as error:
            raise UserError(f'{path}: {error}') from None
    mean = torch.stack([*maps.values()]).mean(0)  # [L + 1, L + 1]
    routes = tuple(route.span(len(mean) - 1) for route in trained.config.routes())
    advice, run_name = propose_route(fresh, blocks), trained.config.run_name
    facts = {
        'run': run_name,
        'source': trained.source,
        'protocol': {
            'weights': trained.weights,
            'weights_digest': trained.digest,
            'batch': trained.batch,
            'data': latents.source,
            'samples': count,
            'sample_ids': 'at equal distances in the split',
            'labels': "the samples' own" if trained.model.num_classes else 'none',
            'times': list(times),
            'noise_levels': [float(f'{level:.6g}') for level in levels],
            'noise_seed': _SEED,
            'objective': trained.config.objective.name,
            'network': 'evaluation mode, dense, float32',
            'similarity': 'cosine of the same token at two depths, mean over tokens and samples',
        },
        'depths': 'depth 0 is behind the embedding, depth k behind block k - 1',
        'mean': _rounded(mean),
        'times': [{'time': time, 'mean': _rounded(similarity)} for time, similarity in maps.items()],
        'routes': [read_route(mean, *span) for span in routes],
        'proposal': {
            'span': advice.span and list(advice.span),
            'rule': advice.rule,
            'arguments': dict(advice.arguments),
            'reasons': list(advice.reasons),
        },
        'score': SCORE_RULE,
        'num_candidates': len(candidate_spans(len(mean) - 1)),
        'candidates': _suggestions(trained, maps, mean, [*([advice.span] if advice.span else []), *routes]),
        'notes': _notes(trained, mean, routes),
    }
    title = f'{run_name} at batch {trained.batch}, {trained.weights} weights'
    return Inspection(title, maps, mean, routes, advice, facts)


def _rounded(values: Tensor) -> list[list[float]]:
    return [[round(float(value), 6) for value in row] for row in values]


def _calls(trained: Trained, data: RealLatents, time: float, batch_size: int) -> Iterator[Callable[[], Tensor]]:
    """A call of the network for each batch. Noise is keyed by the sample, so the size of a batch changes nothing."""
    model, shape = trained.model, trained.model.latent_shape
    device = model.latent_scale.device
    for start in range(0, len(data.sample_ids), batch_size):
        part = slice(start, start + batch_size)
        random = KeyedRandom(_SEED, 0, data.sample_ids[part])
        batch = {RAW_LATENTS: data.raw[part].to(device)}
        if data.manifest.kind == 'moments':
            batch[POSTERIOR_NOISE] = random.normal('posterior', *shape).to(device)
        noise_BCHW = random.normal('noise', *shape).to(device)
        yield network_call(model, time, model.latents(batch), data.labels[part].to(device), noise_BCHW)


def network_call(
    model: LatentDiffusion, time: float, latents_BCHW: Tensor, labels_B: Tensor, noise_BCHW: Tensor
) -> Callable[[], Tensor]:
    """A call of the model's network on latents with noise as at ``time`` in (0, 1), where 0 is data."""
    # In float64, as the samplers do it: only the network itself computes in float32.
    noisy_BCHW, level = model.objective.noised(latents_BCHW.double(), noise_BCHW.double(), time)
    drift = model.objective.drift(model.denoiser, labels_B)  # type: ignore[arg-type]
    return functools.partial(drift, noisy_BCHW, torch.tensor(level, dtype=torch.float64))


def _fresh(trained: Trained) -> Any:
    """The run's backbone as it is before any algorithm, on the meta device."""
    with torch.device('meta'):
        return build_denoiser(trained.config, **trained.data.sizes)


def _suggestions(
    trained: Trained, maps: dict[float, Tensor], mean: Tensor, routes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """The best candidates and, if they are candidates, these routes; each with its rank and what it would save."""
    ranked = {(candidate.start, candidate.end): candidate for candidate in rank_routes(mean)}
    spans = list(ranked)
    rate = next(iter(trained.config.routes()), Route()).selection_rate
    sizes = trained.data.sizes
    dense = count_macs(_fresh(trained), sizes)
    suggestions = []
    for start, end in dict.fromkeys([*spans[:_SHOWN], *(span for span in routes if span in ranked)]):
        alike = [float(similarity[start, end + 1]) for similarity in maps.values()]
        suggestions.append(
            {
                **ranked[start, end]._asdict(),
                'rank': spans.index((start, end)) + 1,  # 1 is the best score
                'lowest_over_times': min(alike),
                'highest_over_times': max(alike),
                # Multiply-adds of a dense training step over those of a routed one.
                'ideal_step_ratio': dense / count_macs(_fresh(trained), sizes, {'tread': Tread(start, end, rate)}),
            }
        )
    return suggestions


def _notes(trained: Trained, mean: Tensor, routes: Sequence[tuple[int, int]]) -> list[str]:
    notes = [
        'these weights were trained with a route and have adapted to it: the map speaks for routes like that one; '
        'inspect the dense twin to see what the network does without'
        if routes
        else 'these weights were trained densely: training with a route would change them, and with them this map (the '
        'ends of a route become alike)'
    ]
    for start, end in routes:
        if (start, end) not in candidate_spans(len(mean) - 1):
            notes.append(f"the run's route, blocks {start} to {end}, does not keep to the guidelines: it has no rank")
    if float(mean.min()) > _FLAT:
        notes.append(
            f'the tokens hardly change from block to block (no similarity below {float(mean.min()):.3f}): the score '
            'says little more than how long a route is. Blocks of a fresh DiT are the identity: train longer first'
        )
    for name, part in trained.config.algorithms.items():
        reason = conflict(type(part.instance), Tread)
        if reason is not None:
            notes.append(
                f'the routes are for a run without algorithms.{name}, for TREAD cannot stand beside it: {reason}'
            )
    return notes


def read_latents(
    config: Config, facts: LatentFacts, num_samples: int, folder: str | os.PathLike[str] | None = None
) -> RealLatents:
    """Samples at equal distances in the split that a run evaluates on; that it trains on where it has no other.

    With ``folder``, of another data set (a split, or the folder around it) in place of the run's own.

    Raises:
        UserError: There are no such data, or fewer samples; they are damaged, or of another kind or shape.
    """
    if folder is None and config.data.name == 'digits':
        manifest, (images, labels) = digits_manifest('eval'), load_digits_arrays('eval')
        ids = list(_spread(num_samples, manifest, 'the eval split of the digits'))
        raw, labels_S = torch.from_numpy(images[ids]), torch.from_numpy(labels[ids])
        return RealLatents(raw, labels_S, tuple(ids), manifest, manifest.source)
    path = _split_folder(config, folder)
    try:
        manifest = Manifest.load(path)
        check_shards(path, manifest)
        check_agreement(
            manifest,
            channels=facts.channels,
            latent_size=(facts.latent_height, facts.latent_width),
            autoencoder=facts.autoencoder or 'pixels',
            autoencoder_hash=facts.autoencoder_hash,
            num_classes=facts.num_classes or None,  # without classes the network does not look at labels
        )
    except UserError as error:
        if folder is not None:
            raise
        remedy = 'Give a local copy of latents like those that the run was trained on: --data FOLDER'
        raise UserError(f'{error}\n{remedy}') from None
    ids = _spread(num_samples, manifest, str(path))
    from streaming import LocalDataset

    dataset = LocalDataset(str(path))
    try:
        rows = [dataset[index] for index in ids]
    except FileNotFoundError as error:
        raise UserError(
            f'{error.filename}: this shard is there in compressed form only; unpack the shards, or give --data with a '
            'data set without compression'
        ) from None
    raw = np.stack([np.asarray(row[LATENTS], np.float32) for row in rows])
    labels_S = torch.tensor([int(row[LABEL]) for row in rows], dtype=torch.int64)
    return RealLatents(torch.from_numpy(raw), labels_S, ids, manifest, f'{path} ({manifest.source})')


def _split_folder(config: Config, folder: str | os.PathLike[str] | None) -> Path:
    folders = split_folders(config)
    splits = [folders[split] for split in ('eval', 'train') if split in folders]
    if folder is None:
        return Path(config.data.local) / splits[0]
    path, inner = Path(folder), list(dict.fromkeys([*splits, 'val', 'eval', 'train']))
    for place in (path, *(path / name for name in inner)):
        if (place / MANIFEST_NAME).is_file():
            return place
    fault = f'holds no {MANIFEST_NAME}, nor does a split in it ({", ".join(inner)})'
    fault = fault if path.is_dir() else 'there is no such folder'
    raise UserError(f'--data {path}: {fault}; give the folder of a latents data set or of a split')


def _spread(num_samples: int, manifest: Manifest, source: str) -> tuple[int, ...]:
    """Positions at equal distances: also where the data lie in order of their classes they are of many."""
    available = manifest.num_samples
    if not 1 <= num_samples <= available:
        raise UserError(f'--count: {num_samples} is not between 1 and {available}, the samples of {source}')
    return tuple(index * available // num_samples for index in range(num_samples))
