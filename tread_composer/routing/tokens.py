"""Drawing the kept tokens, taking them out of a sequence and putting them back.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    'AlwaysKeep',
    'both_ends',
    'count_kept',
    'keep_lowest',
    'put_back',
    'sample_kept',
    'take_along',
    'take_kept',
]

AlwaysKeep = int | Sequence[int]
"""Number of leading tokens that never skip, or a pair: of leading and of trailing ones."""


def both_ends(always_keep: AlwaysKeep) -> tuple[int, int]:
    """How many leading and how many trailing tokens never skip.

    Raises:
        ValueError: It is neither a count nor a pair of counts.
    """
    pair = (always_keep, 0) if isinstance(always_keep, int) else tuple(always_keep)
    if len(pair) != 2 or not all(type(count) is int and count >= 0 for count in pair):
        raise ValueError(
            f'always_keep: {always_keep!r} is not a number of tokens; give 0 or more, or [leading, trailing] ones'
        )
    return pair


def count_kept(num_tokens: int, selection_rate: float, always_keep: AlwaysKeep = 0) -> int:
    """How many of ``num_tokens`` stay on the blocks: ``always_keep + free - int(free * selection_rate)``.

    ``free = num_tokens - always_keep``: the rate counts only tokens that may skip.

    Raises:
        ValueError: There are not even ``always_keep`` tokens.
    """
    fixed = sum(both_ends(always_keep))
    free = num_tokens - fixed
    if free < 0:
        raise ValueError(f'always_keep: {fixed} tokens cannot stay in a sequence of {num_tokens}')
    return fixed + free - int(free * selection_rate)


def keep_lowest(scores_BN: Tensor, num_kept: int, *, always_keep: AlwaysKeep = 0) -> Tensor:
    """Ids ``[B, K]`` (int64) of each sample's ``num_kept`` lowest scores, ascending.

    The leading and trailing ``always_keep`` positions are among them whatever their scores are.

    Ascending order changes nothing for attention and MLPs, keeps the raster order that scanning blocks need, and
    makes a route at rate 0 the identity to the bit.

    Raises:
        ValueError: ``num_kept`` is not between 1 (or ``always_keep``) and N.
    """
    num_tokens, (leading, trailing) = scores_BN.shape[1], both_ends(always_keep)
    least = max(1, leading + trailing)
    if not least <= num_kept <= num_tokens:
        raise ValueError(f'cannot keep {num_kept} of {num_tokens} tokens; keep between {least} and all of them')
    if leading or trailing:
        # -inf sorts before every score, so the fixed ends are always among the lowest.
        lowest = scores_BN.new_full((len(scores_BN), leading + trailing), -torch.inf)
        free = scores_BN[:, leading : num_tokens - trailing]
        scores_BN = torch.cat([lowest[:, :leading], free, lowest[:, leading:]], dim=1)
    # [B, N] -> ids of the K lowest [B, K] -> ascending.
    return scores_BN.argsort(dim=1)[:, :num_kept].sort(dim=1).values


def sample_kept(
    batch_size: int,
    num_tokens: int,
    selection_rate: float,
    *,
    always_keep: AlwaysKeep = 0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw the ids of the tokens that stay on the blocks: ``[B, K]`` int64, ascending, another set for each sample.

    Uniform without replacement (TREAD, arXiv 2501.04765); K is ``count_kept(num_tokens, selection_rate, always_keep)``.

    Args:
        batch_size: B.
        num_tokens: N.
        selection_rate: Share of the tokens that skip the blocks, out of those that may.
        always_keep: Number of leading tokens (a class token, text) that never skip, or of leading and trailing ones.
        generator: Source of randomness, on ``device``; the global one if None.
        device: Where the ids are made.
    """
    # The K lowest of N independent uniform numbers are a uniform subset without replacement.
    scores_BN = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    return keep_lowest(scores_BN, count_kept(num_tokens, selection_rate, always_keep), always_keep=always_keep)


def take_kept(x_BND: Tensor, kept_BK: Tensor) -> Tensor:
    """The kept tokens of a sequence: ``[B, N, ...] -> [B, K, ...]``, in the order of ``kept_BK``."""
    return x_BND.gather(1, _like_trailing(kept_BK, x_BND))  # differentiable: routed tokens get no gradient here


def take_along(value: Tensor, kept: Tensor, dim: int, leading: int = 0, trailing: int = 0) -> Tensor:
    """The kept tokens' entries of a tensor whose dimension ``dim`` counts tokens.

    Args:
        value: With samples in dimension 0 (or 1, for all of them), or for all samples alike.
        kept: Ids ``[B, K]``, or ``[1, K]`` for all samples.
        dim: Not negative; 0 only with ids for all samples.
        leading: So many entries precede those of the tokens and stay.
        trailing: So many entries follow those of the tokens and stay.
    """
    if leading or trailing:
        # Entries beside the tokens' stay: the ids move behind the leading ones.
        places = torch.arange(value.shape[dim], device=kept.device).expand(len(kept), -1)
        kept = torch.cat([places[:, :leading], kept + leading, places[:, value.shape[dim] - trailing :]], dim=1)
    if len(kept) == 1:  # one route for all samples: works in dimension 0 too
        return value.index_select(dim, kept[0])
    value = value.expand(len(kept), *value.shape[1:])
    # Ids [B, 1, .., K, .., 1], K at ``dim``, spread over all other dimensions.
    index = kept.view(len(kept), *(1,) * (dim - 1), -1, *(1,) * (value.dim() - dim - 1))
    return value.gather(dim, index.expand(*value.shape[:dim], kept.shape[1], *value.shape[dim + 1 :]))


def put_back(full_BND: Tensor, processed_BKD: Tensor, kept_BK: Tensor) -> Tensor:
    """A copy of ``full_BND`` in which the kept tokens are replaced by their processed selves.

    Where the two differ in dtype (a block under autocast may return another one than the stored sequence has) the
    result has the wider one: ``scatter`` itself would refuse.

    Raises:
        ValueError: There are more or fewer processed tokens than ids. ``scatter`` would take the first K of more.
    """
    if processed_BKD.shape[1] != kept_BK.shape[1]:
        raise ValueError(
            f'put_back: {processed_BKD.shape[1]} tokens came off the route and {kept_BK.shape[1]} went onto it; '
            'something between adds or drops tokens'
        )
    # Out of place: the full sequence belongs to the autograd graph, and may be read again by a recomputation.
    dtype = torch.promote_types(full_BND.dtype, processed_BKD.dtype)
    return full_BND.to(dtype).scatter(1, _like_trailing(kept_BK, processed_BKD), processed_BKD.to(dtype))


def _like_trailing(kept_BK: Tensor, x: Tensor) -> Tensor:
    """Ids expanded over the dimensions of ``x`` behind batch and token."""
    # [B, K] -> [B, K, 1, ...] -> [B, K, ...] without a copy.
    return kept_BK.view(*kept_BK.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
