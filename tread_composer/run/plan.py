"""What a configuration will do, found out without doing it: ``python -m tread_composer plan yamls/x.yaml``.

The network is built and run on torch's meta device: shapes only, no memory, no arithmetic, seconds for the largest.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from composer.core import Time, TimeUnit

from tread_composer.algorithms.rules import limits
from tread_composer.builders.cost import Savers, count_macs, depth_of, sampling_cost, tokens_per_block
from tread_composer.builders.memory import step_memory
from tread_composer.builders.model import build_denoiser
from tread_composer.builders.run_data import check_batch_size, check_expectations, planned_manifest, split_folders
from tread_composer.config import Config, check_files
from tread_composer.config.sections import LatentsData
from tread_composer.core.errors import UserError, first_line
from tread_composer.data.checks import check_shards
from tread_composer.io.table import text_table
from tread_composer.routing import Route
from tread_composer.run.snr import latent_std

__all__ = ['data_state', 'format_plan', 'make_plan']

_STRENGTHS = 0.5, 2.0  # of latents; noise schedules and losses are made for about 1


def make_plan(config: Config, world_size: int, nodes: int = 1, memory: bool = True) -> dict[str, Any]:
    """The figures of a run on so many ranks, on so many machines; of their ``memory`` too, which takes some seconds.

    Returns:
        ``parameters``, ``tokens_per_block``, ``gmacs_dense`` (the network without token-saving methods) and
        ``gmacs_routed`` (in training with them; per image, forward, multiply-adds), ``ideal_step_ratio``, ``sampling``
        (see ``sampling_cost``), ``batches``, ``batches_per_epoch``, ``epochs``, ``samples_per_step``,
        ``memory_gib``, ...

    Raises:
        UserError: Neither data nor configuration say what the latents look like, or the ranks or the paths through the
            data do not divide among the nodes.
    """
    paths = getattr(config.data, 'num_canonical_nodes', 1)
    _check_nodes(paths, world_size, nodes)
    facts = _data_facts(config)
    with torch.device('meta'):
        denoiser = build_denoiser(config, **{key: facts[key] for key in ('channels', 'latent_size', 'num_classes')})
    algorithms = {name: part.instance for name, part in config.algorithms.items()}
    savers = {name: algorithm for name, algorithm in algorithms.items() if hasattr(algorithm, 'rehearse')}
    dense = count_macs(denoiser, facts)
    routed = count_macs(denoiser, facts, savers) if savers else dense
    per_rank, micro = config.global_train_batch_size // world_size, config.device_train_microbatch_size
    micro = micro if isinstance(micro, int) else per_rank
    depth = depth_of(denoiser)
    return {
        'parameters': sum(p.numel() for p in denoiser.parameters() if p.requires_grad),
        'num_tokens': denoiser.num_tokens,
        'depth': depth,
        'tokens_per_block': tokens_per_block(savers.values(), depth, denoiser.num_tokens),
        'routes': [_in_words(route, depth) for route in config.routes()],
        'gmacs_dense': dense / 1e9,
        'gmacs_routed': routed / 1e9,
        # The backward pass scales as the forward pass does, so this is the ratio of whole steps.
        'ideal_step_ratio': dense / routed,
        'sampling': sampling_cost(denoiser, facts),
        'limits': {name: text for name, text in map(_limit, algorithms.items()) if text},
        'world_size': world_size,
        'nodes': nodes,
        'share_of_shards_per_node': 1 / nodes if paths % nodes == 0 else 1 / paths,
        'samples_per_step': config.global_train_batch_size,
        'samples_per_rank': per_rank,
        'microbatch': micro,
        **_length(config, facts['num_samples']),
        'latent_strength': _latent_strength(config),
        **facts,
        **(_memory(config, denoiser, facts, savers, world_size, micro) if memory else {}),
    }


def _latent_strength(config: Config) -> dict[str, Any] | None:
    """How strong the latents are for the network, and where scale and shift come from; None without data."""
    manifest = planned_manifest(config)
    if manifest is None:
        return None
    source = 'latent_normalization'
    if config.latent_normalization is None:
        source = manifest.auto_scaling.source if config.latent_scale == 'auto' else 'configuration'
    numbers = config.normalized(manifest)
    return {
        'std': latent_std(config, manifest),
        'latent_scale': numbers.latent_scale,
        'latent_shift': numbers.latent_shift,
        'source': source,
    }


def _check_nodes(paths: int, world_size: int, nodes: int) -> None:
    if world_size % nodes:
        near = nodes * max(1, round(world_size / nodes))
        raise UserError(f'--ranks {world_size} --nodes {nodes}: every node has equally many ranks; take {near} ranks')
    if paths % nodes and nodes % paths:
        raise UserError(
            f'data.num_canonical_nodes: {paths} and {nodes} nodes: one must be a multiple of the other, so that each '
            f'node has whole paths through the data; take {nodes} (another number makes another order)'
        )


def _in_words(route: Route, depth: int) -> str:
    start, end = route.span(depth)
    return f'blocks {start} to {end} (of 0 to {depth - 1}) without {route.selection_rate:.0%} of the tokens'


def _limit(named: tuple[str, Any]) -> tuple[str, str]:
    """What a run with an algorithm of Composer's cannot do, with the reasons."""
    name, algorithm = named
    reasons, words = limits(algorithm), (('save', 'saved'), ('resume', 'resumed'))
    return name, '; '.join(f'cannot be {verb}: {reasons[limit]}' for limit, verb in words if limit in reasons)


