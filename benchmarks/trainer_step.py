"""What the Trainer, its callbacks and the data add to a bare step, and where the CPU waits for the GPU in it.

    python benchmarks/trainer_step.py yamls/dit_b_tread.yaml [key=value ...] --batch-size 64

Trains the recipe on latents of noise (the digits on the digits), in a temporary folder, without evaluation, images,
logger and checkpoints; before and after it a bare loop of the same routed step. ``shares`` is what counts: every moment
of the Trainer's batches belongs to the network and its optimizer, the data, a callback, an algorithm, or the Trainer
itself, so that what they add is a sum of intervals (on a CPU of one thread's own seconds, on a GPU of its queue) and
not a difference of two totals. The share of waiting for data is on the wall, between Composer's events around the
loader. Where synchronisations are: CUDA's debug mode, over the last batches.
"""

import argparse
import collections
import contextlib
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import numpy as np
import torch
from composer import Callback, State
from composer.loggers import Logger
from contenders import make_contenders, read_problem
from measuring import Rows, Timeline, clock_of, environment
from streaming import MDSWriter

from tread_composer.builders.run_data import prepare_data
from tread_composer.builders.trainer import build_trainer
from tread_composer.config import Config, load_config
from tread_composer.core.errors import UserError
from tread_composer.data.columns import columns
from tread_composer.data.manifest import Manifest

QUIET = ('loggers=null', 'callbacks.sample_grid=null')
QUIET_DATA = {
    'latents': ('data.eval_split=null',),
    'digits': ('callbacks.digits_quality=null', 'eval_interval=1000000ba'),
}
# What a bare loop has too; all other names are what Trainer, callbacks, data and further algorithms add.
BARE = ('network', 'Tread')
UNSAVED = ('save_folder=null', 'progress_bar=false')
WATCHED = 3  # last batches, of which synchronisations are noted: not timed, as to note them takes time


def write_latents(folder: Path, config: Config, samples: int) -> None:
    """Moments of noise as a converter would have written them."""
    data: Any = config.data
    shape = (data.channels, data.latent_size, data.latent_size)
    random = np.random.default_rng(0)
    with MDSWriter(out=str(folder), columns=columns('moments', shape), hashes=['xxh64']) as writer:
        for index in range(samples):
            latents = random.standard_normal((2 * shape[0], *shape[1:]), np.float32).astype(np.float16)
            writer.write({'latents': latents, 'label': index % data.num_classes, 'name': f'{index:08}'})
    Manifest(
        format_version=1,
        kind='moments',
        autoencoder=config.autoencoder.kwargs['path'],
        autoencoder_hash='of noise',
        channels=shape[0],
        latent_height=shape[1],
        latent_width=shape[2],
        resolution=8 * shape[1],
        crop='center',
        mirrored=False,
        num_samples=samples,
        num_classes=data.num_classes,
        class_names=tuple(map(str, range(data.num_classes))),
        mean=(0.0,) * shape[0],
        std=(1.0,) * shape[0],
        permutation_seed=None,
        tool_version='0.1.0',
        source='noise',
    ).save(folder)


class Watch(Callback):
    """Seconds of the batches behind the warm-up, those in which the loader was waited for, and synchronisations.

    Args:
        device: Where; there are synchronisations to note on a GPU alone.
        warm_up: Batches before the clock starts.
        batches: Batches until it stops.
    """

    def __init__(self, device: torch.device, warm_up: int, batches: int) -> None:
        self.cuda, self.warm_up, self.batches = device.type == 'cuda', warm_up, batches
        self.timeline, self._stack = Timeline(clock_of(device), 'Trainer'), contextlib.ExitStack()
        self.shares: collections.Counter[str] = collections.Counter()
        self.seconds = self.waited = self.began = self.asked = 0.0
        self.places: collections.Counter[str] = collections.Counter()

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def before_dataloader(self, state: State, logger: Logger) -> None:
        """The loader is asked."""
        number = int(state.timestamp.batch)
        if number == self.warm_up:
            self._stack.enter_context(self.timeline.watching(*self._watched(state)))
            self.began = self._now()
        if number == self.warm_up + self.batches:
            self.seconds = self._now() - self.began
            self._stack.close()
            self.shares = self.timeline.seconds()
            self._note()
        self.asked = time.perf_counter()
        self.timeline.enter('data')

    def after_dataloader(self, state: State, logger: Logger) -> None:
        """The loader has answered."""
        self.timeline.leave()
        if self.warm_up <= int(state.timestamp.batch) < self.warm_up + self.batches:
            self.waited += time.perf_counter() - self.asked

    def _watched(self, state: State) -> Iterator[tuple[Any, str, str]]:
        """Now, not earlier: the Trainer has put its own functions in place of the optimizer's."""
        model: Any = state.model
        yield from ((model, name, 'network') for name in ('forward', 'loss'))
        yield torch.Tensor, 'backward', 'network'
        yield from ((optimizer, name, 'network') for optimizer in state.optimizers for name in ('step', 'zero_grad'))
        yield from ((part, 'run_event', type(part).__name__) for part in state.callbacks if part is not self)
        for part in state.algorithms:
            yield from ((part, name, type(part).__name__) for name in ('match', 'apply'))

    def _note(self) -> None:
        if self.cuda:
            warnings.simplefilter('always')
            warnings.showwarning = self._noted  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode('warn')

    def _noted(self, message: Warning | str, category: type, filename: str, lineno: int, *args: object) -> None:
        if 'synchronizing' in str(message):
            place = '/'.join(Path(filename).parts[-3:])
            self.places[f'{place}:{lineno}'] += 1

    def fit_end(self, state: State, logger: Logger) -> None:
        """Back to silence."""
        if self.cuda:
            torch.cuda.set_sync_debug_mode('default')


