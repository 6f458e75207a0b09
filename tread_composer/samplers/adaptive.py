"""``dopri5``, which chooses its steps by an estimate of their error.

Each sample takes steps of its own, so that none depends on what else is in the batch; the network is called for all of
them together, at a time of each. (torchdiffeq, with which SiT and LightningDiT sample, takes one step for the whole
batch.)

Shapes: B samples, C channels, H x W latent pixels, S stages of a step.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tread_composer.core.errors import UserError
from tread_composer.core.protocols import StepNoise
from tread_composer.samplers.equation import Equation, marked, needs

__all__ = ['dopri5']

_ORDER = 5
_SAFETY, _SHRINK, _GROW = 0.9, 0.2, 10.0  # of the step that the estimate allows, and bounds of its change
_MOST_ATTEMPTS = 10_000  # at some hundred the tolerances are below the rounding of the network

_Slope = Callable[[Tensor, Tensor], Tensor]


@marked(adaptive=True)
@needs('continuous_times', 'walks a differential equation at times of its own choice', "take 'heun'")
def dopri5(
    equation: Equation,
    x_BCHW: Tensor,
    times: Tensor,
    noise: StepNoise,
    /,
    *,
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> Tensor:
    """Dormand and Prince's pair of orders 5 and 4, with the step control of Hairer, Norsett and Wanner (II.4).

    A step is taken where the root mean square of ``error / (atol + rtol |x|)`` over the values of a sample is below 1.
    The defaults are those of SiT and LightningDiT; coefficients and control are those of ``scipy.integrate.RK45``, and
    so are steps and number of evaluations. Where the objective has no drift at time 0, it ends at the last time above,
    and an Euler step goes to 0.

    Raises:
        ValueError: A tolerance is out of range.
        UserError: The tolerances cannot be kept: steps shrink to nothing.
    """
    if not (atol > 0 and rtol > 0):
        raise ValueError(f'atol={atol} and rtol={rtol} must be above 0')
    times = times.double()
    end = times[-1] if equation.drift_at_zero else times[-2]
    x, taken_B = _solved(equation.drift, x_BCHW.double(), times[0], end, (atol, rtol))
    if not equation.drift_at_zero:
        x, taken_B = x + (times[-1] - end) * equation.drift(x, end), taken_B + 1
    equation.clock.taken_B = taken_B
    return x


def _solved(
    slope: _Slope, x_BCHW: Tensor, start: Tensor, end: Tensor, tolerances: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Where the equation ends, and the evaluations that each sample took."""
    x, t_B = x_BCHW, start.repeat(len(x_BCHW))  # times stay on the CPU
    dx = slope(x, t_B)
    size_B = _initial_size(slope, x, dx, t_B, start - end, tolerances)
    taken_B, shrunk_B = torch.full_like(t_B, 2, dtype=torch.int64), torch.zeros_like(t_B, dtype=torch.bool)
    for _ in range(_MOST_ATTEMPTS):
        open_B = t_B > end  # the others wait, in steps of 0, until all have arrived
        if not open_B.any():
            return x, taken_B
        next_B = torch.where(open_B, (t_B - size_B).clamp(min=end), t_B)
        ahead, dx_ahead, error = _step(slope, x, dx, t_B, next_B)
        error_B = _size(error, torch.maximum(x.abs(), ahead.abs()), tolerances)
        # What is not finite will not become so: it goes to the end as it is, and whoever draws looks at the result.
        broken_B = ~error_B.isfinite()
        passed_B = open_B & ((error_B < 1) | broken_B)
        factor_B = (_SAFETY * error_B ** (-1 / _ORDER)).nan_to_num(_SHRINK).clamp(_SHRINK, _GROW)
        factor_B = torch.where(shrunk_B & passed_B, factor_B.clamp(max=1), factor_B)  # no growth right after a failure
        size_B = torch.where(open_B, (t_B - next_B) * factor_B, size_B)
        taken_B, shrunk_B = taken_B + 6 * open_B, open_B & ~passed_B
        if (shrunk_B & (size_B < 10 * torch.finfo(t_B.dtype).eps * t_B)).any():
            break
        t_B = torch.where(passed_B, torch.where(broken_B, end, next_B), t_B)
        chosen = _over(passed_B, x)
        x, dx = torch.where(chosen, ahead, x), torch.where(chosen, dx_ahead, dx)
    atol, rtol = tolerances
    raise UserError(
        f"sampler: 'dopri5' cannot keep atol={atol:g} and rtol={rtol:g} with this network: its steps shrink to "
        'nothing. Take larger tolerances (1e-6 and 1e-3 are the defaults), or heun'
    )


def _step(slope: _Slope, x: Tensor, dx: Tensor, t_B: Tensor, next_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step: where it leads, the slope there, and the difference between the orders."""
    from scipy.integrate import RK45  # its published table; half a second that only this sampler needs

    span_B, slopes = next_B - t_B, [dx]  # below 0: from noise to data
    span = _over(span_B, x)
    for row, share in zip(RK45.A[1:], RK45.C[1:], strict=True):
        slopes.append(slope(x + span * _sum(row, slopes), t_B + float(share) * span_B))
    ahead = x + span * _sum(RK45.B, slopes)
    slopes.append(slope(ahead, next_B))  # the first slope of the next step
    return ahead, slopes[-1], span * _sum(RK45.E, slopes)


def _initial_size(
    slope: _Slope, x: Tensor, dx: Tensor, t_B: Tensor, span: Tensor, tolerances: tuple[float, float]
) -> Tensor:
    """A step of which the first two derivatives say that it is small, one for each sample (Hairer et al., II.4)."""
    x_B, dx_B = _size(x, x.abs(), tolerances), _size(dx, x.abs(), tolerances)
    trial_B = torch.where((x_B < 1e-5) | (dx_B < 1e-5), 1e-6, 0.01 * x_B / dx_B).nan_to_num(1e-6).clamp(max=span)
    bend = slope(x - _over(trial_B, x) * dx, t_B - trial_B) - dx
    bend_B = _size(bend, x.abs(), tolerances) / trial_B
    steepest_B = torch.maximum(dx_B, bend_B)
    size_B = torch.where(steepest_B <= 1e-15, (1e-3 * trial_B).clamp(min=1e-6), (0.01 / steepest_B) ** (1 / _ORDER))
    return torch.minimum(100 * trial_B, size_B.nan_to_num(1e-6)).clamp(max=span)


def _size(values: Tensor, magnitude: Tensor, tolerances: tuple[float, float]) -> Tensor:
    """Root mean square in units of what is tolerated, for each sample, on the CPU."""
    atol, rtol = tolerances
    return (values / (atol + rtol * magnitude)).flatten(1).square().mean(dim=1).sqrt().cpu()


def _sum(weights: Iterable[float], slopes: list[Tensor]) -> Tensor:
    terms = [float(weight) * slope for weight, slope in zip(weights, slopes, strict=False) if weight]  # rows end in 0
    return torch.stack(terms).sum(dim=0)


def _over(values_B: Tensor, x_BCHW: Tensor) -> Tensor:
    return values_B.to(x_BCHW.device).view(-1, *[1] * (x_BCHW.dim() - 1))
