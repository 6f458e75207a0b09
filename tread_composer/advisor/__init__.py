"""Where to place a route: guidelines, what a model's code tells, and how alike its tokens are from block to block.

In plain torch, for any model: ``propose_route`` looks at a model's code, ``token_similarity`` at its activations. The
command ``python -m tread_composer inspect`` does both for a trained run (``inspection``, ``output``).
"""

from typing import TYPE_CHECKING

from tread_composer.core.lazy import lazy_names

if TYPE_CHECKING:
    from tread_composer.advisor.placement import (
        RouteAdvice,
        candidate_spans,
        format_advice,
        propose_route,
        recommended_route,
    )
    from tread_composer.advisor.ranking import Candidate, RouteReading, rank_routes, read_route
    from tread_composer.advisor.similarity import TokenSimilarity, token_similarity

__all__ = [
    'Candidate',
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

_HOMES = {
    'placement': ('RouteAdvice', 'candidate_spans', 'format_advice', 'propose_route', 'recommended_route'),
    'ranking': ('Candidate', 'RouteReading', 'rank_routes', 'read_route'),
    'similarity': ('TokenSimilarity', 'token_similarity'),
}
# A command's words are checked before torch is loaded, and `inspect` has its own here.
__getattr__ = lazy_names(__name__, {name: f'{__name__}.{module}' for module, names in _HOMES.items() for name in names})
