"""Rules that join several settings, and those that need the machine or the disk."""

import itertools
import os
import re
from collections.abc import Iterator
from typing import Any

import torch

from tread_composer.algorithms.rules import cannot_work, conflict, never_resumes, without_checkpoints_only
from tread_composer.config.attention import attention_problems
from tread_composer.config.errors import ConfigError, Problem
from tread_composer.config.registry import is_ours, resolve
from tread_composer.config.sharding import sharding_needs_gpu, sharding_problems
from tread_composer.config.tree import Config, LatentsData
from tread_composer.core.errors import UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.metrics import REFERENCES
from tread_composer.metrics.inception import find_weights
from tread_composer.models.ssd import fused_refusal
from tread_composer.samplers import check_sampler

__all__ = ['check_files', 'check_machine', 'joint_problems']

_BYTES = re.compile(r'\d+(\.\d+)?\s*[kmgt]?b')


def joint_problems(config: Config, world_size: int) -> list[Problem]:
    """What is wrong between settings that are each right; ``world_size`` is the number of ranks."""
    return [
        *_batches(config, world_size),
        *_model(config),
        *_algorithms(config),
        *_combinations(config),
        *_composers(config),
        *_saving(config),
        *sharding_problems(config, world_size),
        *_averages(config),
        *_normalization(config),
        *_learned_variance(config),
        *_samplers(config),
        *_rest(config),
    ]


def _batches(config: Config, world_size: int) -> list[Problem]:
    problems = []
    for name in ('global_train_batch_size', 'global_eval_batch_size'):
        size = getattr(config, name)
        if size % world_size:
            nearest = max(1, round(size / world_size)) * world_size
            text = f'{size} does not divide among {world_size} ranks; take a multiple, such as {nearest}'
            problems.append(Problem((name,), text))
    per_rank = config.global_train_batch_size // world_size
    micro = config.device_train_microbatch_size
    if isinstance(micro, int) and not problems and (micro < 1 or per_rank % micro):
        share = f'{config.global_train_batch_size} / {world_size}'
        text = f'{micro} does not divide the {per_rank} samples of one rank ({share})'
        remedy = f'take one of {", ".join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)}'
        problems.append(Problem(('device_train_microbatch_size',), f'{text}; {remedy}'))
    if micro == 'auto' and not torch.cuda.is_available():
        text = "'auto' tries sizes until the GPU runs out of memory, and this machine has no GPU; give a number"
        problems.append(Problem(('device_train_microbatch_size',), text))
    return problems


def _model(config: Config) -> list[Problem]:
    """A published size by ``preset``, or all sizes one by one."""
    model = config.model
    presets = getattr(resolve('backbone', model.name), 'presets', {})
    if not presets:
        return []
    sizes = {name: model.kwargs.get(name) for name in next(iter(presets.values()))}
    if 'preset' in model.kwargs:
        rule = f'the preset {model.kwargs["preset"]!r} has decided that; remove it, or the preset and give all sizes'
        return [Problem(('model', name), f'{value}: {rule}') for name, value in sizes.items() if value is not None]
    example = next((name for name in presets if '-B/' in name), next(iter(presets)))
    problems = [
        Problem(('model', name), f'is missing; give it, or all sizes by one name, for example preset: {example!r}')
        for name, value in sizes.items()
        if value is None
    ]
    if not problems and 'num_heads' in sizes and sizes['hidden_size'] % sizes['num_heads']:  # type: ignore[operator]
        text = f'{sizes["hidden_size"]} does not divide among {sizes["num_heads"]} heads; take a multiple'
        problems.append(Problem(('model', 'hidden_size'), text))
    return problems


def _algorithms(config: Config) -> Iterator[Problem]:
    """What algorithms themselves have against the run: the optional method ``problems(config)``, ours or a stranger's.

    It returns pairs of a setting of the algorithm (empty: the algorithm as such) and a text.
    """
    for name, component in config.algorithms.items():
        problems = getattr(component.instance, 'problems', None)
        for setting, text in problems(config) if problems else ():
            yield Problem(('algorithms', name, setting) if setting else ('algorithms', name), text)


