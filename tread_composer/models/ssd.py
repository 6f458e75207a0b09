"""Bidirectional Mamba-2 mixing of tokens (state-space duality, SSD: arXiv 2405.21060) in plain torch.

A head of one scan keeps a state of P x S numbers, which each token first lets decay and then adds to (equations 1, 2)::

    h_i = exp(dt_i A) h_(i-1) + dt_i x_i B_i^T        y_i = h_i C_i

The same as one matrix (section 3): ``y = M x`` with ``M_ij = C_i . B_j  exp(dt_(j+1) A + ... + dt_i A)  dt_j`` for
``j <= i``. The matrix is what runs here: for some hundred tokens it is a few matrix products on any device. Longer
sequences are cut into chunks (section 6): the matrix within a chunk, the state between them.

Shapes: B samples, N tokens, D width, E = H P inner width, H heads, P width of a head, S state size, 2 directions (along
the tokens, against them), R scans (both directions of all samples), Q tokens of a chunk.
"""

import importlib
import importlib.util
import math
from typing import Literal

import torch
from torch import Tensor, nn

from tread_composer.core.errors import UserError

__all__ = ['BidirectionalSSD', 'bidirectional_ssd', 'fused_bidirectional_ssd', 'fused_refusal']

_DT_RANGE = 1e-3, 1e-1  # Mamba-2's start: dt is spread evenly over its logarithm, -A evenly over its values
_DECAY_RANGE = 1.0, 16.0


def bidirectional_ssd(
    x_BNHP: Tensor, dt_BN2H: Tensor, A_2H: Tensor, B_BN2S: Tensor, C_BN2S: Tensor, *, chunk_size: int
) -> Tensor:
    """The sum of a scan along the tokens and one against them, ``[B, N, H, P]`` in the dtype of x.

    Each direction has its own step sizes ``dt`` >= 0 and rates ``A`` < 0, in float32 or better, and its own ``B``,
    ``C``, the same for all heads; a token's own contribution is in both. A decay is the exponential of a sum of numbers
    below 0: never above 1. Sequences of at most ``chunk_size`` tokens, Q, are one matrix.
    """
    # R = 2 B scans: along the tokens for all samples, then against them. a = dt A, the logarithm of a decay.
    a_RNH, dt_RNH, B_RNS, C_RNS = (_both_ways(value) for value in (dt_BN2H * A_2H, dt_BN2H, B_BN2S, C_BN2S))
    if x_BNHP.shape[1] <= chunk_size:
        # The two triangles are one matrix, which is multiplied once.
        ahead_BHNN, back_BHNN = _mixing_matrix(a_RNH, dt_RNH, B_RNS, C_RNS).chunk(2)
        return _product(ahead_BHNN + back_BHNN.flip(2, 3), x_BNHP)
    x_RNHP = torch.cat([x_BNHP, x_BNHP.flip(1)])  # the scan against the tokens reads them last to first
    ahead, back = _in_chunks(x_RNHP, a_RNH, dt_RNH, B_RNS, C_RNS, chunk_size).chunk(2)
    return ahead + back.flip(1)


def _both_ways(value_BN2K: Tensor) -> Tensor:
    """``[2 B, N, K]``: what belongs to the scans along the tokens, then that of the others, last token first."""
    return torch.cat([value_BN2K[:, :, 0], value_BN2K[:, :, 1].flip(1)])


def _mixing_matrix(a_RNH: Tensor, dt_RNH: Tensor, B_RNS: Tensor, C_RNS: Tensor) -> Tensor:
    """M ``[R, H, N, N]``, lower triangular; ``a = dt A`` are the logarithms of the decays."""
    scores_RNN = C_RNS @ B_RNS.transpose(1, 2)  # C_i . B_j, for all heads the same
    return scores_RNN.unsqueeze(1) * _decays(a_RNH.transpose(1, 2)) * dt_RNH.transpose(1, 2).unsqueeze(2)


def _decays(a_RHN: Tensor) -> Tensor:
    """L ``[R, H, N, N]``: ``exp(a_(j+1) + ... + a_i)`` at row i and column j <= i, 0 above.

    Each sum is added up for itself: two running sums that grow with N would leave little in their difference.
    """
    num_tokens = a_RHN.shape[2]
    # Column j of row i adds up a_(j+1) .. a_i: what is on or above the diagonal does not count.
    not_below = torch.ones(num_tokens, num_tokens, dtype=torch.bool, device=a_RHN.device).triu()
    a_RHNN = a_RHN.unsqueeze(3).expand(-1, -1, -1, num_tokens).masked_fill(not_below, 0)
    return a_RHNN.cumsum(2).exp().tril()  # the diagonal is exp(0) = 1: a token reads itself without decay


