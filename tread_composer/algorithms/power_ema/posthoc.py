"""An average of the weights whose length is chosen after training, put together from the snapshots of ``PowerEMA``.

After batch T, the average of exponent g weighs the weights of batch t with the profile ``(g + 1) t**g / T**(g + 1)``.
Averages are linear in the weights, so the wanted one is the sum of stored ones whose profiles come closest to its own.
How close they come is known exactly, before any weights are read.

Source: Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models (EDM2), arXiv 2312.02696,
section 3.2 and appendix C.3. Ours: the coefficients sum to 1, so that weights that do not move come out as they are.
Shapes: S stored averages.
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from tread_composer.algorithms.power_ema.snapshots import Snapshot, list_snapshots, power_exponent, read_snapshot
from tread_composer.core.errors import UserError

__all__ = ['LARGEST_RESIDUAL', 'Average', 'Fit', 'fit_profile', 'inner_products', 'reconstruct']

LARGEST_RESIDUAL = 0.05
"""How far the profile may be from the wanted one, as a share of the latter's norm, unless one allows for more."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """How to put an average together.

    The residual is ``|profile - wanted| / |wanted|`` in the L2 norm over training time. The weights err by at most it,
    times ``|wanted|``, times the norm of how far the weights in training were from any fixed point.
    """

    coefficients_S: np.ndarray  # one for each stored average; they sum to 1
    residual: float


@dataclasses.dataclass(frozen=True)
class Average:
    """An average that was put together: float32 tensors under the names of the snapshots, and plain facts.

    Facts: ``sigma_rel``, ``gamma``, ``batch``, ``residual``, ``snapshots`` (how many were used), ``first`` and ``last``
    (their batches), ``unused`` (files of continuations that were given up) and ``run``.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def inner_products(
    exponents_a: ArrayLike, batches_a: ArrayLike, exponents_b: ArrayLike, batches_b: ArrayLike
) -> np.ndarray:
    """Integrals of the products of two profiles over training time, in float64; arguments are broadcast.

    With ``a`` the one that ends first: ``(ga + 1)(gb + 1) / (ga + gb + 1) * (Ta / Tb)**gb / Tb``.
    """
    gammas_a, ends_a, gammas_b, ends_b = np.broadcast_arrays(
        *(np.asarray(values, np.float64) for values in (exponents_a, batches_a, exponents_b, batches_b))
    )
    later = np.maximum(ends_a, ends_b)
    exponent_of_later = np.where(ends_a < ends_b, gammas_b, gammas_a)
    overlap = (np.minimum(ends_a, ends_b) / later) ** exponent_of_later
    return (gammas_a + 1) * (gammas_b + 1) / (gammas_a + gammas_b + 1) * overlap / later


def fit_profile(exponents: Sequence[float], batches: Sequence[int], exponent: float, batch: int) -> Fit:
    """The sum of stored profiles, with coefficients that sum to 1, that is closest to the wanted one.

    ``exponents`` and ``batches`` of the ends are ``[S]``, of the stored averages; the wanted one has one of each.
    """
    exponents_S, batches_S = np.asarray(exponents, np.float64), np.asarray(batches, np.float64)
    same_S = (exponents_S == exponent) & (batches_S == batch)
    if same_S.any():  # it is stored: to the bit, then
        return Fit(np.eye(len(same_S))[same_S.argmax()], 0.0)
    gram_SS = inner_products(exponents_S[:, None], batches_S[:, None], exponents_S, batches_S)
    with_wanted_S = inner_products(exponents_S, batches_S, exponent, batch)
    # Norms span orders of magnitude from the first snapshot to the last: solved for profiles of norm 1.
    norms_S = np.sqrt(np.diag(gram_SS))
    gram_SS, with_wanted_S = gram_SS / np.outer(norms_S, norms_S), with_wanted_S / norms_S
    sums_S = 1 / norms_S  # what a profile of norm 1 adds up to
    scale = 1 / np.abs(sums_S).max()
    border_S = sums_S * scale
    # Lagrange's condition for the minimum of |profile - wanted|^2 on the plane where the coefficients sum to 1.
    system = np.block([[gram_SS, border_S[:, None]], [border_S[None, :], np.zeros((1, 1))]])
    solution_S = np.linalg.lstsq(system, np.append(with_wanted_S, scale), rcond=None)[0][:-1]
    target_products = inner_products(exponent, batch, exponent, batch)
    squared = solution_S @ gram_SS @ solution_S - 2 * solution_S @ with_wanted_S + target_products
    return Fit(solution_S / norms_S, float(np.sqrt(max(squared / target_products, 0.0))))


