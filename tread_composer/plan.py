"""What a configuration will do, found out without doing it: ``python -m tread_composer plan yamls/x.yaml``.

The network is built and run on torch's meta device: shapes only, no memory, no arithmetic, seconds for the largest.
"""

from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Time, TimeUnit
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tread_composer.builders import build_denoiser, planned_manifest
from tread_composer.config import Config
from tread_composer.config.tree import LatentsData
from tread_composer.errors import UserError
from tread_composer.models import DiT
from tread_composer.routing import Route, apply_tread

__all__ = ['count_macs', 'format_plan', 'make_plan']

_GIB = 2**30


def make_plan(config: Config, world_size: int) -> dict[str, Any]:
    """The figures of a run.

    Args:
        config: A loaded configuration.
        world_size: Number of ranks.

    Returns:
        ``parameters``, ``tokens_per_block``, ``gmacs_dense`` and ``gmacs_routed`` (per image, forward, multiply-adds),
        ``ideal_step_ratio``, ``batches``, ``batches_per_epoch``, ``epochs``, ``samples_per_step``, ``memory_gib``, ...

    Raises:
        UserError: Neither data nor configuration say what the latents look like.
    """
    facts = _data_facts(config)
    shape = {name: facts[name] for name in ('channels', 'latent_size', 'num_classes')}
    with torch.device('meta'):
        denoiser = build_denoiser(config, **shape)
    routes = config.routes()
    dense = count_macs(denoiser, facts)
    routed = count_macs(denoiser, facts, routes) if routes else dense
    per_rank = config.global_train_batch_size // world_size
    micro = config.device_train_microbatch_size
    micro = micro if isinstance(micro, int) else per_rank
    return {
        'parameters': sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        'num_tokens': denoiser.num_tokens,
        'depth': denoiser.depth,
        'tokens_per_block': tokens_per_block(routes, denoiser.depth, denoiser.num_tokens),
        'routes': [_in_words(route, denoiser.depth) for route in routes],
        'gmacs_dense': dense / 1e9,
        'gmacs_routed': routed / 1e9,
        # The backward pass scales as the forward pass does, so this is the ratio of whole steps.
        'ideal_step_ratio': dense / routed,
        'world_size': world_size,
        'samples_per_step': config.global_train_batch_size,
        'samples_per_rank': per_rank,
        'microbatch': micro,
        **_length(config, facts['num_samples']),
        'memory_gib': _memory(config, denoiser, facts, routes, micro),
        **facts,
    }


def _in_words(route: Route, depth: int) -> str:
    start, end = route.span(depth)
    return f'blocks {start} to {end} (of 0 to {depth - 1}) without {route.selection_rate:.0%} of the tokens'


def tokens_per_block(routes: Sequence[Route], depth: int, num_tokens: int) -> list[int]:
    """How many tokens each block sees while routing is on."""
    counts = [num_tokens] * depth
    for route in routes:
        start, end = route.span(depth)
        counts[start : end + 1] = [route.num_kept(num_tokens)] * (end - start + 1)
    return counts


