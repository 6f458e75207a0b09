"""Rules that join several settings of a configuration, and those about its files."""

import itertools
import os
import re
from collections.abc import Iterator

import torch

from tread_composer.algorithms.rules import conflict, limits
from tread_composer.config.errors import ConfigError, Problem
from tread_composer.config.places import place_problems
from tread_composer.config.registry import resolve
from tread_composer.config.sections import LatentsData
from tread_composer.config.sharding import sharding_problems
from tread_composer.config.tree import Config
from tread_composer.latent_diffusion import LatentDiffusion

__all__ = ['check_files', 'joint_problems']

_BYTES = re.compile(r'\d+(\.\d+)?\s*[kmgt]?b')


def joint_problems(config: Config, world_size: int) -> list[Problem]:
    """What is wrong between settings that are each right; ``world_size`` is the number of ranks."""
    problems = [*_batches(config, world_size), *sharding_problems(config, world_size), *_answers(config, 'problems')]
    for rule in (_preset, _combinations, _composers, _saving, _learned_variance, _rest, place_problems):
        problems += rule(config)
    return problems


def _batches(config: Config, world_size: int) -> Iterator[Problem]:
    for name in ('global_train_batch_size', 'global_eval_batch_size'):
        size = getattr(config, name)
        if size % world_size:
            nearest = max(1, round(size / world_size)) * world_size
            yield Problem(
                (name,), f'{size} does not divide among {world_size} ranks; take a multiple, such as {nearest}'
            )
    size, micro = config.global_train_batch_size, config.device_train_microbatch_size
    per_rank = size // world_size
    if isinstance(micro, int) and size % world_size == 0 and (micro < 1 or per_rank % micro):
        divisors = ', '.join(str(n) for n in range(1, per_rank + 1) if per_rank % n == 0)
        text = f'{micro} does not divide the {per_rank} samples of one rank ({size} / {world_size}); take one of '
        yield Problem(('device_train_microbatch_size',), text + divisors)
    if micro == 'auto' and not torch.cuda.is_available():
        text = "'auto' tries sizes until the GPU runs out of memory, and this machine has no GPU; give a number"
        yield Problem(('device_train_microbatch_size',), text)


def _preset(config: Config) -> Iterator[Problem]:
    """A published size by ``preset``, or all sizes one by one."""
    arguments = config.model.kwargs
    presets = getattr(resolve('backbone', config.model.name), 'presets', {})
    if not presets:
        return
    sizes = {name: arguments.get(name) for name in next(iter(presets.values()))}
    if 'preset' in arguments:
        rule = f'the preset {arguments["preset"]!r} has decided that; remove it, or the preset and give all sizes'
        yield from (Problem(('model', name), f'{size}: {rule}') for name, size in sizes.items() if size is not None)
        return
    text = f'is missing; give it, or all sizes by one name, for example preset: {next(iter(presets))!r}'
    yield from (Problem(('model', name), text) for name, size in sizes.items() if size is None)
    width, heads = sizes.get('hidden_size'), sizes.get('num_heads')
    # Published sizes fit; of free ones this is the usual slip.
    if width and heads and width % heads:
        yield Problem(('model', 'hidden_size'), f'{width} does not divide among {heads} heads; take a multiple')


def _answers(config: Config, question: str) -> Iterator[Problem]:
    """What algorithms and callbacks themselves have against the run, those that have a method of this name."""
    for table, parts in (('algorithms', config.algorithms), ('callbacks', config.callbacks)):
        for name, part in parts.items():
            # The class is asked whether it has one: callbacks of others are not made before the run.
            if hasattr(resolve(part.kind, part.name), question):
                for setting, text in getattr(part.instance, question)(config):
                    yield Problem((table, name, setting) if setting else (table, name), text)


def _combinations(config: Config) -> Iterator[Problem]:
    """Algorithms that may not stand beside each other."""
    for (name, component), (partner_name, partner) in itertools.combinations(config.algorithms.items(), 2):
        reason = conflict(type(component.instance), type(partner.instance))
        if reason is not None:
            text = f'cannot stand beside algorithms.{partner_name}: {reason}. Take one of them out, e.g. algorithms.'
            yield Problem(('algorithms', name), f'{text}{name}=null')