def _product(M_RHNN: Tensor, x_RNHP: Tensor) -> Tensor:
    return (M_RHNN.to(x_RNHP.dtype) @ x_RNHP.transpose(1, 2)).transpose(1, 2)


def _in_chunks(x_RNHP: Tensor, a_RNH: Tensor, dt_RNH: Tensor, B_RNS: Tensor, C_RNS: Tensor, chunk_size: int) -> Tensor:
    """The scans ``[R, N, H, P]``, chunk by chunk: work and memory grow with N Q in place of N^2."""
    num_scans, num_tokens = x_RNHP.shape[:2]
    num_chunks = -(-num_tokens // chunk_size)  # rounded up
    missing = num_chunks * chunk_size - num_tokens

    def cut(value: Tensor) -> Tensor:  # zeros behind the end: without a step the state neither decays nor grows
        padded = torch.cat([value, value.new_zeros(num_scans, missing, *value.shape[2:])], dim=1)
        return padded.unflatten(1, (num_chunks, chunk_size)).flatten(0, 1)

    x, a, dt, B, C = (cut(value) for value in (x_RNHP, a_RNH, dt_RNH, B_RNS, C_RNS))
    # The four steps of section 6: within chunks, what each chunk adds to the state, the states at its start, reading.
    within = _product(_mixing_matrix(a, dt, B, C), x)
    since_start = a.cumsum(1).exp()  # decay of the entering state until token i, its own included
    a_later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
    until_end = a_later.flip(1).cumsum(1).flip(1).exp()  # decay of token i's entry until the chunk ends
    written = torch.einsum('rqs,rqhp->rhps', B, (x * (until_end * dt).unsqueeze(3)).to(x.dtype))

    kept, written = since_start[:, -1].unflatten(0, (num_scans, -1)), written.unflatten(0, (num_scans, -1))
    state = torch.zeros_like(written[:, 0], dtype=kept.dtype)  # [R, H, P, S], float32 or better
    entering = []
    for chunk in range(num_chunks):
        entering.append(state)
        state = kept[:, chunk, :, None, None] * state + written[:, chunk]
    states = torch.stack(entering, dim=1).flatten(0, 1).to(C.dtype)
    # y_i = h C_i for the part of the state that is from before the chunk.
    from_before = torch.einsum('rqs,rhps->rqhp', C, states) * since_start.unsqueeze(3)
    y = within + from_before.to(x.dtype)
    return y.unflatten(0, (num_scans, num_chunks)).flatten(1, 2)[:, :num_tokens]


def fused_refusal(device: torch.device) -> str | None:
    """Why the fused kernel cannot run there; None where it can."""
    reasons = []
    if importlib.util.find_spec('mamba_ssm') is None:
        reasons.append('the package mamba_ssm is not installed')
    if device.type != 'cuda':
        reasons.append(f'the tokens are on {device.type!r}, and it is written for CUDA')
    return ' and '.join(reasons) or None


def fused_bidirectional_ssd(
    x_BNHP: Tensor, dt_BN2H: Tensor, A_2H: Tensor, B_BN2S: Tensor, C_BN2S: Tensor, *, chunk_size: int
) -> Tensor:
    """The same by ``mamba_ssm``'s kernel, once for each direction; ``UserError`` where it is not or cannot run."""
    reason = fused_refusal(x_BNHP.device)
    if reason is not None:
        raise UserError(f"kernel: 'fused' cannot run: {reason}; take kernel='torch', which gives the same result")
    scan = importlib.import_module('mamba_ssm.ops.triton.ssd_combined').mamba_chunk_scan_combined
    results = []
    for direction in range(2):
        terms = [x_BNHP, *(value[:, :, direction] for value in (dt_BN2H, B_BN2S, C_BN2S))]
        # The kernel scans one way: the other direction is read last token first.
        x, dt, B, C = (value.flip(1) for value in terms) if direction else terms
        y = scan(x, dt, A_2H[direction], B.unsqueeze(2), C.unsqueeze(2), chunk_size=chunk_size)
        results.append(y.flip(1) if direction else y)
    return results[0] + results[1]


class BidirectionalSSD(nn.Module):
    """The mixer of a Mamba-2 block, in both directions: ``[B, N, D] -> [B, N, D]``. The order of the tokens counts.

    One projection makes the gate z, the values x, and for each direction B, C and dt. The two scans share z and x.
    Their results are added, x itself comes along with a weight for each head (the paper's D), and
    ``RMSNorm(y * silu(z))`` is projected back to the width of the tokens.

    Mamba's short causal convolution in front of the scan is left out: on a route the places one to three back hold
    tokens from anywhere, so its weights would learn of random distances in training and meet neighbours in sampling.
    The activation behind it, SiLU on x, B and C, stays.

    Raises:
        ValueError: The sizes do not fit together, or there is no such kernel.
    """

    def __init__(
        self,
        hidden_size: int,  # D
        *,
        expand: int = 2,  # E / D
        head_size: int = 64,  # P
        state_size: int = 64,  # S
        chunk_size: int = 256,  # Q: sequences of at most so many tokens are mixed by one matrix
        kernel: Literal['torch', 'fused'] = 'torch',  # 'fused': `mamba_ssm` on a CUDA device, and an error without it
    ) -> None:
        super().__init__()
        sizes = {'expand': expand, 'head_size': head_size, 'state_size': state_size, 'chunk_size': chunk_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f'{name}={value}: must be at least 1')
        inner_size = expand * hidden_size
        if inner_size % head_size:
            raise ValueError(
                f'head_size={head_size} does not divide the inner width {inner_size} = expand * hidden_size; heads '
                'take equal shares'
            )
        if kernel not in ('torch', 'fused'):
            raise ValueError(f"kernel={kernel!r}: must be 'torch' or 'fused'")
        self.num_heads, self.head_size, self.state_size = inner_size // head_size, head_size, state_size
        self.chunk_size, self.kernel = chunk_size, kernel
        # z: E; x: E with B and C of both directions: 4 S; dt of both directions: 2 H.
        self.widths = [inner_size, inner_size + 4 * state_size, 2 * self.num_heads]
        self.in_proj = nn.Linear(hidden_size, sum(self.widths), bias=False)
        self.dt_bias = nn.Parameter(torch.empty(2, self.num_heads))
        self.A_log = nn.Parameter(torch.empty(2, self.num_heads))
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(inner_size, eps=1e-6)
        self.out_proj = nn.Linear(inner_size, hidden_size, bias=False)
        with torch.no_grad():  # dt log-uniform (through its bias), A uniform in -16 .. -1
            dt = self.dt_bias.uniform_(*map(math.log, _DT_RANGE)).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            self.A_log.uniform_(*_DECAY_RANGE).log_()

    def forward(self, x_BND: Tensor) -> Tensor:
        """See the class."""
        # z gates the result; x, B and C go through SiLU; dt through softplus.
        gate_BNE, xBC, dt = self.in_proj(x_BND).split(self.widths, dim=2)
        xBC = nn.functional.silu(xBC)
        x_BNHP = xBC[:, :, : self.widths[0]].unflatten(2, (self.num_heads, self.head_size))
        B_BN2S, C_BN2S = xBC[:, :, self.widths[0] :].unflatten(2, (2, 2, self.state_size)).unbind(2)
        # Step sizes and rates are summed up over the sequence before they are exponents: never in bfloat16.
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt_BN2H = nn.functional.softplus(dt.unflatten(2, (2, self.num_heads)).to(wide) + self.dt_bias.to(wide))
        A_2H = -self.A_log.to(wide).exp()  # below 0 whatever the weights become: every decay is below 1
        # The meta device has shapes only: there the torch form stands for the kernel, so that costs can be counted.
        fused = self.kernel == 'fused' and x_BND.device.type != 'meta'
        scan = fused_bidirectional_ssd if fused else bidirectional_ssd
        y_BNHP = scan(x_BNHP, dt_BN2H, A_2H, B_BN2S, C_BN2S, chunk_size=self.chunk_size)
        y_BNHP = y_BNHP + self.D.to(y_BNHP.dtype).unsqueeze(1) * x_BNHP
        return self.out_proj(self.norm(y_BNHP.flatten(2) * nn.functional.silu(gate_BNE)))