def _memory(config: Config, denoiser: Any, facts: dict[str, Any], savers: Savers, ranks: int, micro: int) -> Any:
    try:
        parts, fits = step_memory(config, denoiser, facts, savers, ranks, micro)
    except (UserError, RuntimeError) as error:  # a kernel that runs on a GPU alone, or needs values in its backward
        return {'memory_unknown': first_line(error)}
    return {'memory_gib': parts, 'largest_microbatch': fits}


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
    data, manifest = config.data, planned_manifest(config)
    if manifest is not None:
        return {**manifest.sizes, 'num_samples': manifest.num_samples}
    assert isinstance(data, LatentsData)  # the digits always have a manifest
    expected = {'channels': data.channels, 'latent_size': data.latent_size, 'num_classes': data.num_classes}
    unsaid = [f'data.{name}' for name, value in expected.items() if value is None]
    if unsaid:
        raise UserError(
            f'data.local: {data.local!r} holds no manifest of its data, and the configuration does not say what they '
            f'will be: give {", ".join(unsaid)} to plan without them'
        )
    return {**expected, 'num_samples': None}


def data_state(config: Config) -> tuple[str, UserError | None]:
    """One line on the training data, and what is wrong with them, if anything is."""
    data = config.data
    folder = os.path.join(data.local, split_folders(config)['train'])
    made_later = data.name == 'digits' and not os.path.exists(data.local)
    try:
        if not made_later:
            check_files(config)
        manifest = planned_manifest(config)
        if manifest is None:
            return f'{folder}: no manifest', UserError(f'data.local: {folder!r} holds no manifest.json')
        check_batch_size(config, manifest)
        if made_later:
            return f'{data.local}: not there yet, will be made from scikit-learn on first use', None
        check_shards(folder, manifest, remote=data.name == 'latents' and data.remote is not None)
        check_expectations(config, manifest)
    except UserError as error:
        return f'{folder}: NOT READY, see the message below', error
    return (
        f'{folder}: {manifest.num_samples:,} samples of {manifest.kind} from {manifest.source}, shards complete',
        None,
    )


