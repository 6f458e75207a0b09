"""Token routing (TREAD, arXiv 2501.04765) in plain torch: usable in any training loop, with or without Composer.

The method is this loop, and all the rest of the room makes other people's models run it unedited::

    for index, block in enumerate(blocks):
        if index == start:
            kept_BK = sample_kept(B, N, selection_rate)    # another random subset for each sample
            full_BND, x = x, take_kept(x, kept_BK)         # [B, N, D] -> [B, K, D]
        x = block(x, condition)
        if index == end:
            x = put_back(full_BND, x, kept_BK)             # routed tokens return as they left

``Route`` says where (both ends inclusive), ``sample_kept`` draws which tokens, ``take_kept`` and ``put_back`` move
them, and ``apply_tread`` makes a model's own block list do it while training. ``tap_blocks`` hands out what blocks
returned, with or without a route. ``tread_composer.algorithms.Tread`` drives all this from a Composer ``Trainer``.

From the ground up: ``tokens`` and ``route``; ``arguments`` of a block's call; ``probe``, which tries whether a block
can be routed; ``passes``, one forward pass along one route; ``callables``, what a list yields for it; ``routing``, what
is armed for a batch; ``lists``, which route; ``surgery`` on them; ``finding``, which learns a model's settings.
"""

from tread_composer.routing.arguments import RoutingError, TokenArguments
from tread_composer.routing.finding import FoundSettings, find_settings
from tread_composer.routing.route import Route, check_routes
from tread_composer.routing.routing import Routing
from tread_composer.routing.surgery import apply_tread, find_blocks, remove_tread, routing_of, tap_blocks
from tread_composer.routing.taps import Tapped, Taps
from tread_composer.routing.tokens import keep_lowest, put_back, sample_kept, take_kept

__all__ = [
    'FoundSettings', 'Route', 'Routing', 'RoutingError', 'Tapped', 'Taps', 'TokenArguments', 'apply_tread',
    'check_routes', 'find_blocks', 'find_settings', 'keep_lowest', 'put_back', 'remove_tread', 'routing_of',
    'sample_kept', 'take_kept', 'tap_blocks',
]  # fmt: skip
