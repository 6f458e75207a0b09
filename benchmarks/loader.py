"""How fast the training data arrive: this project's readers beside what else reads the same bytes, in one run.

    python benchmarks/loader.py [--samples 20000] [--channels 4] [--mirrored] [--workers 2] [--rounds 5]

Contenders read the same latents from the page cache, in turn, several rounds; the figures are medians and the ratios
are taken within a round. What they hand out is a batch in memory, not yet on a device.
"""

import argparse
import io
import os
import shutil
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import numpy as np
import torch
from streaming import MDSWriter, StreamingDataset
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from tread_composer.data.columns import LABEL, LATENTS, LATENTS_MIRRORED, NAME, columns
from tread_composer.data.loaders import train_loader

# DiT-XL/2, 256 tokens, GMACs of a forward pass (docs of `python -m tread_composer plan`); training is 3 times that.
DENSE_GMAC, ROUTED_GMAC = 118.62, 69.13
H200_TFLOPS = 989.0  # bfloat16 peak, dense, as its maker states it


def write(folder: Path, samples: int, channels: int, mirrored: bool) -> None:
    """The same latents as MDS and as webdataset tars (one .npy and one .cls a sample)."""
    random = np.random.default_rng(0)
    shape = (2 * channels, 32, 32)
    names = [LATENTS, LATENTS_MIRRORED] if mirrored else [LATENTS]
    encodings = columns('moments', (channels, 32, 32), mirrored)
    (folder / 'tars').mkdir()
    with MDSWriter(out=str(folder / 'mds'), columns=encodings, hashes=['xxh64']) as writer:
        for first in range(0, samples, 2000):
            with tarfile.open(folder / 'tars' / f'{first // 2000:05}.tar', 'w') as tar:
                for index in range(first, min(first + 2000, samples)):
                    arrays = {name: random.standard_normal(shape, np.float32).astype(np.float16) for name in names}
                    writer.write({**arrays, LABEL: index % 1000, NAME: f'{index:08}'})
                    for name, array in arrays.items():
                        buffer = io.BytesIO()
                        np.save(buffer, array)
                        _add(tar, f'{index:08}.{name}.npy', buffer.getvalue())
                    _add(tar, f'{index:08}.cls', str(index % 1000).encode())


def _add(tar: Any, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


class Tars(IterableDataset):
    """The webdataset layout read in file order by the standard library: nothing is shuffled, which favours it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob('*.tar'))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        files = self.files if worker is None else self.files[worker.id :: worker.num_workers]
        for path in files:
            sample: dict[str, Any] = {}
            with tarfile.open(path, 'r|') as tar:
                for member in tar:
                    file = tar.extractfile(member)
                    assert file is not None
                    data = file.read()
                    if member.name.endswith('.cls'):
                        yield {**sample, LABEL: int(data)}
                        sample = {}
                    else:
                        sample[member.name.split('.')[1]] = np.load(io.BytesIO(data), allow_pickle=False)


def webdataset(folder: Path, mirrored: bool, options: dict[str, Any]) -> dict[str, DataLoader]:
    """The same tars through the webdataset library, where it is installed (it is no dependency of this project)."""
    try:
        import webdataset as wds  # type: ignore[import-not-found]
    except ImportError:
        print('the webdataset library is not installed: its row is left out', file=sys.stderr)
        return {}
    files = [str(path) for path in sorted(folder.glob('*.tar'))]
    names = {LATENTS: f'{LATENTS}.npy', LABEL: 'cls'} | (
        {LATENTS_MIRRORED: f'{LATENTS_MIRRORED}.npy'} if mirrored else {}
    )
    samples = wds.WebDataset(files, shardshuffle=False, empty_check=False).decode().rename(**names)
    return {'webdataset library': DataLoader(samples, collate_fn=stack, drop_last=True, **options)}


def stack(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Only stacks the arrays."""
    arrays = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0] if 'latents' in name}
    return {**arrays, LABEL: torch.tensor([int(row[LABEL]) for row in rows])}


