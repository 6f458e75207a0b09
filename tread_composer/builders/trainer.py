"""From a resolved configuration to the Composer ``Trainer``."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from composer import Callback, Evaluator, Trainer
from composer.core import DataSpec
from composer.profiler import JSONTraceHandler, Profiler, cyclic_schedule
from composer.utils import dist, get_device, reproducibility

from tread_composer.algorithms.rules import limits
from tread_composer.autoencoders import Pretrained
from tread_composer.builders.cost import count_macs
from tread_composer.builders.model import build_denoiser, build_model
from tread_composer.builders.run_data import build_loaders, identity, prepare_data
from tread_composer.builders.run_folder import (
    check_run_folder,
    decisive_settings,
    part_folder,
    run_folder,
    write_run_files,
)
from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver
from tread_composer.callbacks.data_wait import DataWait
from tread_composer.callbacks.epoch_is_whole import EpochIsWhole
from tread_composer.callbacks.keyed_draws import KeyedDraws
from tread_composer.callbacks.progress import ProgressLines
from tread_composer.callbacks.resume_contract import ResumeContract
from tread_composer.callbacks.sampling import SamplingCallback
from tread_composer.callbacks.update_guard import UpdateGuard
from tread_composer.config import Config
from tread_composer.config.checks import attention_dtypes
from tread_composer.config.registry import resolve
from tread_composer.core.batch import SAMPLE_IDS
from tread_composer.core.errors import UserError, first_line
from tread_composer.core.flatten import flatten
from tread_composer.data.manifest import Manifest
from tread_composer.io.checkpoint_reader import restricted_loading

__all__ = ['build_trainer', 'compile_blocks']


def build_trainer(
    config: Config, splits: Mapping[str, Manifest] | None = None, skipped_batches: Collection[int] = ()
) -> Trainer:
    """Everything, joined; ``UserError`` if data, checkpoint or run folder contradict the configuration.

    Writes ``config.yaml``, ``data.json`` and ``environment.json`` into ``save_folder``.

    Args:
        splits: What ``prepare_data`` returned; it is called if None.
        skipped_batches: Batches, counted from 0, that leave the weights as they are (``on_nonfinite: rewind``).
    """
    splits = prepare_data(config) if splits is None else splits
    config = config.normalized(splits['train'])
    check_run_folder(config)
    # The Trainer seeds too, but only after it was given the model: two runs of one seed must begin with equal weights.
    reproducibility.seed_all(config.seed)
    contract = {**decisive_settings(config.to_dict()), 'training_data': identity(splits['train'])}
    if any('shard' in limits(part.instance) for part in config.algorithms.values()):
        contract['ranks'] = dist.get_world_size()
    algorithms = _taken(config, 'algorithms', contract)
    model = build_model(config, splits['train'], algorithms=algorithms)
    _choose_attention(config, model.denoiser)
    train, evaluation = build_loaders(config, splits)
    tokens = getattr(model.denoiser, 'num_tokens', 0)
    train = DataSpec(train, get_num_tokens_in_batch=lambda batch: tokens * len(batch[SAMPLE_IDS]))
    if 'speed_monitor' in config.callbacks:
        with contextlib.suppress(UserError):  # what cannot be counted beforehand can be trained all the same
            model.flops_per_batch = _batch_flops(config, splits['train'], algorithms)  # type: ignore[assignment]
    callbacks = _callbacks(config, contract, skipped_batches)
    if isinstance(model.autoencoder, Pretrained) and any(
        isinstance(callback, SamplingCallback) for callback in callbacks
    ):
        _ = model.autoencoder.network  # they decode: weights that are not there or not the data's are refused now
    loggers = list(_taken(config, 'loggers', contract).values())
    arguments = config.trainer_arguments()
    # Lines in place of Composer's bar: they say more, and a log file would get thousands of its escapes.
    if arguments.pop('progress_bar'):
        loggers.append(ProgressLines())
    if arguments['profiler'] is not None:
        arguments['profiler'] = _profiler(arguments['profiler'], config)
    if config.compile and dist.get_world_size() == 1:
        arguments['compile_config'] = {}
    elif config.compile:
        compile_blocks(model.denoiser)
    with _misfit_in_words(config), restricted_loading(), _signal_files_by_node():
        trainer = Trainer(
            model=model,
            train_dataloader=train,
            eval_dataloader=None if evaluation is None else Evaluator(label='eval', dataloader=evaluation),
            optimizers=config.optimizer.build(model.parameters()),
            schedulers=config.scheduler.take(),
            algorithms=list(algorithms.values()),
            callbacks=callbacks,
            loggers=loggers,
            progress_bar=False,
            **arguments,
        )
    # Only now: a run that Composer refuses leaves no configuration behind.
    write_run_files(config, splits['train'])
    for logger in loggers:
        if hasattr(logger, 'log_config'):
            logger.log_config(flatten(config.to_dict()), config.to_yaml())
            if config.save_folder is not None:
                logger.log_file(run_folder(config) / 'environment.json')
    return trainer


def _callbacks(config: Config, contract: dict[str, Any], skipped_batches: Collection[int]) -> list[Callback]:
    """Those of every run, those of the configuration, and the saver of a local folder."""
    guard = UpdateGuard(config.on_nonfinite, config.spike_factor, skipped_batches)
    callbacks: list[Callback] = [KeyedDraws(), EpochIsWhole(), DataWait(), ResumeContract(contract), guard]
    callbacks += _taken(config, 'callbacks', contract).values()
    folder = config.save_folder
    if folder is None or '://' in folder:
        return callbacks
    # What the Trainer would make of `save_*` itself, but of our class, which it then takes for autoresume too.
    latest = config.save_latest_filename
    saver = WholeCheckpointSaver(
        in_background=config.save_in_background,
        folder=folder,
        filename=config.save_filename,
        remote_file_name=f'{folder}/{config.save_filename}',
        latest_filename=latest,
        latest_remote_file_name=None if latest is None else f'{folder}/{latest}',
        save_interval=config.save_interval,
        overwrite=config.save_overwrite,
        num_checkpoints_to_keep=config.save_num_checkpoints_to_keep,
        weights_only=config.save_weights_only,
        ignore_keys=config.save_ignore_keys,
    )
    return [*callbacks, saver]


def _batch_flops(
    config: Config, manifest: Manifest, algorithms: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], float]:
    """Composer's ``speed_monitor`` asks for the FLOPs of a batch: those really done, fewer while a route is on.

    6 for each multiply-add of a forward pass: 2 there, twice as many backward. ``UserError`` where an algorithm's
    savings change from batch to batch.
    """
    facts = manifest.sizes
    savers = {name: algorithm for name, algorithm in algorithms.items() if hasattr(algorithm, 'rehearse')}
    for saver in savers.values():
        saver.cost_window()
    with torch.device('meta'):
        denoiser = build_denoiser(config, **facts)
    saving = count_macs(denoiser, facts, savers)
    dense = count_macs(denoiser, facts)  # now with what they have added, such as a decoder

    def flops(batch: Mapping[str, Any]) -> float:
        saves = any(getattr(saver, 'active', True) for saver in savers.values())
        return 6.0 * (saving if saves else dense) * len(batch[SAMPLE_IDS])

    return flops


def _profiler(settings: Mapping[str, Any], config: Config) -> Profiler:
    """Composer's profiler; the run's folder gets ``torch_traces`` and ``composer_traces``."""
    is_local = config.save_folder is not None and '://' not in config.save_folder
    folder = run_folder(config) if is_local else Path(config.run_name)
    others = {
        'torch_prof_folder': str(folder / 'torch_traces'),
        'torch_prof_remote_file_name': None,  # Composer would upload
        'torch_prof_memory_remote_file_name': None,
        'torch_prof_overwrite': True,  # a resumed run finds the traces of its first part; other batches, other names
        **{name: value for name, value in settings.items() if name != 'schedule'},
    }
    traces = JSONTraceHandler(
        folder=str(folder / 'composer_traces'),
        remote_file_name=None,
        merged_trace_filename=None,
        merged_trace_remote_file_name=None,
        overwrite=others['torch_prof_overwrite'],
    )
    schedule = cyclic_schedule(**settings.get('schedule', {}))
    return Profiler(schedule=schedule, trace_handlers=[traces], **others)


def _choose_attention(config: Config, denoiser: Any) -> None:
    """``model.attention`` on the device of this rank, with a line that says what runs where it is not torch's own."""
    name = config.model.kwargs.get('attention', 'sdpa')
    if name == 'sdpa':
        return
    on_gpu = get_device(config.device).name == 'gpu'
    device = torch.device('cuda', dist.get_local_rank()) if on_gpu else torch.device('cpu')
    try:
        line = denoiser.use_attention(name, device, dtypes=attention_dtypes(config, device))
    except UserError as error:
        raise UserError(f'model.attention: {error}') from None
    if dist.get_global_rank() == 0:
        print(line, flush=True)


