"""Where to place a route: guidelines, what a model's code tells, and how alike its tokens are from block to block.

In plain torch, for any model: ``propose_route`` looks at a model's code, ``token_similarity`` at its activations. The
command ``python -m tread_composer inspect`` does both for a trained run (``inspection``, ``output``, ``cli``).
"""

from typing import TYPE_CHECKING

from tread_composer.core.lazy import lazy_names

if TYPE_CHECKING:
    from tread_composer.advisor.architecture import RouteAdvice, format_advice, propose_route
    from tread_composer.advisor.placement import Placement, candidate_spans, recommended_route
    from tread_composer.advisor.ranking import Candidate, RouteReading, rank_routes, read_route
    from tread_composer.advisor.similarity import TokenSimilarity, token_similarity

__all__ = [
    'Candidate',
    'Placement',
    'RouteAdvice',
    'RouteReading',
    'TokenSimilarity',
    'candidate_spans',
    'format_advice',
    'propose_route',
    'rank_routes',
    'read_route',
    'recommended_route',
    'token_similarity',
]

# The words of `inspect` lie in this package, and `--help` is not to load torch for them.
_NAMES = {
    'architecture': ('RouteAdvice', 'format_advice', 'propose_route'),
    'placement': ('Placement', 'candidate_spans', 'recommended_route'),
    'ranking': ('Candidate', 'RouteReading', 'rank_routes', 'read_route'),
    'similarity': ('TokenSimilarity', 'token_similarity'),
}
__getattr__ = lazy_names(__name__, {name: f'{__name__}.{module}' for module, names in _NAMES.items() for name in names})