def contenders(folder: Path, arguments: argparse.Namespace) -> dict[str, Callable[[], Iterable]]:
    """Loaders by name; each call of one gives the batches of one more epoch."""
    batch, workers = arguments.batch_size, arguments.workers
    local = str(folder / 'mds')
    mirror = {'mirror_seed': 1} if arguments.mirrored else {}
    options: dict[str, Any] = {'batch_size': batch, 'num_workers': workers, 'persistent_workers': workers > 0}
    bare = StreamingDataset(local=local, batch_size=batch, shuffle=True, num_canonical_nodes=1, predownload=8 * batch)
    loaders = {
        'bare streaming': DataLoader(bare, collate_fn=stack, drop_last=True, **options),
        'ours, streaming': train_loader(local, batch_size=batch, num_workers=workers, **mirror),
        'ours, no workers': train_loader(local, batch_size=batch, **mirror),
        'tars of .npy': DataLoader(Tars(folder / 'tars'), collate_fn=stack, drop_last=True, **options),
        **webdataset(folder / 'tars', arguments.mirrored, options),
    }
    return {name: (lambda loader=loader: loader) for name, loader in loaders.items()}


def rate(batches: Iterable, batch_size: int) -> float:
    """Samples per second of one epoch, start-up of its first batch excluded: training hides that one."""
    iterator = iter(batches)
    next(iterator)
    begin, count = time.perf_counter(), 0
    for _ in iterator:
        count += 1
    return count * batch_size / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--samples', type=int, default=20000)
    parser.add_argument('--channels', type=int, default=4, help='of the latent; its moments have twice as many')
    parser.add_argument('--mirrored', action='store_true', help='store both and pick one per draw')
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--rounds', type=int, default=5)
    arguments = parser.parse_args()
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    folder = Path(tempfile.mkdtemp(prefix='loader-'))
    try:
        write(folder, arguments.samples, arguments.channels, arguments.mirrored)
        report(contenders(folder, arguments), arguments)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def report(loaders: dict[str, Callable[[], Iterable]], arguments: argparse.Namespace) -> None:
    """Run the rounds and print the table."""
    rates: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(arguments.rounds + 1):
        for name, epoch in loaders.items():
            measured = rate(epoch(), arguments.batch_size)
            if number:  # the first round starts the workers and warms the page cache
                rates[name].append(measured)
        print(f'round {number} of {arguments.rounds}', file=sys.stderr, flush=True)
    size = 2 * arguments.channels * 32 * 32 * 2 / 1024
    twins = ' and its mirror' if arguments.mirrored else ''
    print(f'{arguments.samples} samples of {size:.0f} KiB{twins}, batches of {arguments.batch_size}, '
          f'{arguments.workers} workers, {os.cpu_count()} cores, torch {torch.__version__}')  # fmt: skip
    print('| reader | samples/s (median) | lowest | highest |\n|---|---|---|---|')
    for name, values in rates.items():
        print(f'| {name} | {statistics.median(values):,.0f} | {min(values):,.0f} | {max(values):,.0f} |')
    print('| ratio, within a round | median | lowest | highest | goal |\n|---|---|---|---|---|')
    for ours, other, goal in (
        ('ours, streaming', 'bare streaming', 0.95),
        ('ours, streaming', 'tars of .npy', 5.0),
        ('ours, streaming', 'webdataset library', 5.0),
        ('ours, no workers', 'webdataset library', 5.0),
    ):
        if other not in rates:
            continue
        ratios = [a / b for a, b in zip(rates[ours], rates[other], strict=True)]
        middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
        print(f'| {ours} / {other} | {middle:.2f} | {low:.2f} | {high:.2f} | {goal} |')
    print('\nDiT-XL/2 on one H200 (no rank can take more than at 100 % of its bfloat16 peak; 40 % is usual):')
    for name, gmac in (('dense', DENSE_GMAC), ('routed', ROUTED_GMAC)):
        needed = H200_TFLOPS * 1e12 / (6e9 * gmac)
        have = {reader: statistics.median(rates[reader]) for reader in ('ours, streaming', 'ours, no workers')}
        factors = ', '.join(f'{value / needed:.1f} x that ({reader})' for reader, value in have.items())
        most = f'at most {needed:,.0f} samples/s, at 40 % {0.4 * needed:,.0f}'
        print(f"  {name}: {most}; one rank's loader supplies {factors}")


if __name__ == '__main__':
    main()
