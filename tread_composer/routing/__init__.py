"""Token routing (TREAD, arXiv 2501.04765) in plain torch: usable in any training loop, with or without Composer.

``Route`` says where, ``sample_kept`` draws which tokens, ``take_kept`` and ``put_back`` move them, and
``apply_tread`` makes a model's own block list do it. ``tread_composer.algorithms.Tread`` drives all this from a
Composer ``Trainer``.
"""

from tread_composer.routing.arguments import RoutingError, TokenArguments
from tread_composer.routing.blocks import apply_tread, find_blocks, routing_of
from tread_composer.routing.route import Route, check_routes
from tread_composer.routing.routing import Routing
from tread_composer.routing.tokens import keep_lowest, put_back, sample_kept, take_kept

__all__ = [
    'Route',
    'Routing',
    'RoutingError',
    'TokenArguments',
    'apply_tread',
    'check_routes',
    'find_blocks',
    'keep_lowest',
    'put_back',
    'routing_of',
    'sample_kept',
    'take_kept',
]
