"""What a similarity map says about routes. Evidence, not truth: no route has been trained to test the score.

A depth is a place between blocks: depth 0 is behind the embedding, depth k behind block k - 1. A route over the blocks
``start..end`` takes tokens from depth ``start`` and hands them back, unchanged, at depth ``end + 1``.
"""

from dataclasses import dataclass

from torch import Tensor

from tread_composer.advisor.placement import candidate_spans

__all__ = ['SCORE_RULE', 'Candidate', 'RouteReading', 'rank_routes', 'read_route']

SCORE_RULE = 'score = similarity of the tokens where the route starts and where it ends x share of the blocks on it'


@dataclass(frozen=True)
class Candidate:
    """A route that keeps to the guidelines, first and last block."""

    start: int
    end: int
    similarity: float  # mean cosine of the same token at depth `start` and at depth `end + 1`
    score: float  # similarity times the share of the model's blocks that are on the route


@dataclass(frozen=True)
class RouteReading:
    """What a map says about one route, in mean cosines of the same token at two depths."""

    start: int
    end: int
    ends: float  # depth `start`, where tokens leave, and depth `end + 1`, where they return
    # Depth `start` and the output of each block of the route. The paper's observation: with a route these become alike.
    outputs_mean: float
    outputs_lowest: float
    all_pairs: float  # of different depths of the model, to hold the others against


def rank_routes(similarity: Tensor) -> list[Candidate]:
    """All routes that keep to the guidelines (``candidate_spans``), best score first; the earlier start among equals.

    The score is ``similarity[start, end + 1] * (end - start + 1) / L`` of the map ``[L + 1, L + 1]`` of L blocks. Its
    two factors are what a route needs and what it is for: tokens that skip are handed to block ``end + 1`` as they were
    at ``start``, and the blocks between are the arithmetic that is saved.

    Raises:
        ValueError: The map is not square.
    """
    depth = _depth_of(similarity)
    candidates = []
    for start, end in candidate_spans(depth):
        alike = float(similarity[start, end + 1])
        candidates.append(Candidate(start, end, alike, alike * (end - start + 1) / depth))
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.start))


def read_route(similarity: Tensor, start: int, end: int) -> RouteReading:
    """What the map ``[L + 1, L + 1]`` of L blocks says about the route from block ``start`` to ``end``, inclusive.

    Raises:
        ValueError: The map is not square, or the route does not lie within it.
    """
    depth = _depth_of(similarity)
    if not 0 <= start <= end < depth:
        raise ValueError(f'the route from block {start} to block {end} does not lie within {depth} blocks')
    outputs = similarity[start, start + 1 : end + 2]  # row of depth start: behind each block of the route
    off_diagonal = similarity.sum() - similarity.diagonal().sum()
    return RouteReading(
        start=start,
        end=end,
        ends=float(outputs[-1]),
        outputs_mean=float(outputs.mean()),
        outputs_lowest=float(outputs.min()),
        all_pairs=float(off_diagonal / (depth * (depth + 1))),
    )


def _depth_of(similarity: Tensor) -> int:
    if similarity.dim() != 2 or similarity.shape[0] != similarity.shape[1] or len(similarity) < 2:
        raise ValueError(f'a similarity map is square, one row for each depth; got {list(similarity.shape)}')
    return len(similarity) - 1
