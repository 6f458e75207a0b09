"""Whether the settings of a configuration fit each other, its files, and this machine."""

import itertools
import os
import re
import string
from collections.abc import Iterator

import torch
from composer.core import Time
from composer.utils import parse_uri
from composer.utils.file_helpers import BACKEND_TO_OBJECT_STORE_FACTORY

from tread_composer.algorithms.rules import conflict, limits
from tread_composer.config.errors import Problem, refuse
from tread_composer.config.registry import resolve
from tread_composer.config.sections import LatentsData
from tread_composer.config.tree import Config, backbone_arguments
from tread_composer.core.errors import UserError
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.models.attention import choose_attention
from tread_composer.models.ssd import fused_refusal

__all__ = ['attention_dtypes', 'check_files', 'check_machine', 'joint_problems']

_BYTES = re.compile(r'\d+(\.\d+)?\s*[kmgt]?b')
_FSDP = ('parallelism_config', 'fsdp')
_STORES = (*BACKEND_TO_OBJECT_STORE_FACTORY, 'dbfs')
_OF_RANKS = ('rank', 'local_rank', 'world_size', 'local_world_size', 'node_rank')
_OF_TIME = ('epoch', 'batch', 'batch_in_epoch', 'sample', 'sample_in_epoch', 'token', 'token_in_epoch', 'total_wct',
            'epoch_wct', 'batch_wct')  # fmt: skip
# A folder is one for the whole run: what is resumed, compared and sampled lies in it.
_PLACEHOLDERS = {
    'save_folder': ('run_name',),
    'save_filename': ('run_name', *_OF_RANKS, *_OF_TIME),
    'save_latest_filename': ('run_name', *_OF_RANKS),
    'load_path': ('run_name', *_OF_RANKS),
}


def joint_problems(config: Config, world_size: int) -> list[Problem]:
    """What is wrong between settings that are each right; ``world_size`` is the number of ranks."""
    problems = [*_batches(config, world_size), *_sharding(config, world_size), *_answers(config, 'problems')]
    for rule in (_preset, _combinations, _composers, _saving, _learned_variance, _rest, _places):
        problems += rule(config)
    return problems


def _batches(config: Config, world_size: int) -> Iterator[Problem]:
    for name in ('global_train_batch_size', 'global_eval_batch_size'):
        size = getattr(config, name)
        if size % world_size:
            nearest = max(1, round(size / world_size)) * world_size
            text = f'{size} does not divide among {world_size} ranks; take a multiple, such as {nearest}'
            yield Problem((name,), text)
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
    length, ratio = Time.from_timestring(config.max_duration), config.scale_schedule_ratio
    if (length * ratio).value == 0:
        text = f'{ratio} times max_duration {config.max_duration} leaves nothing to train; take a longer one of the two'
        yield Problem(('scale_schedule_ratio',), text)
    if config.load_weights_only and config.load_path is None:  # it would train from fresh weights
        text = 'true, but there is no load_path whose weights it could load; give one, or leave this out'
        yield Problem(('load_weights_only',), text)
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


