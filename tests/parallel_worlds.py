"""Trainings in several processes, for test_parallel.py. ``train`` also runs in the test's own, as the one rank."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as torch_dist
from composer import Callback, Evaluator
from composer.core import Event
from composer.utils import dist
from composer.utils.parallelism import FSDP2Config
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.data import DataLoader

from tests.helpers import Images, Recorder, loader, make_trainer, randomised, tiny_model
from tread_composer.algorithms.averages import shards_of
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.power_ema import PowerEMA
from tread_composer.algorithms.tread import Tread
from tread_composer.builders.trainer import compile_blocks
from tread_composer.core.batch import NOISE, SAMPLE_IDS
from tread_composer.core.errors import UserError
from tread_composer.models.lightning_dit import LightningDiT
from tread_composer.objectives import DDPM

DECAY = 0.7
DEPTH = 4
BATCH = 12  # of all ranks together
STRATEGIES = ('ddp', 'fsdp2', 'fsdp1')


def summed_instead_of_averaged() -> float:
    """By how much FSDP2's gradients are too large here: gloo's reduce-scatter sums where it is told to average.

    pytorch issue 162338: torch 2.7 on the CPU only, repaired in 2.13; NCCL is right. So this asks the collective.
    """
    ranks = dist.get_world_size()
    if ranks == 1 or torch_dist.get_backend() == 'nccl':
        return 1.0
    out = torch.zeros(1)
    torch_dist.reduce_scatter_tensor(out, torch.ones(ranks), op=torch_dist.ReduceOp.AVG)
    assert out.item() in (1.0, ranks)
    return out.item()


class DivideGradients(Callback):
    """Makes FSDP2's gradients on gloo the average that they should be, see above."""

    def after_train_batch(self, state, logger):
        factor = summed_instead_of_averaged()
        for parameter in state.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(factor)


def whole_weights(model) -> dict[str, Tensor]:
    return {name: shard.whole(shard.local) for name, shard in shards_of(model).items()}


