"""What routing itself takes of a step: the draw, the gather and the scatter with their backward passes, and the probe.

Sums of the calls concerned, timed within real steps; only the backward passes are timed alone, at the sizes of the
step. Shapes: B samples, N tokens, K kept tokens, D width.
"""

import contextlib
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from contenders import Routed
from measuring import EventClock, ThreadClock, Timeline
from torch import Tensor

from tread_composer.routing import sample_kept
from tread_composer.routing.passes import Pass
from tread_composer.routing.probe import PROBED_FORWARDS, Probe
from tread_composer.routing.tokens import put_back, take_kept

__all__ = ['probe_seconds', 'routing_seconds', 'watch_probes']

STEPS = 4  # of which one at most is probed
REPEATS = 10
_PROBE = ('check', 'note', 'traced', 'between', 'end')
_PASS = ('enter', 'reduced', 'leave')


@contextlib.contextmanager
def watch_probes(timeline: Timeline) -> Iterator[None]:
    """Inside, the time of probes is noted."""
    with timeline.watching(*((Probe, name, f'probe {name}') for name in _PROBE)):
        yield


def probe_seconds(timeline: Timeline) -> float | None:
    """Of one probed forward pass along all routes; None if there was none."""
    passes = timeline.calls['probe end']
    seconds = sum(value for name, value in timeline.seconds().items() if name.startswith('probe'))
    return seconds / passes if passes else None


def routing_seconds(
    routed: Routed, tokens_BND: Tensor, clock: ThreadClock | EventClock, probe: float | None
) -> dict[str, Any]:
    """The entries of a row.

    Args:
        routed: Has been warmed up.
        tokens_BND: As the first block of a route is given them.
        clock: Of the device.
        probe: Seconds of a probed pass.
    """
    timeline, steps = Timeline(clock), []
    for _ in range(STEPS):
        calls = [(Pass, name, 'pass') for name in _PASS]
        with timeline.watching((routed.tread, 'apply', 'draw'), *calls):
            routed.step(lambda: None)
        steps.append(timeline.seconds())
    draw, forward = (statistics.median(step[name] for step in steps) for name in ('draw', 'pass'))
    backward = _backward_seconds(routed, tokens_BND, clock)
    batches = routed.problem.plan['batches']
    probes = 0.0 if probe is None else len(PROBED_FORWARDS) * probe / batches
    return {
        'draw': draw,
        'gather_and_scatter': forward,
        'their_backward': backward,
        'probe': probe,
        'probes': len(PROBED_FORWARDS),
        'batches': batches,
        'seconds': draw + forward + backward + probes,
    }


def _backward_seconds(routed: Routed, tokens_BND: Tensor, clock: ThreadClock | EventClock) -> float:
    """Of the gathers and scatters of all routes, with the sum of the two gradients of the tokens."""
    full, total = tokens_BND.detach().requires_grad_(), 0.0
    batch_size, num_tokens = full.shape[:2]
    for route in routed.tread.routes:
        kept = sample_kept(batch_size, num_tokens, route.selection_rate, device=full.device)
        times = []
        for _ in range(REPEATS):
            restored = put_back(full, take_kept(full, kept), kept)
            gradient = torch.ones_like(restored)
            clock.settle()
            begin = clock.mark()
            torch.autograd.grad(restored, full, gradient)
            end = clock.mark()
            clock.settle()
            times.append(clock.seconds(begin, end))  # type: ignore[arg-type]
        total += statistics.median(times)
    return total
