"""Drawing the kept tokens, taking them out of a sequence and putting them back.

Shapes: B samples, N tokens, K kept tokens, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ['AlwaysKeep', 'both_ends', 'count_kept', 'keep_lowest', 'put_back', 'sample_kept', 'take_along', 'take_kept']

AlwaysKeep = int | Sequence[int]
"""Number of leading tokens that never skip, or a pair: of leading and of trailing ones."""


def both_ends(always_keep: AlwaysKeep) -> tuple[int, int]:
    """How many leading and how many trailing tokens never skip; ``ValueError`` for what says neither."""
    is_list = isinstance(always_keep, Sequence)
    pair: tuple[int, ...] = tuple(always_keep) if is_list else (always_keep, 0)  # type: ignore[arg-type, assignment]
    if len(pair) != 2 or not all(type(count) is int and count >= 0 for count in pair):
        raise ValueError(
            f'always_keep: {always_keep!r} is not a number of tokens; give 0 or more, or [leading, trailing] ones'
        )
    return pair


def count_kept(num_tokens: int, selection_rate: float, always_keep: AlwaysKeep = 0) -> int:
    """How many tokens stay: ``always_keep + free - int(free * selection_rate)``; ``ValueError`` for too few."""
    fixed = sum(both_ends(always_keep))
    free = num_tokens - fixed  # the rate is a share of the tokens that may skip
    if free < 0:
        raise ValueError(f'always_keep: {fixed} tokens cannot stay in a sequence of {num_tokens}')
    return fixed + free - int(free * selection_rate)


def keep_lowest(scores_BN: Tensor, num_kept: int, *, always_keep: AlwaysKeep = 0) -> Tensor:
    """Ids ``[B, K]`` (int64) of each sample's ``num_kept`` lowest scores ``[B, N]``, ascending.

    The leading and trailing ``always_keep`` positions are among them whatever their scores are. Ascending order changes
    nothing for attention and MLPs, keeps the raster order that scanning blocks need, and makes a route at rate 0 the
    identity to the bit.

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
    ``generator`` is on ``device``; the global one if None.
    """
    # The K lowest of N independent uniform numbers are a uniform subset without replacement.
    scores_BN = torch.rand(batch_size, num_tokens, generator=generator, device=device)
    return keep_lowest(scores_BN, count_kept(num_tokens, selection_rate, always_keep), always_keep=always_keep)


def take_kept(x_BND: Tensor, kept_BK: Tensor) -> Tensor:
    """The kept tokens of a sequence: ``[B, N, ...] -> [B, K, ...]``, in the order of ``kept_BK``."""
    return x_BND.gather(1, _like_trailing(kept_BK, x_BND))  # differentiable: routed tokens get no gradient here


def take_along(value: Tensor, kept: Tensor, dim: int, leading: int = 0, trailing: int = 0) -> Tensor:
    """The entries of the kept tokens, ids ``[B, K]``, of a tensor whose dimension ``dim`` >= 0 counts tokens.

    ``value`` has samples in dimension 0 (size B, or 1 for all of them); with ids ``[1, K]`` it may have none. So many
    ``leading`` and ``trailing`` entries around those of the tokens stay.
    """
    if leading or trailing:
        kept = with_ends(kept + leading, value.shape[dim], leading, trailing)
    if len(kept) == 1:  # one route for all samples: works in dimension 0 too
        return value.index_select(dim, kept[0])
    value = value.expand(len(kept), *value.shape[1:])
    # Ids [B, 1, .., K, .., 1], K at ``dim``, spread over all other dimensions.
    index = kept.view(len(kept), *(1,) * (dim - 1), -1, *(1,) * (value.dim() - dim - 1))
    return value.gather(dim, index.expand(*value.shape[:dim], kept.shape[1], *value.shape[dim + 1 :]))


def with_ends(ids: Tensor, length: int, leading: int, trailing: int) -> Tensor:
    """Ids ``[B, K]`` between the first ``leading`` and the last ``trailing`` ones of a sequence of this length."""
    places = torch.arange(length, device=ids.device).expand(len(ids), -1)  # [B, length] without a copy
    return torch.cat([places[:, :leading], ids, places[:, length - trailing :]], dim=1)


def put_back(full_BND: Tensor, processed_BKD: Tensor, kept_BK: Tensor) -> Tensor:
    """A copy of ``full_BND`` in which the kept tokens are replaced by their processed selves, in the wider dtype.

    Raises:
        ValueError: There are more or fewer processed tokens than ids.
    """
    if processed_BKD.shape[1] != kept_BK.shape[1]:  # of more tokens, scatter would silently take the first K
        raise ValueError(
            f'put_back: {processed_BKD.shape[1]} tokens came off the route and {kept_BK.shape[1]} went onto it; '
            'something between adds or drops tokens'
        )
    # Out of place: the full sequence belongs to the autograd graph, and may be read again by a recomputation.
    # A block under autocast may return another dtype than the stored sequence has, which scatter would refuse.
    dtype = torch.promote_types(full_BND.dtype, processed_BKD.dtype)
    return full_BND.to(dtype).scatter(1, _like_trailing(kept_BK, processed_BKD), processed_BKD.to(dtype))


def _like_trailing(kept_BK: Tensor, x: Tensor) -> Tensor:
    # [B, K] -> [B, K, 1, ...] -> [B, K, ...] without a copy.
    return kept_BK.view(*kept_BK.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
