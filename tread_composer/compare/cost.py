"""What training has cost until a step: FLOPs from the run's configuration, seconds from its logged speed."""

import math
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from composer.core import Time, TimeUnit

from tread_composer.config import Config, restore_config
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import Manifest
from tread_composer.run.plan import make_plan

__all__ = ['Cost', 'recorded_seconds', 'training_teraflops']

Cost = Callable[[int], float | None]
"""From the number of steps to what they have cost; None where that is not known."""

_FLOPS_PER_MAC = 6  # a multiply and an add, and the backward pass costs twice the forward


def not_recorded(step: int) -> None:
    """The cost of which nothing is known."""
    del step


def training_teraflops(folder: Path) -> tuple[Cost, str]:
    """TFLOPs of a run until a step, of the network's matrix products alone, and a sentence on how they were found.

    What its data are says ``data.json`` in its folder, where the data are not on this machine.
    """
    try:
        config = restore_config(folder / 'config.yaml')
        if (folder / 'data.json').is_file() and config.data.name == 'latents':
            config = restore_config(folder / 'config.yaml', _data_overrides(folder / 'data.json'))
        plan = make_plan(config, 1, memory=False)  # the work of a step is the same on any number of ranks
        window = _routed_steps(config, plan)
    except UserError as error:
        return not_recorded, f'FLOPs not recorded: {error}'
    factor = _FLOPS_PER_MAC * plan['samples_per_step'] / 1000
    dense, routed = factor * plan['gmacs_dense'], factor * plan['gmacs_routed']  # TFLOPs of a step

    def cost(step: int) -> float:
        steps = max(0.0, min(step, window[1]) - window[0])  # of them routed
        return routed * steps + dense * (step - steps)

    text = f'FLOPs: {routed:.4g} TFLOPs a step ({_FLOPS_PER_MAC} x {plan["gmacs_routed"]:.4g} GMACs x '
    text += f'{plan["samples_per_step"]} samples), arithmetic of the network only'
    if window != (0, math.inf):
        text += f'; routed from step {window[0]:g} to {window[1]:g}, else {dense:.4g} TFLOPs a step'
    if config.load_path is not None:
        text += f'; without what the weights in {config.load_path} had cost before'
    return cost, text


def _data_overrides(path: Path) -> list[str]:
    manifest = Manifest.parse(path.read_text(), str(path), 'it belongs to the run: write it anew by resuming the run')
    return [f'data.{name}={value}' for name, value in manifest.sizes.items()]


def _routed_steps(config: Config, plan: Mapping[str, Any]) -> tuple[float, float]:
    """The steps in which work is saved; (0, inf) if always, or if nothing is ever saved."""
    windows = {}
    for name, component in config.algorithms.items():
        if hasattr(component.instance, 'cost_window'):
            start, end = component.instance.cost_window()
            windows[name] = (
                0.0 if start is None else _in_steps(start, f'{name}.start_time', plan),
                math.inf if end is None else _in_steps(end, f'{name}.end_time', plan),
            )
    if len(set(windows.values())) > 1:
        raise UserError(f'{" and ".join(windows)} save work in different steps of the run')
    return next(iter(windows.values()), (0.0, math.inf))


def _in_steps(text: str, name: str, plan: Mapping[str, Any]) -> float:
    time = Time.from_timestring(text)
    factor = {
        TimeUnit.BATCH: 1,
        TimeUnit.DURATION: plan['batches'],
        TimeUnit.EPOCH: plan['batches_per_epoch'],
        TimeUnit.SAMPLE: 1 / plan['samples_per_step'],
    }.get(time.unit)
    if factor is None:
        raise UserError(f'algorithms.{name}: {text} is not known in steps without the size of the data')
    return math.ceil(time.value * factor - 1e-9)


def recorded_seconds(speeds: Mapping[int, float]) -> tuple[Cost, str]:
    """Seconds of training until a step, and how they were found; ``speeds`` are batches in a second, by step.

    Composer's clock of training time counts what callbacks do, drawing samples for example. So the middle one of the
    logged speeds is taken: most windows are undisturbed.
    """
    usable = [speed for speed in speeds.values() if speed > 0 and math.isfinite(speed)]
    if not usable:
        return not_recorded, 'seconds not recorded: the run has no throughput/batches_per_sec (add speed_monitor: {})'
    speed = statistics.median(usable)
    text = f'seconds: steps / {speed:.4g} steps a second, the median of {len(usable)} logged speeds '
    return lambda step: step / speed, text + '(measuring and saving between them left out)'