@contextlib.contextmanager
def _signal_files_by_node() -> Iterator[None]:
    """Give each node a file of its own to wait for: on a shared disk the first to remove it fails the others."""
    original = dist.get_node_signal_file_name
    dist.get_node_signal_file_name = lambda *args, **kwargs: f'{original(*args, **kwargs)}_{dist.get_node_rank()}'
    try:
        yield
    finally:
        dist.get_node_signal_file_name = original


@contextlib.contextmanager
def _misfit_in_words(config: Config) -> Iterator[None]:
    """Weights of another network are the user's to exchange: a message, not a traceback."""
    try:
        yield
    except RuntimeError as error:
        if config.load_path is None or 'loading state_dict' not in str(error):
            raise
        raise UserError(
            f'load_path: the weights in {config.load_path!r} do not fit the model of this run. Give it the model '
            f'section and the algorithms that change the network (maskdit) of the run that saved them.\n{error}'
        ) from None


def _taken(config: Config, table: str, contract: Mapping[str, Any]) -> dict[str, Any]:
    """Algorithms, callbacks or loggers, with what only the run can tell them: where they write, whose files those are.

    ``UserError`` where a constructor refuses: those of others, which may write or connect, are called here only.
    """
    parts: dict[str, Any] = {}
    for name, component in getattr(config, table).items():
        try:
            parts[name] = part = component.take()
        except (UserError, AttributeError, NameError):  # the latter are bugs of that part, and want a traceback
            raise
        except Exception as error:  # a constructor may refuse in any way
            title = resolve(component.kind, component.name).__name__
            raise UserError(f'{table}.{name}: {title} refuses these arguments: {first_line(error)}') from error
        if hasattr(part, 'default_folder') and 'folder' not in component.kwargs and config.save_folder is not None:
            part.folder = str(part_folder(component, run_folder(config), config.run_name))
        if getattr(part, 'settings_digest', '') is None:
            text = json.dumps(contract, sort_keys=True, default=str)
            part.settings_digest = f'sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}'
    return parts


def compile_blocks(denoiser: Any, **settings: Any) -> None:
    """Compile each block of a network in place: for several processes, whose DDP and FSDP break a whole graph.

    A block is what the network's ``fsdp_wrap_fn`` says FSDP is to gather at once; ``UserError`` if it has none.
    """
    if not hasattr(denoiser, 'fsdp_wrap_fn'):
        raise UserError(
            f'compile: true on several ranks compiles block by block, and {type(denoiser).__name__} does not say what '
            f'its blocks are (a method fsdp_wrap_fn(module) -> bool); set compile=false, or give it one'
        )
    for module in denoiser.modules():
        if denoiser.fsdp_wrap_fn(module):
            module.compile(**settings)