def count_macs(denoiser: DiT, facts: dict[str, Any], routes: Sequence[Route] = ()) -> int:
    """Multiply-adds of one forward pass for one image (what the DiT paper calls Gflops are 10^9 of these)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        _forward(denoiser, facts, routes)
    return counter.get_total_flops() // 2


def _forward(denoiser: DiT, facts: dict[str, Any], routes: Sequence[Route], batch_size: int = 1) -> Tensor:
    dtype = next(denoiser.parameters()).dtype
    size = facts['latent_size']
    x = torch.empty(batch_size, facts['channels'], size, size, device='meta', dtype=dtype)
    t, labels = x[:, 0, 0, 0], torch.zeros(batch_size, dtype=torch.int64, device='meta')
    denoiser.train(bool(routes))
    if not routes:
        return denoiser(x, t, labels)
    routing = apply_tread(denoiser, routes)
    kept = [
        torch.empty(batch_size, route.num_kept(denoiser.num_tokens), dtype=torch.int64, device='meta')
        for route in routes
    ]
    routing.arm(kept, num_tokens=denoiser.num_tokens)
    out = denoiser(x, t, labels)
    routing.disarm()
    return out


def _memory(
    config: Config, denoiser: DiT, facts: dict[str, Any], routes: Sequence[Route], micro: int
) -> dict[str, float]:
    """Bytes on one device, as far as shapes tell: no allocator slack, no communication buffers, no temporary."""
    trainable = sum(p.numel() for p in denoiser.parameters() if p.requires_grad)
    moments = {'adamw': 2, 'adam': 2, 'decoupled_adamw': 2}.get(config.optimizer.name, 1)
    averages = sum(name in config.algorithms for name in ('ema', 'composer_ema'))
    precision = str(getattr(config.precision, 'value', config.precision))
    network = denoiser.to(torch.bfloat16) if precision.startswith('amp') else denoiser
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    kept_alive = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: (kept_alive.append(tensor), note(tensor))[1], lambda t: t
    ):
        kept_alive.append(_forward(network, facts, routes))
    weights = {p.untyped_storage()._cdata for p in network.parameters()}
    activations = sum(size for key, size in saved.items() if key not in weights) * micro
    return {
        'weights_and_gradients': trainable * 8 / _GIB,
        'optimizer': trainable * 4 * moments / _GIB,
        'average': trainable * 4 * averages / _GIB,
        'activations': activations / _GIB,
        'total': (trainable * 4 * (2 + moments + averages) + activations) / _GIB,
    }


def _length(config: Config, num_samples: int | None) -> dict[str, Any]:
    duration = Time.from_timestring(config.max_duration)
    per_epoch = None if num_samples is None else num_samples // config.global_train_batch_size
    batches = {
        TimeUnit.BATCH: duration.value,
        TimeUnit.EPOCH: None if per_epoch is None else duration.value * per_epoch,
        TimeUnit.SAMPLE: -(-duration.value // config.global_train_batch_size),
    }.get(duration.unit)
    epochs = None if batches is None or not per_epoch else batches / per_epoch
    return {'batches': batches, 'batches_per_epoch': per_epoch, 'epochs': epochs}


def _data_facts(config: Config) -> dict[str, Any]:
    manifest = planned_manifest(config)
    if manifest is not None:
        return {
            'channels': manifest.channels,
            'latent_size': manifest.latent_height,
            'num_classes': manifest.num_classes,
            'num_samples': manifest.num_samples,
        }
    data = config.data
    assert isinstance(data, LatentsData)  # the digits always have a manifest
    expected = {'channels': data.channels, 'latent_size': data.latent_size, 'num_classes': data.num_classes}
    unsaid = [f'data.{name}' for name, value in expected.items() if value is None]
    if unsaid:
        raise UserError(
            f'data.local: {data.local!r} holds no manifest of its data, and the configuration does not say what they '
            f'will be: give {", ".join(unsaid)} to plan without them'
        )
    return {**expected, 'num_samples': None}


def format_plan(config: Config, plan: dict[str, Any], data_state: str) -> str:
    """The plan as text for a terminal: figures first, the resolved configuration below."""
    memory, tokens, size = plan['memory_gib'], plan['tokens_per_block'], plan['latent_size']
    length = 'unknown' if plan['batches'] is None else f'{plan["batches"]:,} batches'
    if plan['epochs'] is not None:
        length += (
            f' = {plan["epochs"]:.1f} epochs of {plan["batches_per_epoch"]} batches ({plan["num_samples"]:,} samples)'
        )
    tread = config.algorithms.get('tread')
    window = {key: tread.kwargs.get(key) for key in ('start_time', 'end_time')} if tread else {}
    schedule = ''.join(f', {key} {value}' for key, value in window.items() if value)
    route = '; '.join(plan['routes']) + schedule if tread else 'none: dense'
    rows = {
        'run': f'{config.run_name} in {config.save_folder or "no folder: nothing is saved"}',
        'data': data_state,
        'latents': f'{plan["channels"]} x {size} x {size}, {plan["num_classes"] or "no"} classes',
        'model': f'{config.model.name}, {plan["depth"]} blocks, {plan["parameters"]:,} trainable parameters',
        'route': route,
        'tokens per block': ' '.join(f'{n}' for n in tokens),
        'GMACs per image': f'{_figure(plan["gmacs_dense"])} dense, {_figure(plan["gmacs_routed"])} in training',
        'ideal step ratio': f'{plan["ideal_step_ratio"]:.2f}x (arithmetic of the network only)',
        'samples per step': f'{plan["samples_per_step"]} = {plan["world_size"]} x {plan["samples_per_rank"]}, '
        f'in microbatches of {plan["microbatch"]}',
        'length': length,
        'optimizer': f'{config.optimizer.name} {config.optimizer.to_plain()}, scheduler {config.scheduler.name}',
        'memory per device': f'about {memory["total"]:.2f} GiB unsharded: weights and gradients '
        f'{memory["weights_and_gradients"]:.2f}, optimizer {memory["optimizer"]:.2f}, average {memory["average"]:.2f}, '
        f'activations {memory["activations"]:.2f} (from shapes alone)',
    }
    width = max(map(len, rows))
    table = '\n'.join(f'{name:<{width}}  {text}' for name, text in rows.items())
    return f'{table}\n\n# resolved configuration\n{config.to_yaml()}'


def _figure(gmacs: float) -> str:
    return f'{gmacs:.2f}' if gmacs >= 1 else f'{gmacs:.4f}'