def _sharding(config: Config, world_size: int) -> Iterator[Problem]:
    """What is wrong between the settings of FSDP, the number of ranks and the rest of the run."""
    fsdp, searches = config.fsdp, config.device_train_microbatch_size == 'auto'
    if fsdp is None:
        return
    if _is_second():
        if searches:
            text = "'auto' works with DDP and FSDP1 alone in Composer; give a number, or set FSDP_VERSION=1"
            yield Problem(('device_train_microbatch_size',), text)
        return
    if searches and torch.__version__ >= '2.7.1':  # ordered as a version
        # What the search puts in place of FSDP1's unshard is defined below that version only; above it is a NameError.
        text = (
            f"'auto': Composer searches under FSDP1 with torch 2.6 to 2.7.0 only, and this is torch "
            f'{torch.__version__}; give a number, or install torch 2.7.0 (make TORCH=2.7)'
        )
        yield Problem(('device_train_microbatch_size',), text)
    if fsdp.cpu_offload:
        text = (
            'true: Composer has no CPU offload of parameters (its own words: not supported yet). Shard over more '
            'ranks, or move what activations need: activation_checkpointing or activation_cpu_offload: true'
        )
        yield Problem((*_FSDP, 'cpu_offload'), text)
    # HSDP: replicas, each sharded over some of the ranks.
    replicas, shards = fsdp.data_parallel_replicate_degree or 1, fsdp.data_parallel_shard_degree
    if replicas > 1 and shards == 1:
        # torch takes a shard group of one rank for no sharding at all and then forgets the replicas.
        text = (
            f'1 with data_parallel_replicate_degree {replicas}: nothing would be sharded, and torch would not average '
            f'the gradients of the replicas either. Take parallelism_config out (that is DDP), or 2 and more shards'
        )
        yield Problem((*_FSDP, 'data_parallel_shard_degree'), text)
        return
    product = replicas * (shards if shards != -1 else max(1, world_size // replicas))
    if product != world_size:
        text = (
            f'{replicas} replicas of {shards if shards != -1 else "some"} shards do not make up {world_size} ranks; '
            f'the two degrees must multiply to the number of ranks, and one shard degree of -1 fills up'
        )
        yield Problem((*_FSDP, 'data_parallel_replicate_degree'), text)


def _is_second() -> bool:
    return os.environ.get('FSDP_VERSION', '1') == '2'  # where Composer reads it


def _places(config: Config) -> Iterator[Problem]:
    """What is wrong with where checkpoints go and come from, as far as the words tell."""
    for name, placeholders in _PLACEHOLDERS.items():
        text = getattr(config, name)
        if text is not None:
            fault = _placeholder_fault(text, placeholders) or (_address_fault(text) if 'filename' not in name else None)
            if fault is not None:
                yield Problem((name,), f'{text!r} {fault}')
    folders = {
        ('save_folder',): config.save_folder,
        ('load_path',): config.load_path,
        ('data', 'local'): config.data.local,
    }
    for path, folder in folders.items():
        if folder is not None and folder.startswith('~/'):  # a folder called ~ would be made where the run is started
            text = f'{folder!r}: nobody replaces ~ here; write the whole path, or ${{oc.env:HOME}}{folder[1:]}'
            yield Problem(path, text)
    if config.save_folder is None:
        return
    latest = config.save_latest_filename
    if latest is not None and '/' in latest:
        yield Problem(('save_latest_filename',), f'{latest!r} must be a name within save_folder, without folders')
    text = 'is no name to find the newest whole checkpoint by; it must hold ba{batch}, without folders'
    name = config.save_filename
    if 'ba{batch}' not in name or '/' in name or not name.endswith('.pt'):
        yield Problem(('save_filename',), f'{name!r} {text} and end in .pt, uncompressed')
    prefix = getattr(config.fsdp, 'sharded_ckpt_prefix_dir', None)  # FSDP1's
    if prefix is not None and ('ba{batch}' not in prefix or '/' in prefix):
        yield Problem(('parallelism_config', 'fsdp', 'sharded_ckpt_prefix_dir'), f'{prefix!r} {text}')


def _placeholder_fault(text: str, placeholders: tuple[str, ...]) -> str | None:
    shown = ', '.join(f'{{{name}}}' for name in placeholders)
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        return f'has a brace that is no placeholder ({error}); known are {shown}'
    unfilled = [f'{{{name}}}' for name in names if name not in placeholders]
    return f'has {", ".join(unfilled)}, which nobody fills in; known are {shown}' if unfilled else None


def _address_fault(text: str) -> str | None:
    if not text.strip():
        return 'is empty; write null for none'
    if '://' not in text:
        return None
    store, bucket, _ = parse_uri(text)
    if store not in _STORES:
        return f'is at no store that Composer knows: {", ".join(f"{name}://" for name in _STORES)}, or a path'
    return None if bucket else f'names no bucket; write {store}://bucket/folder'


def check_files(config: Config, source: str = '') -> None:
    """``ConfigError`` if the folder of latents is missing or holds no index, or another file is missing.

    Loading does not ask, so that a plan needs no data. ``source`` is what to call the configuration.
    """
    problems = [*_data_files(config), *_answers(config, 'missing_files')]
    loading = ('callbacks', 'load_checkpoint')  # Composer's, beside its keyword
    of_callback = config.callbacks[loading[1]].kwargs['load_path'] if loading[1] in config.callbacks else None
    for place, path in ((('load_path',), config.load_path), ((*loading, 'load_path'), of_callback)):
        if path is not None and '://' not in path and '{' not in path and not os.path.exists(path):
            text = f'{path!r} does not exist; give a checkpoint, for example runs/<run_name>/latest-rank0.pt'
            problems.append(Problem(place, text))
    refuse(problems, lambda path: source)


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


def check_machine(config: Config, source: str = '') -> None:
    """``ConfigError`` if this machine has no such device, or one that cannot do as precision, kernel or attention say.

    Loading does not ask, so that a laptop can plan for a cluster. ``source`` is what to call the configuration.
    """
    refuse(_machine(config), lambda path: source)


def _machine(config: Config) -> Iterator[Problem]:
    has_gpu, precision = torch.cuda.is_available(), config.precision_name
    if config.device == 'gpu' and not has_gpu:
        text = "'gpu': torch finds no CUDA device here; take device=cpu or another machine"
        yield Problem(('device',), text)
    if config.device == 'mps' and not torch.backends.mps.is_available():
        yield Problem(('device',), "'mps': this is no Mac with Apple's GPU; take device=cpu")
    on_cpu = config.device == 'cpu' or (config.device is None and not has_gpu)
    # Composer gives FSDP1 the CUDA device without asking whether there is one.
    if on_cpu and config.fsdp is not None and not _is_second():
        text = 'FSDP1 needs a GPU in Composer; on the CPU set FSDP_VERSION=2 in the environment, or take it out (DDP)'
        yield Problem(_FSDP, text)
    if on_cpu and precision in ('amp_bf16', 'amp_fp16', 'amp_fp8'):
        text = f'{precision!r} needs a GPU, and the run would be on the CPU; take precision=fp32'
        yield Problem(('precision',), text)
    if on_cpu and config.optimizer.kwargs.get('capturable'):
        yield Problem(('optimizer', 'capturable'), 'true is for CUDA graphs, and the run would be on the CPU')
    if config.model.kwargs.get('kernel') == 'fused':
        reason = fused_refusal(torch.device('cpu' if on_cpu else 'cuda'))
        if reason is not None:
            text = f"'fused' cannot run here: {reason}; take model.kernel=torch, which gives the same result"
            yield Problem(('model', 'kernel'), text)
    fault = _attention_fault(config, on_cpu)
    if fault is not None:
        yield Problem(('model', 'attention'), fault)
    if on_cpu and precision is None and 'low_precision_layer_norm' in config.algorithms:
        text = 'does nothing here: without a precision, Composer trains in float32 on the CPU; take it out'
        yield Problem(('algorithms', 'low_precision_layer_norm'), text)


def _attention_fault(config: Config, on_cpu: bool) -> str | None:
    """Tries ``model.attention`` with the sizes that the configuration says; torch's own needs no trial."""
    name, sizes = config.model.kwargs.get('attention', 'sdpa'), backbone_arguments(config.model)
    if name == 'sdpa' or not {'hidden_size', 'num_heads'} <= sizes.keys():
        return None
    if name == 'flex' and on_cpu and config.compile:
        return "'flex' has no compiled backward pass on a CPU; take compile: false, or attention: sdpa"
    heads = sizes['num_heads'], sizes['hidden_size'] // sizes['num_heads']
    device = torch.device('cpu') if on_cpu else torch.device('cuda', int(os.environ.get('LOCAL_RANK', '0')))
    try:
        choose_attention(name, device, (heads,), attention_dtypes(config, device), True)
    except UserError as error:
        return str(error)
    return None


def attention_dtypes(config: Config, device: torch.device) -> tuple[torch.dtype, ...]:
    """What attention runs in: the dtype of training on this device, and float32, in which images are drawn."""
    # Composer's default where the configuration has no precision.
    precision = config.precision_name or ('fp32' if device.type == 'cpu' else 'amp_fp16')
    narrow = {'amp_bf16': torch.bfloat16, 'amp_fp8': torch.bfloat16, 'amp_fp16': torch.float16}
    return tuple(dict.fromkeys((narrow.get(precision, torch.float32), torch.float32)))
