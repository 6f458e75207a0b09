"""Where to place a route: guidelines, and how alike a model's tokens are from block to block.

In plain torch, for any model: ``propose_route`` looks at its list of blocks, ``token_similarity`` at its activations.
The command ``python -m tread_composer inspect`` does both for a trained run (``inspection``, ``findings``).
"""

from tread_composer.advisor.placement import format_advice, propose_route
from tread_composer.advisor.similarity import token_similarity

__all__ = ['format_advice', 'propose_route', 'token_similarity']