def _combinations(config: Config) -> list[Problem]:
    """Algorithms that may not stand beside each other."""
    problems = []
    for (name, component), (partner_name, partner) in itertools.combinations(config.algorithms.items(), 2):
        reason = conflict(type(component.instance), type(partner.instance))
        if reason is not None:
            text = f'cannot stand beside algorithms.{partner_name}: {reason}. '
            problems.append(Problem(('algorithms', name), f'{text}Take one of them out, e.g. algorithms.{name}=null'))
    return problems


def _composers(config: Config) -> Iterator[Problem]:
    """What Composer's own algorithms cannot do; beside one of ours, a Trainer written by hand refuses the same."""
    for name, component in config.algorithms.items():
        key_path, remedy = ('algorithms', name), f'take it out (algorithms.{name}=null)'
        algorithm = component.instance
        reason = conflict(LatentDiffusion, type(algorithm)) or cannot_work(algorithm)
        if reason is not None:
            yield Problem(key_path, f'cannot work in this run: {reason}; {remedy}')
        reason = without_checkpoints_only(algorithm)
        if reason is not None and config.save_folder is not None:
            yield Problem(key_path, f'cannot work in this run: {reason}; {remedy}, or save nothing (save_folder=null)')
        reason = never_resumes(algorithm)
        if reason is not None and config.autoresume:
            remedy = f'set autoresume=false and train in one piece, or {remedy}'
            yield Problem(key_path, f'a run with it cannot be resumed: {reason}; {remedy}')
        elif reason is not None and config.load_path is not None and not config.load_weights_only:
            remedy = f'set load_weights_only=true to start a new run, or {remedy}'
            yield Problem(key_path, f'a run with it cannot be resumed: {reason}; {remedy}')
        precision = str(getattr(config.precision, 'value', config.precision))
        if name == 'low_precision_layer_norm' and precision in ('fp32', 'amp_fp8'):
            text = f'does nothing in precision {precision!r}: it lowers what amp_bf16 or amp_fp16 keep in float32'
            yield Problem(key_path, f'{text}; set precision=amp_bf16, or {remedy}')


def _saving(config: Config) -> Iterator[Problem]:
    """What could not be resumed: the same command is to go on from the newest whole checkpoint."""
    if config.autoresume and not (config.save_folder and config.save_latest_filename):
        text = (
            'true needs save_folder and save_latest_filename to find the checkpoint in; give both, or set it to false'
        )
        yield Problem(('autoresume',), text)
    if config.on_nonfinite == 'rewind' and not config.autoresume:
        text = "'rewind' goes back to the run's own last checkpoint, which needs save_folder and autoresume=true"
        yield Problem(('on_nonfinite',), text)
    if config.save_folder is None:
        return
    if config.autoresume and config.save_weights_only:
        text = (
            'true saves no optimizer, average or position in the data, so autoresume would begin anew with trained '
            'weights and call it the same run; set it to false, or autoresume to false'
        )
        yield Problem(('save_weights_only',), text)
    keep = config.save_num_checkpoints_to_keep
    if keep < 1 and keep != -1:
        text = (
            f'{keep} leaves no checkpoint to go on from; keep at least 1, or all with -1 (save_folder=null saves none)'
        )
        yield Problem(('save_num_checkpoints_to_keep',), text)
    names: dict[tuple[str, ...], str] = {('save_filename',): config.save_filename}
    prefix = getattr(getattr(config.parallelism_config, 'fsdp', None), 'sharded_ckpt_prefix_dir', None)
    if prefix is not None:  # a setting of FSDP1 alone
        names[('parallelism_config', 'fsdp', 'sharded_ckpt_prefix_dir')] = prefix
    for path, name in names.items():
        if 'ba{batch}' not in name or '/' in name or (path == ('save_filename',) and not name.endswith('.pt')):
            ending = ' and end in .pt, uncompressed' if path == ('save_filename',) else ''
            text = (
                f'{name!r} is no name to find the newest whole checkpoint by; it must hold ba{{batch}}, without '
                f'folders{ending}'
            )
            yield Problem(path, text)