def bare_loop(contender: Any, batches: int) -> float:
    """Seconds of a step of the same network, on one batch that lies on the device."""
    clock = clock_of(contender.problem.device)
    for _ in range(3):
        contender.step(lambda: None)
    clock.settle()
    began = time.perf_counter()
    for _ in range(batches):
        contender.step(lambda: None)
    clock.settle()
    return (time.perf_counter() - began) / batches


def train(config: Config, folder: Path, options: argparse.Namespace) -> Watch:
    """The recipe in its Trainer."""
    batches = options.warm_up + options.batches + WATCHED
    data: Any = config.data
    if data.name == 'latents':  # the digits make themselves
        write_latents(folder / data.train_split, config, options.batch_size * batches)  # one epoch
    trainer = build_trainer(config, prepare_data(config))
    watch = Watch(torch.device(options.device), options.warm_up, options.batches)
    trainer.state.callbacks.append(watch)
    with warnings.catch_warnings():
        trainer.fit()
    trainer.close()
    return watch


def measure(options: argparse.Namespace, folder: Path) -> None:
    device, size = torch.device(options.device), options.batch_size
    place = 'gpu' if device.type == 'cuda' else 'cpu'  # in Composer's words
    quiet = QUIET_DATA[load_config(options.yaml, options.overrides, world_size=1).data.name]
    settings = [
        *QUIET, *quiet, *UNSAVED, *options.overrides, f'data.local={folder}', f'device={place}',
        f'global_train_batch_size={size}', f'device_train_microbatch_size={size}',
        f'max_duration={options.warm_up + options.batches + WATCHED}ba',
    ]  # fmt: skip
    config = load_config(options.yaml, settings, world_size=1)
    dtype = 'bf16' if 'bf16' in str(config.precision) else 'fp32'
    rows = Rows({'yaml': options.yaml, 'overrides': options.overrides, 'dtype': dtype, **environment(device)})
    problem = read_problem(options.yaml, settings, batch_size=size, tokens=None, dtype=dtype, device=device)
    routed = make_contenders(problem)[1]
    before = bare_loop(routed, options.batches)
    watch = train(config, folder, options)
    after = bare_loop(routed, options.batches)
    step = watch.seconds / options.batches
    bare = (before + after) / 2
    rows.add(
        'trainer', batch_size=size, batches=options.batches, seconds_of_a_step=step, of_a_bare_step=[before, after],
        wall_over_bare=step / bare - 1, data_wait=watch.waited / watch.seconds, workers=config.data.num_workers,
        algorithms=list(config.algorithms),
    )  # fmt: skip
    total = sum(watch.shares.values())
    base = sum(watch.shares[name] for name in BARE)
    parts = {name: seconds / options.batches for name, seconds in watch.shares.most_common()}
    rows.add(
        'shares',
        seconds_of_a_step=parts,
        added=total / base - 1,
        added_by={name: seconds / base for name, seconds in watch.shares.most_common() if name not in BARE},
    )
    if watch.cuda:
        places = {place: count / WATCHED for place, count in watch.places.most_common()}
        rows.add('synchronisations', per_step=sum(places.values()), places=places)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('yaml')
    parser.add_argument('overrides', nargs='*', metavar='key=value')
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--batches', type=int, default=40, help='that are timed')
    parser.add_argument('--warm-up', type=int, default=5, help='batches before them')
    options = parser.parse_intermixed_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            measure(options, Path(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