def reconstruct(
    folder: str | os.PathLike[str], width: float, *, newest: str | None = None, allow_inexact: bool = False
) -> Average:
    """The average of this width (``sigma_rel``), from the snapshots in a run's folder.

    Args:
        folder: Where the snapshots are.
        width: Relative standard deviation over the run so far.
        newest: Digest of the snapshot that the average ends with, as the checkpoint of a run knows it; by default the
            newest. Later ones, and those of continuations that were given up, are not used.
        allow_inexact: Take what comes closest even if it is not close, or if snapshots are missing.

    Raises:
        UserError: The snapshots are of several runs, missing or damaged, or cannot be put together to what is wanted.
    """
    exponent, snapshots = power_exponent(width), list_snapshots(folder)
    chain = _chain(snapshots, newest, str(folder), allow_inexact)
    begin, end = chain[0][1], chain[-1][1]
    gammas = [gamma for _, snapshot in chain for gamma in snapshot.gammas]
    ends = [snapshot.batch for _, snapshot in chain for _ in snapshot.gammas]
    fit = fit_profile(gammas, ends, exponent, end.batch)
    if fit.residual > LARGEST_RESIDUAL and not allow_inexact:
        widths = ', '.join(f'{width:g}' for width in end.widths)
        raise UserError(
            f'{folder}: {len(chain)} snapshots (widths {widths}; last of batch {end.batch}) come only within '
            f'{fit.residual:.1%} of an average of width {width:g} at batch {end.batch}, and more than '
            f'{LARGEST_RESIDUAL:.0%} is refused. Take a width nearer to those, write snapshots more often, or take it '
            f'all the same: --allow-inexact'
        )
    facts = {
        'sigma_rel': width, 'gamma': exponent, 'batch': end.batch, 'residual': fit.residual, 'snapshots': len(chain),
        'first': begin.batch, 'last': end.batch, 'unused': len(snapshots) - len(chain), 'run': end.run,
    }  # fmt: skip
    return Average(_summed(chain, fit.coefficients_S), facts)


def _chain(
    snapshots: list[tuple[Path, Snapshot]], newest: str | None, folder: str, allow_gap: bool
) -> list[tuple[Path, Snapshot]]:
    """The snapshots of one continuation by ascending batch, each of which names the one before it."""
    if not snapshots:
        raise UserError(f'{folder}: holds no snapshots; train with algorithms.power_ema, or copy them there')
    runs = sorted({snapshot.run for _, snapshot in snapshots})
    if len(runs) > 1:
        raise UserError(f'{folder}: holds snapshots of several runs ({"; ".join(runs)}); leave those of one')
    by_digest = {snapshot.digest: (path, snapshot) for path, snapshot in snapshots}
    digest, chain = snapshots[-1][1].digest if newest is None else newest, []
    while digest is not None:
        if digest not in by_digest:
            if chain and allow_gap:
                break
            place = f'before that of batch {chain[-1][1].batch}' if chain else 'that the checkpoint names as its last'
            raise UserError(
                f'{folder}: the snapshot {place} is missing ({digest[:19]}...); copy it there'
                + (', or do without: --allow-inexact' if chain else '')
            )
        chain.append(by_digest[digest])
        digest = chain[-1][1].previous
    return chain[::-1]


def _summed(chain: list[tuple[Path, Snapshot]], coefficients_S: np.ndarray) -> dict[str, Tensor]:
    """The weighted sum in float64, one file after the other; what counts nothing is not read."""
    total: dict[str, Tensor] = {}
    coefficients = iter(coefficients_S.tolist())
    for path, snapshot in chain:
        shares = {width: next(coefficients) for width in snapshot.widths}
        for width, name, tensor in read_snapshot(path) if any(shares.values()) else ():
            if shares[width] and name not in total:
                total[name] = torch.zeros(tensor.shape, dtype=torch.float64)
            if shares[width]:
                total[name].add_(tensor, alpha=shares[width])
    return {name: value.float() for name, value in total.items()}