def _averages(config: Config) -> list[Problem]:
    """Sampling from averaged weights needs an algorithm that averages; Composer's own fails when sharded."""
    problems = []
    if 'composer_ema' in config.algorithms and config.parallelism_config is not None:
        text = "Composer's EMA fails under FSDP1 and corrupts training when resumed under FSDP2; take algorithms.ema"
        problems.append(Problem(('algorithms', 'composer_ema'), text))
    for name, callback in config.callbacks.items():
        weights = getattr(callback.settings, 'weights', None) if is_ours('callback', callback.name) else None
        if weights == 'ema' and not any(hasattr(part.instance, 'averaged') for part in config.algorithms.values()):
            text = "'ema', but there is no algorithms.ema to average the weights; add it, or set weights: raw"
            problems.append(Problem(('callbacks', name, 'weights'), text))
    return problems


def _normalization(config: Config) -> list[Problem]:
    if config.latent_normalization is None:
        return []
    return [
        Problem((name,), f'{getattr(config, name)}: latent_normalization decides that; remove one of the two')
        for name, neutral in (('latent_scale', 1.0), ('latent_shift', 0.0))
        if getattr(config, name) != neutral
    ]


def _learned_variance(config: Config) -> list[Problem]:
    """The variance channels of the network and the loss that trains them come together or not at all."""
    trains_variance, learn_sigma = (
        config.objective.instance.learned_variance,
        getattr(config.model.settings, 'learn_sigma', None),
    )
    if learn_sigma is None:  # a network of another package, whose channels only its prediction shows
        return []
    key_path = ('model', 'learn_sigma')
    if trains_variance and not learn_sigma:
        text = (
            'false, but objective ddpm with learned_variance: true trains a variance that needs output channels; set '
            'it to true, or objective.learned_variance to false'
        )
        return [Problem(key_path, text)]
    if learn_sigma and not trains_variance:
        text = 'true adds output channels for a variance, which '
        if config.objective.name == 'ddpm':
            text += 'learned_variance: false does not train; set it to false, or objective.learned_variance to true'
        else:
            text += f'objective {config.objective.name!r} does not train (ddpm does); set it to false'
        return [Problem(key_path, text)]
    return []


def _samplers(config: Config) -> list[Problem]:
    """Callbacks that draw samples would find out at their first picture, after the data have been prepared."""
    problems = []
    for name, callback in config.callbacks.items():
        if not is_ours('callback', callback.name) or not hasattr(callback.settings, 'sampler'):
            continue
        sampler, num_steps = (getattr(callback.settings, key) for key in ('sampler', 'num_steps'))
        try:
            check_sampler(sampler, config.objective.instance)
        except ValueError as error:
            problems.append(Problem(('callbacks', name, 'sampler'), str(error)))
        most = getattr(config.objective.instance, 'num_timesteps', None)
        if most is not None and num_steps > most:
            text = f'{num_steps} steps, but the objective has {most} timesteps; take at most {most}'
            problems.append(Problem(('callbacks', name, 'num_steps'), text))
    return problems


def _rest(config: Config) -> list[Problem]:
    problems: list[Problem] = []
    if 'digits_quality' in config.callbacks and config.data.name != 'digits':
        text = (
            f'measures the ten digits, and the data are {config.data.name!r}; remove it (callbacks.digits_quality=null)'
        )
        problems.append(Problem(('callbacks', 'digits_quality'), text))
    scales = config.latent_scale if isinstance(config.latent_scale, list) else [config.latent_scale]
    if any(scale <= 0 for scale in scales):
        problems.append(
            Problem(('latent_scale',), f'{config.latent_scale} must be positive; latents are multiplied by it')
        )
    if config.compile and config.compile_config is not None:
        text = 'compiles the whole model while compile: true compiles its blocks; keep one of the two'
        problems.append(Problem(('compile_config',), text))
    data = config.data
    if isinstance(data, LatentsData) and data.cache_limit is not None:
        key_path = ('data', 'cache_limit')
        if data.remote is None:
            problems.append(Problem(key_path, 'needs data.remote: without one, nothing can be fetched again'))
        if isinstance(data.cache_limit, str) and not _BYTES.fullmatch(data.cache_limit.lower()):
            text = f"{data.cache_limit!r} is not a number of bytes; write for example '200gb'"
            problems.append(Problem(key_path, text))
    return problems