class Watch(Callback):
    """The whole weights at every step, an average of them kept by hand, and what evaluation had and found."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}
        self.at: dict[str, dict[str, Tensor]] = {}
        self.eval_losses: list[float] = []
        self.held = 0

    def fit_start(self, state, logger):
        self.held = sum(shard.local.numel() for shard in shards_of(state.model).values())
        self.at['start'] = whole_weights(state.model)
        self.average = {name: value.double() for name, value in self.at['start'].items()}

    def batch_end(self, state, logger):
        self.at['trained'] = whole_weights(state.model)
        for name, value in self.at['trained'].items():
            self.average[name] = DECAY * self.average[name] + (1 - DECAY) * value.double()

    def eval_start(self, state, logger):
        self.at['eval_start'] = whole_weights(state.model)

    def eval_end(self, state, logger):
        self.at['eval_end'] = whole_weights(state.model)
        self.eval_losses.append(float(state.eval_metrics['eval']['loss'].compute()))


class WithoutIds(Tread):
    """Sees a foreign batch: nothing says which sample a row is."""

    def apply(self, event, state, logger):
        hidden = state.batch.pop(SAMPLE_IDS) if event == Event.BATCH_START else None
        super().apply(event, state, logger)
        if hidden is not None:
            state.batch[SAMPLE_IDS] = hidden


@contextlib.contextmanager
def fsdp1_on_cpu() -> Iterator[None]:
    """Composer hands FSDP1 the CUDA device without asking whether there is one."""
    with mock.patch.object(torch.cuda, 'current_device', return_value=torch.device('cpu')):
        yield


def parallelism(strategy: str, **settings: Any) -> dict[str, Any]:
    if strategy == 'ddp':
        return {}
    if strategy == 'fsdp2':
        return {'parallelism_config': {'fsdp': FSDP2Config(**{'state_dict_type': 'full', **settings})}}
    # A full checkpoint of FSDP1 crashes torch on the CPU: see tests/gpu.
    return {'parallelism_config': {'fsdp': {'state_dict_type': 'sharded', **settings}}}


def evaluator() -> Evaluator:
    images = Images()
    sampler = dist.get_sampler(images, shuffle=False, drop_last=False)
    return Evaluator(label='eval', dataloader=DataLoader(images, batch_size=4, sampler=sampler))


def train(
    strategy: str,
    *,
    evaluate: bool = False,
    compiled: bool | str = False,
    fsdp: Any = None,
    snapshots: Path | None = None,
    draws: type[Tread] | None = None,
    **keywords: Any,
):
    """Four batches, or as many as ``max_duration`` says; returns what there is to compare, and the trainer.

    ``draws``: the kind of ``Tread`` whose routes are recorded.
    """
    model, watch, recorder, ema = tiny_model(depth=DEPTH), Watch(), Recorder(), EMA(DECAY)
    counter = CompileCounter()  # runs the captured graph as it is; fullgraph turns any break into an error
    if compiled:
        torch._dynamo.reset()
        compile_blocks(model.denoiser, backend=counter if compiled is True else compiled, fullgraph=True)
    callbacks = [recorder, *([DivideGradients()] if strategy == 'fsdp2' else []), *keywords.pop('callbacks', ())]
    if evaluate:
        callbacks.append(watch)
        keywords |= {'eval_dataloader': evaluator(), 'eval_interval': '2ba'}
    powers = [] if snapshots is None else [PowerEMA((0.05, 0.2), '4ba', folder=str(snapshots))]
    trainer = make_trainer(
        model,
        [(draws or Tread)(1, -2, 0.5), ema, *powers],
        callbacks,
        data=lambda: loader(batch_size=BATCH // dist.get_world_size(), shuffle=False),
        optimizers=torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9),
        **{'max_duration': '4ba', **parallelism(strategy, **(fsdp or {})), **keywords},
    )
    kept, routing = [], model.denoiser.blocks.routing
    if draws:
        model.denoiser.register_forward_pre_hook(lambda *_: kept.append(routing.kept[0].tolist()))
    trainer.fit()
    rows = [zip(b[SAMPLE_IDS], r, b[NOISE], strict=True) for b, r in zip(recorder.batches, kept, strict=False)]
    seen = {
        # Of each (batch, sample) its route and its noise.
        'draws': {(batch, s): (tuple(r), noise) for batch, row in enumerate(rows) for s, r, noise in row},
        'losses': [float.fromhex(loss) for loss in recorder.losses],
        'eval_losses': watch.eval_losses,
        'held': watch.held,
        'graphs': counter.frame_count,
        'at': watch.at,
        'by_hand': watch.average,
        'weights': whole_weights(trainer.state.model),
        'average': ema.state_dict()['average'],
    }
    return seen, trainer


def saving(folder: Path | str, **keywords: Any) -> dict[str, Any]:
    return {'save_folder': str(folder), 'save_interval': '2ba', 'save_num_checkpoints_to_keep': -1, **keywords}


def checkpoint(folder: Path | str, batch: int, sharded: bool = False) -> str:
    name = f'ep{(batch - 1) // 2}-ba{batch}'  # an epoch has two
    return str(Path(folder) / (name if sharded else f'{name}-rank0.pt'))


def recipes(folder: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """All trainings on this many ranks, in order: each strategy as it comes, in its variants, and resumed."""

    def resumed(name: str, sharded: bool = False) -> dict[str, Any]:
        return {'load_path': checkpoint(folder / name, 2, sharded)}

    two: dict[str, dict[str, Any]] = {}
    for strategy in STRATEGIES:
        two |= {
            f'{strategy}: plain': {'evaluate': True, **saving(folder / strategy)},
            f'{strategy}: microbatches': {'device_train_microbatch_size': 2},
            f'{strategy}: compiled': {'compiled': True},
            f'{strategy}: resumed': resumed(strategy, sharded=strategy == 'fsdp1'),
        }
    recomputed, sharded = {'activation_checkpointing': True}, {'state_dict_type': 'sharded'}
    for strategy in ('fsdp2', 'fsdp1'):
        two |= {
            f'{strategy}: recomputed': {'fsdp': recomputed},
            f'{strategy}: compiled, recomputed': {'compiled': True, 'fsdp': recomputed},
            f'{strategy}: activations on the CPU': {'fsdp': {'activation_cpu_offload': True}},
        }
    two |= {
        'ddp: without evaluation': {'draws': Tread},
        'ddp: resumed from one': resumed('one'),
        'fsdp2: resumed from one': resumed('one'),
        'fsdp2: resumed from ddp': resumed('ddp'),
        'fsdp2: sharded': {'fsdp': sharded, **saving(folder / 'fsdp2_sharded')},
        'fsdp2: sharded, resumed': {'fsdp': sharded, **resumed('fsdp2_sharded', sharded=True)},
        'fsdp1: recomputed, not reentrant': {'fsdp': {**recomputed, 'activation_checkpointing_reentrant': False}},
        'fsdp1: gathered until backward': {'evaluate': True, 'fsdp': {'sharding_strategy': 'SHARD_GRAD_OP'}},
        'fsdp1: resumed from fsdp2 sharded': resumed('fsdp2_sharded', sharded=True),
    }
    three = {
        'fsdp2: plain': {'evaluate': True, **saving(folder / 'fsdp2_of_three')},
        'fsdp2: resumed': resumed('fsdp2_of_three'),
        'fsdp2: resumed from one': resumed('one'),
        'fsdp2: resumed from two': resumed('fsdp2'),
        'fsdp2: resumed from two sharded': {'fsdp': sharded, **resumed('fsdp2_sharded', sharded=True)},
        'fsdp1: plain': {'evaluate': True, **saving(folder / 'fsdp1_of_three')},
        'fsdp1: resumed': resumed('fsdp1_of_three', sharded=True),
        'fsdp1: resumed from two': resumed('fsdp1', sharded=True),
    }
    chosen = {2: two, 3: three}[ranks]
    for name, settings in chosen.items():
        settings['strategy'] = name.partition(':')[0]
        if 'save_folder' in settings or 'load_path' in settings:
            settings['snapshots'] = snapshots_of(folder, ranks, name)
    return chosen


def snapshots_of(folder: Path, ranks: int, name: str) -> Path:
    """Where a training that saves or resumes also leaves its power-function averages."""
    return folder / 'snapshots' / f'{ranks} {name}'


def timesteps_in_bfloat16() -> dict[str, Any]:
    """What arrives in a network that FSDP2 casts to bfloat16, which Composer itself does on a GPU alone."""
    sizes = {'patch_size': 2, 'hidden_size': 16, 'depth': 1, 'num_heads': 2, 'learn_sigma': True}
    network: Any = randomised(LightningDiT(latent_size=8, in_channels=1, num_classes=10, **sizes))  # type: ignore[arg-type]
    seen: dict[str, Tensor] = {}
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for module in (network.blocks[0], network):
        fully_shard(module, mp_policy=policy)
    network.t_embedder.register_forward_pre_hook(lambda _, args: seen.update(timesteps=args[0]))
    objective, count = DDPM(), 1000
    zeros, labels = torch.zeros(count, 1, 8, 8), torch.zeros(count, dtype=torch.int64)
    with torch.no_grad():
        objective(network, zeros, labels, zeros, (torch.arange(count) + 0.5) / count)
        trained = seen['timesteps'].tolist()
        times = objective.sampling_times(7)
        sampled = []
        for time in times[:-1]:
            objective.drift(network, labels[:1])(zeros[:1].double(), time)
            sampled.append(seen['timesteps'].item())
    return {'trained': trained, 'sampled': sampled}


def trainings(folder: Path) -> dict[str, Any]:
    """Run in each of several processes: all trainings of that many ranks; what this rank saw of each, by name."""
    warnings.filterwarnings('ignore')
    os.environ.setdefault('FSDP_VERSION', '1')  # FSDP2 is asked for by its configuration object
    ranks, seen = dist.get_world_size(), {}
    for name, recipe in recipes(folder, ranks).items():
        with fsdp1_on_cpu() if recipe['strategy'] == 'fsdp1' else contextlib.nullcontext():
            seen[name] = train(**recipe)[0]
    if ranks == 2:
        with fsdp1_on_cpu():
            try:
                train('fsdp1', fsdp={'use_orig_params': False})
            except UserError as error:
                seen['refused'] = str(error)
        seen['without ids'] = train('ddp', draws=WithoutIds)[0]['draws']
        seen['bfloat16'] = timesteps_in_bfloat16()
    return seen
