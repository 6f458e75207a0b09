"""A trained network looked at from inside: similarity maps on real latents, and what they and the guidelines say.

Legend: S samples, B samples of a batch, L blocks.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tread_composer.advisor.latents import RealLatents, read_latents
from tread_composer.advisor.placement import (
    SCORE_RULE,
    RouteAdvice,
    candidate_spans,
    propose_route,
    rank_routes,
    read_route,
)
from tread_composer.advisor.request import InspectRequest
from tread_composer.advisor.similarity import TokenSimilarity, token_similarity
from tread_composer.algorithms.rules import conflict
from tread_composer.algorithms.tread import Tread
from tread_composer.builders.cost import count_macs
from tread_composer.builders.model import build_denoiser
from tread_composer.core.batch import POSTERIOR_NOISE, RAW_LATENTS
from tread_composer.core.errors import UserError
from tread_composer.core.inference import plain_float32
from tread_composer.core.randomness import KeyedRandom
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
    maps: dict[float, TokenSimilarity]  # by time
    mean: Tensor  # over the times, [L + 1, L + 1]
    routes: tuple[tuple[int, int], ...]  # the run's own, first and last block
    advice: RouteAdvice
    facts: dict[str, Any]  # the content of `inspection.json`: plain values alone


def inspect_run(request: InspectRequest) -> Inspection:
    """Look at a trained network.

    Raises:
        UserError: The request does not fit the run or its data.
    """
    device = choose_device(request.device, 0)
    with machine_for(device, 0, 1), plain_float32(device):
        trained = load_trained(request.path, weights=request.weights, device=device)
        data = read_latents(trained.config, trained.data, request.count, request.data)
        try:
            fresh = _fresh(trained)
            blocks = find_blocks(fresh, 'blocks' if hasattr(fresh, 'blocks') else None)[0]
            levels = [trained.model.objective.noise_level(time) for time in request.times]
            maps: dict[float, TokenSimilarity] = {}
            for time in request.times:
                calls = _calls(trained, data, time, request.batch_size)
                maps[time] = token_similarity(trained.model.denoiser, calls, blocks=blocks)
        except ValueError as error:
            raise UserError(f'{request.path}: {error}') from None
    mean = torch.stack([similarity.mean for similarity in maps.values()]).mean(0)  # [L + 1, L + 1]
    routes = tuple(route.span(len(mean) - 1) for route in trained.config.routes())
    advice, run_name = propose_route(fresh, blocks), trained.config.run_name
    facts = {
        'run': run_name,
        'source': trained.source,
        'protocol': {
            'weights': trained.weights,
            'weights_digest': trained.digest,
            'batch': trained.batch,
            'data': data.source,
            'samples': request.count,
            'sample_ids': 'at equal distances in the split',
            'labels': "the samples' own" if trained.model.num_classes else 'none',
            'times': list(request.times),
            'noise_levels': [float(f'{level:.6g}') for level in levels],
            'noise_seed': _SEED,
            'objective': trained.config.objective.name,
            'network': 'evaluation mode, dense, float32',
            'similarity': 'cosine of the same token at two depths, mean over tokens and samples',
        },
        'depths': 'depth 0 is behind the embedding, depth k behind block k - 1',
        'mean': _rounded(mean),
        'times': [
            {'time': time, 'mean': _rounded(entry.mean), 'std_over_samples': _rounded(entry.std)}
            for time, entry in maps.items()
        ],
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
    facts = trained.data
    with torch.device('meta'):
        return build_denoiser(
            trained.config, channels=facts.channels, latent_size=facts.latent_height, num_classes=facts.num_classes
        )


def _suggestions(
    trained: Trained, maps: dict[float, TokenSimilarity], mean: Tensor, routes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """The best candidates and, if they are candidates, these routes; each with its rank and what it would save."""
    ranked = {(candidate.start, candidate.end): candidate for candidate in rank_routes(mean)}
    spans = list(ranked)
    facts = {'channels': trained.data.channels, 'latent_size': trained.data.latent_height}
    rate = next(iter(trained.config.routes()), Route()).selection_rate
    dense = count_macs(_fresh(trained), facts)
    suggestions = []
    for start, end in dict.fromkeys([*spans[:_SHOWN], *(span for span in routes if span in ranked)]):
        alike = [float(similarity.mean[start, end + 1]) for similarity in maps.values()]
        suggestions.append(
            {
                **ranked[start, end]._asdict(),
                'rank': spans.index((start, end)) + 1,  # 1 is the best score
                'lowest_over_times': min(alike),
                'highest_over_times': max(alike),
                # Multiply-adds of a dense training step over those of a routed one.
                'ideal_step_ratio': dense / count_macs(_fresh(trained), facts, {'tread': Tread(start, end, rate)}),
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