def _composers(config: Config) -> Iterator[Problem]:
    """What Composer's own algorithms cannot do; beside one of ours, a Trainer written by hand refuses the same."""
    for name, component in config.algorithms.items():
        path, remedy, algorithm = ('algorithms', name), f'take it out (algorithms.{name}=null)', component.instance
        reasons = limits(algorithm)
        if 'shard' in reasons and config.parallelism_config is not None:
            yield Problem(path, reasons['shard'])
        reason = conflict(LatentDiffusion, type(algorithm)) or reasons.get('train')
        if reason is not None:
            yield Problem(path, f'cannot work in this run: {reason}; {remedy}')
        if 'save' in reasons and config.save_folder is not None:
            text = f'cannot work in this run: {reasons["save"]}; {remedy}, or save nothing (save_folder=null)'
            yield Problem(path, text)
        reason = reasons.get('resume')
        if reason is not None and config.autoresume:
            instead = 'set autoresume=false and train in one piece'
            yield Problem(path, f'a run with it cannot be resumed: {reason}; {instead}, or {remedy}')
        elif reason is not None and config.load_path is not None and not config.load_weights_only:
            instead = 'set load_weights_only=true to start a new run'
            yield Problem(path, f'a run with it cannot be resumed: {reason}; {instead}, or {remedy}')
        if name == 'low_precision_layer_norm' and config.precision_name in ('fp32', 'amp_fp8'):
            text = f'does nothing in precision {config.precision_name!r}: it lowers what amp_bf16 or amp_fp16 keep in '
            yield Problem(path, f'{text}float32; set precision=amp_bf16, or {remedy}')


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
    if config.save_in_background and getattr(config.fsdp, 'state_dict_type', 'full') == 'sharded':
        text = (
            'true is for full checkpoints, which one rank writes; of a sharded one each rank writes its share at once'
        )
        yield Problem(('save_in_background',), f'{text}; set it to false')
    if config.save_in_background and '://' in (config.save_folder or ''):
        yield Problem(('save_in_background',), 'true needs a local save_folder; set it to false')
    if config.save_folder is not None and config.autoresume and config.save_weights_only:
        text = (
            'true saves no optimizer, average or position in the data, so autoresume would begin anew with trained '
            'weights and call it the same run; set it to false, or autoresume to false'
        )
        yield Problem(('save_weights_only',), text)


def _learned_variance(config: Config) -> Iterator[Problem]:
    """The variance channels of the network and the loss that trains them come together or not at all."""
    objective, learn_sigma = config.objective, getattr(config.model.settings, 'learn_sigma', None)
    trains_variance = objective.instance.learned_variance
    if learn_sigma is None or learn_sigma == trains_variance:  # None: of another package, only its prediction shows it
        return
    text = f'{str(learn_sigma).lower()}, but objective {objective.name!r} trains {"a" if trains_variance else "no"} '
    text += f'variance, which is what these output channels are for; set it to {str(trains_variance).lower()}'
    if 'learned_variance' in objective.kwargs:
        text += f', or objective.learned_variance to {str(learn_sigma).lower()}'
    yield Problem(('model', 'learn_sigma'), text)


def _rest(config: Config) -> Iterator[Problem]:
    for name, neutral in (('latent_scale', 1.0), ('latent_shift', 0.0)):
        value = getattr(config, name)
        if config.latent_normalization is not None and value != neutral:
            yield Problem((name,), f'{value}: latent_normalization decides that; remove one of the two')
    if config.latent_scale == 'auto' and config.latent_shift != 0:
        yield Problem(('latent_shift',), f'{config.latent_shift}: latent_scale: auto decides that; remove it')
    if config.precision_config is not None and config.precision_name != 'amp_fp8':
        yield Problem(('precision_config',), 'is for precision amp_fp8 only; take it out')
    if config.compile and config.compile_config is not None:
        text = 'compiles the whole model while compile: true compiles its blocks; keep one of the two'
        yield Problem(('compile_config',), text)
    limit = getattr(config.data, 'cache_limit', None)
    if limit is not None and getattr(config.data, 'remote', None) is None:
        text = 'needs data.remote: without one, nothing can be fetched again'
        yield Problem(('data', 'cache_limit'), text)
    if isinstance(limit, str) and not _BYTES.fullmatch(limit.lower()):
        yield Problem(('data', 'cache_limit'), f"{limit!r} is not a number of bytes; write for example '200gb'")


def check_files(config: Config, source: str = '') -> None:
    """Refuse a run whose data or checkpoint are not there. Loading does not do this, so that a plan needs no data.

    Args:
        config: A loaded configuration.
        source: What to call it in the message, for example the YAML file's name.

    Raises:
        ConfigError: The folder of latents is missing or holds no index, or another file is missing.
    """
    problems = [*_data_files(config), *_answers(config, 'missing_files')]
    path = config.load_path
    if path is not None and '://' not in path and '{' not in path and not os.path.exists(path):
        text = f'{path!r} does not exist; give a checkpoint, for example runs/<run_name>/latest-rank0.pt'
        problems.append(Problem(('load_path',), text))
    if problems:
        raise ConfigError.from_problems(problems, lambda path: source)


def _data_files(config: Config) -> Iterator[Problem]:
    data = config.data
    if not isinstance(data, LatentsData) or data.remote is not None:
        return
    for split in filter(None, (data.train_split, data.eval_split)):
        folder = os.path.join(data.local, split)
        if os.path.isfile(os.path.join(folder, 'index.json')):
            continue
        fault = 'does not exist'
        if os.path.isdir(folder):
            fault = 'holds no index.json, so it is no finished MDS data set'
        remedy = 'training reads latents that streaming_data/convert_imagenet.py has made; or give data.remote'
        if split != data.train_split:
            remedy += '; data.eval_split=null trains without evaluation'
        yield Problem(('data', 'local'), f'{data.local!r}: {folder!r} {fault}; {remedy}')
