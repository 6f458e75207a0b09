"""Drawing the kept tokens, taking them out of a sequence and putting them back.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

import torch
from torch import Tensor

__all__ = ['keep_lowest', 'put_back', 'sample_kept', 'take_kept']


def keep_lowest(scores_BN: Tensor, num_kept: int) -> Tensor:
    """Ids ``[B, K]`` (int64) of each sample's ``num_kept`` lowest scores, ascending.

    Ascending order changes nothing for attention and MLPs, keeps the raster order that scanning blocks need, and
    makes a route at rate 0 the identity to the bit.

    Raises:
        ValueError: ``num_kept`` is not between 1 and N.
    """
    if not 1 <= num_kept <= scores_BN.shape[1]:
        raise ValueError(f'cannot keep {num_kept} of {scores_BN.shape[1]} tokens; keep between 1 and all of them')
    return scores_BN.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def sample_kept(
    batch_size: int,
    num_tokens: int,
    selection_rate: float,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the ids of the tokens that stay on the blocks: ``[B, K]`` int64, ascending, another set for each sample.

    Uniform without replacement, ``K = num_tokens - int(num_tokens * selection_rate)`` (TREAD, arXiv 2501.04765).

    Args:
        batch_size: B.
        num_tokens: N.
        selection_rate: Share of the tokens that skip the blocks.
        generator: Source of randomness, on ``device``; the global one if None.
        device: Where the ids are made.
    """
    num_kept = num_tokens - int(num_tokens * selection_rate)
    return keep_lowest(torch.rand(batch_size, num_tokens, generator=generator, device=device), num_kept)


def take_kept(x_BND: Tensor, kept_BK: Tensor) -> Tensor:
    """The kept tokens of a sequence: ``[B, N, ...] -> [B, K, ...]``, in the order of ``kept_BK``."""
    return x_BND.gather(1, _like_trailing(kept_BK, x_BND))


def put_back(full_BND: Tensor, processed_BKD: Tensor, kept_BK: Tensor) -> Tensor:
    """A copy of ``full_BND`` in which the kept tokens are replaced by their processed selves.

    Where the two differ in dtype (a block under autocast may return another one than the stored sequence has) the
    result has the wider one: ``scatter`` itself would refuse.
    """
    dtype = torch.promote_types(full_BND.dtype, processed_BKD.dtype)
    return full_BND.to(dtype).scatter(1, _like_trailing(kept_BK, processed_BKD), processed_BKD.to(dtype))


def _like_trailing(kept_BK: Tensor, x: Tensor) -> Tensor:
    """Ids expanded over the dimensions of ``x`` behind batch and token."""
    return kept_BK.view(*kept_BK.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