def check_files(config: Config, source: str = '') -> None:
    """Refuse a run whose data or checkpoint are not there. Loading does not do this, so that a plan needs no data.

    Args:
        config: A loaded configuration.
        source: What to call it in the message, for example the YAML file's name.

    Raises:
        ConfigError: The folder of latents is missing or holds no index, or ``load_path`` is missing.
    """
    data = config.data
    problems: list[Problem] = []
    if isinstance(data, LatentsData) and data.remote is None:
        for key in ('train_split', 'eval_split'):
            split = getattr(data, key)
            if split is None or os.path.isfile(os.path.join(data.local, split, 'index.json')):
                continue
            folder = os.path.join(data.local, split)
            fault = (
                'holds no index.json, so it is no finished MDS data set' if os.path.isdir(folder) else 'does not exist'
            )
            remedy = 'training reads latents that streaming_data/convert_imagenet.py has made; or give data.remote'
            without = '; data.eval_split=null trains without evaluation' if key == 'eval_split' else ''
            problems.append(Problem(('data', 'local'), f'{data.local!r}: {folder!r} {fault}; {remedy}{without}'))
    problems += _evaluation_files(config)
    path = config.load_path
    if path is not None and '://' not in path and '{' not in path and not os.path.exists(path):
        text = f'{path!r} does not exist; give a checkpoint, for example runs/<run_name>/latest-rank0.pt'
        problems.append(Problem(('load_path',), text))
    _raise(problems, source)


def _evaluation_files(config: Config) -> list[Problem]:
    """What the callback would otherwise miss after the data and the model have been prepared."""
    if 'evaluation' not in config.callbacks:
        return []
    arguments, key_path = config.callbacks['evaluation'].kwargs, ('callbacks', 'evaluation')
    problems, reference = [], os.path.abspath(arguments['reference'])
    made_later = config.data.name == 'digits' and reference.startswith(os.path.abspath(config.data.local) + os.sep)
    if not os.path.exists(reference) and not made_later and arguments['reference'] not in REFERENCES:
        text = f'{arguments["reference"]!r} does not exist; give a folder of images, an npz of the ADM suite, or MDS '
        text += 'images'
        problems.append(Problem((*key_path, 'reference'), text))
    if arguments.get('features', 'inception') == 'inception':
        try:
            find_weights(arguments.get('inception'))
        except UserError as error:
            problems.append(Problem((*key_path, 'inception'), str(error)))
    return problems


def check_machine(config: Config, source: str = '') -> None:
    """Refuse a run that this machine cannot do. Loading does not do this, so that a laptop can plan for a cluster.

    Args:
        config: A loaded configuration.
        source: What to call it in the message.

    Raises:
        ConfigError: The device is not there, or cannot compute as precision, kernel or attention say.
    """
    has_gpu = torch.cuda.is_available()
    problems: list[Problem] = []
    if config.device == 'gpu' and not has_gpu:
        problems.append(
            Problem(('device',), "'gpu': torch finds no CUDA device here; take device=cpu or another machine")
        )
    on_cpu = config.device == 'cpu' or (config.device is None and not has_gpu)
    problems += sharding_needs_gpu(config) if on_cpu else []
    precision: Any = getattr(config.precision, 'value', config.precision)
    if on_cpu and precision in ('amp_bf16', 'amp_fp16', 'amp_fp8'):
        text = f'{precision!r} needs a GPU, and the run would be on the CPU; take precision=fp32'
        problems.append(Problem(('precision',), text))
    if config.model.kwargs.get('kernel') == 'fused':
        reason = fused_refusal(torch.device('cpu' if on_cpu else 'cuda'))
        if reason is not None:
            text = f"'fused' cannot run here: {reason}; take model.kernel=torch, which gives the same result"
            problems.append(Problem(('model', 'kernel'), text))
    problems += attention_problems(config, on_cpu)
    if on_cpu and precision is None and 'low_precision_layer_norm' in config.algorithms:
        text = 'does nothing here: without a precision, Composer trains in float32 on the CPU; take it out'
        problems.append(Problem(('algorithms', 'low_precision_layer_norm'), text))
    _raise(problems, source)


def _raise(problems: list[Problem], source: str) -> None:
    if problems:
        raise ConfigError.from_problems(problems, lambda path: source)