def format_plan(config: Config, plan: dict[str, Any], state: str) -> str:
    """The plan as text for a terminal: figures first, the resolved configuration below."""
    tokens, size = plan['tokens_per_block'], plan['latent_size']
    sampling = plan['sampling']
    length = 'unknown' if plan['batches'] is None else f'{plan["batches"]:,} batches'
    if plan['epochs'] is not None:
        length += (
            f' = {plan["epochs"]:.1f} epochs of {plan["batches_per_epoch"]} batches ({plan["num_samples"]:,} samples)'
        )
    of_nodes = {}
    if plan['nodes'] > 1:
        text = f'{plan["nodes"]} with {plan["world_size"] // plan["nodes"]} ranks each; an epoch takes each node to '
        of_nodes['nodes'] = f'{text}{plan["share_of_shards_per_node"]:.0%} of the shards'
    from_algorithms: dict[str, str] = {}
    for part in config.algorithms.values():
        from_algorithms |= part.instance.plan_rows(plan) if hasattr(part.instance, 'plan_rows') else {}
    rows = {
        'run': f'{config.run_name} in {config.save_folder or "no folder: nothing is saved"}',
        'data': state,
        'latents': f'{plan["channels"]} x {size} x {size}, {plan["num_classes"] or "no"} classes',
        **_strength_rows(plan['latent_strength']),
        'model': f'{config.model.name}, {plan["depth"]} blocks, {plan["parameters"]:,} trainable parameters',
        'route': 'none: dense',
        **from_algorithms,
        'tokens per block': ' '.join(f'{n}' for n in tokens),
        'GMACs per image': f'{_figure(plan["gmacs_dense"])} dense, {_figure(plan["gmacs_routed"])} in training',
        'sampling': f'{sampling["parameters"]:,} parameters, {_figure(sampling["gmacs"])} GMACs per network call',
        'ideal step ratio': f'{plan["ideal_step_ratio"]:.2f}x (arithmetic of the network only)',
        **{f'limit of {name}': text for name, text in plan['limits'].items()},
        'samples per step': f'{plan["samples_per_step"]} = {plan["world_size"]} x {plan["samples_per_rank"]}, '
        f'in microbatches of {plan["microbatch"]}',
        **of_nodes,
        'length': length,
        'optimizer': f'{config.optimizer.name} {config.optimizer.to_plain()}, scheduler {config.scheduler.name}',
        **_memory_rows(plan),
    }
    return f'{text_table((), list(rows.items()), "ll")}\n\n# resolved configuration\n{config.to_yaml()}'


def _memory_rows(plan: dict[str, Any]) -> dict[str, str]:
    if 'memory_gib' not in plan:
        return {'memory per device': f'not known: {plan["memory_unknown"]}'} if 'memory_unknown' in plan else {}
    parts, fits = plan['memory_gib'], plan['largest_microbatch']
    shown = ', '.join(f'{name} {size:.2f}' for name, size in parts.items() if name != 'total' and size)
    cards = ', '.join(f'{most or "none"} on {card} GB' for card, most in fits.items())
    return {
        'memory per device': f'{parts["total"]:.2f} GiB at most, from shapes alone, without compilation: {shown}',
        'microbatch limit': f'{cards} (estimated, with 8% of the card left over)',
    }


def _strength_rows(strength: dict[str, Any] | None) -> dict[str, str]:
    if strength is None:
        return {}
    std, (low, high) = strength['std'], _STRENGTHS
    numbers = ', '.join(f'{name} {_in_brief(strength[name])}' for name in ('latent_scale', 'latent_shift'))
    text = f'std {std:.3f} for the network: {numbers} ({strength["source"]})'
    if not low <= std <= high:
        text += f'. WARNING: outside of {low:g} to {high:g}, for which objectives and times are made'
        text += '' if strength['source'] != 'configuration' else '; latent_scale: auto takes what fits these latents'
    return {'latent strength': text}


def _in_brief(value: float | Sequence[float]) -> str:
    if not isinstance(value, Sequence):
        return f'{value:g}'
    return f'{value[0]:g}' if len(value) == 1 else f'{min(value):g} to {max(value):g} by channel'


def _figure(gmacs: float) -> str:
    return f'{gmacs:.2f}' if gmacs >= 1 else f'{gmacs:.4f}'
