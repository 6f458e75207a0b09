"""Two ranks under FSDP2 that save sharded checkpoints: FOLDER die | FOLDER resume, started by ``test_sharded.py``."""

import os
import resource
import shutil
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from composer.callbacks import CheckpointSaver
from composer.utils import dist, get_device

from tests.parallel_worlds import train
from tread_composer.callbacks.checkpoint_saver import WholeCheckpointSaver
from tread_composer.core.errors import UserError

LENGTH = 6


def go(
    folder: Path, kind: type[CheckpointSaver] = WholeCheckpointSaver, until: int = LENGTH, strategy: str = 'fsdp2'
) -> dict[str, Any]:
    """Train to the end; goes on from what is in the folder."""
    saver = kind(str(folder), save_interval='2ba', remote_file_name='ba{batch}', latest_remote_file_name='latest')
    how = {'autoresume': True, 'run_name': 'sharded', 'save_folder': str(folder), 'max_duration': f'{until}ba'}
    fsdp = {'state_dict_type': 'sharded'} if strategy == 'fsdp2' else {}
    seen, _ = train(strategy, fsdp=fsdp, callbacks=[saver], **how)
    return {'weights': seen['weights'], 'average': seen['average'], 'batches': len(seen['losses'])}


def die_before_the_folder_has_its_name(batch: int) -> None:
    """This rank alone: the other one is stopped by its launcher, as in a real run."""
    rename = os.replace

    def replace(source: Any, target: Any, **keywords: Any) -> None:
        if str(target).endswith(f'-ba{batch}'):
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target, **keywords)

    os.replace = replace


def on_first_rank(step: Any, *arguments: Any, **keywords: Any) -> None:
    """Files are shared: one rank changes them, and both wait."""
    if dist.get_global_rank() == 0:
        step(*arguments, **keywords)
    dist.barrier()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def full_disk(folder: Path, rank: int, strategy: str) -> str:
    """The disk of this rank takes no more; returns what each is told."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_global_rank() == rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    try:
        go(folder, strategy=strategy)
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return 'not refused'


def main(folder: Path, part: str) -> None:
    warnings.filterwarnings('ignore')
    dist.initialize_dist(get_device('cpu'))
    rank, seen = dist.get_global_rank(), {}
    if part == 'die':
        seen['whole'] = go(folder / 'whole')
        go(folder / 'of composer', CheckpointSaver, until=4)
        torch.save(seen, folder / f'{part}{rank}.pt')
        if rank == 0:
            die_before_the_folder_has_its_name(4)
        go(folder / 'killed')
        return
    seen['killed'] = go(folder / 'killed')
    # As Composer leaves it when it is killed: without digests, and torch's writer has not said that all was written.
    on_first_rank(shutil.copytree, folder / 'of composer', folder / 'a half of composer', symlinks=True)
    on_first_rank(lambda: (folder / 'a half of composer' / 'ep1-ba4' / '.metadata').unlink())
    for name in ('of composer', 'a half of composer'):
        seen[name] = go(folder / name)
    for name in ('a rank is missing', 'a bit', 'full'):
        on_first_rank(shutil.copytree, folder / 'whole', folder / name, symlinks=True)
    newest = f'ep2-ba{LENGTH}'
    on_first_rank(lambda: (folder / 'a rank is missing' / newest / '__1_0.distcp').unlink())
    on_first_rank(flip, folder / 'a bit' / newest / '__0_0.distcp')
    on_first_rank(shutil.rmtree, folder / 'full' / newest)
    for name in ('a rank is missing', 'a bit'):
        seen[name] = go(folder / name)
    seen['full'] = full_disk(folder / 'full', 1, 'fsdp2')
    on_first_rank(lambda: seen.update(left={path.name for path in (folder / 'full').iterdir()}))
    seen['room'] = go(folder / 'full')
    # Replicas: one rank writes while the other waits.
    go(folder / 'replicas', until=2, strategy='ddp')
    seen['full of replicas'] = full_disk(folder / 'replicas', 0, 'ddp')
    on_first_rank(lambda: seen.update(left_of_replicas={path.name for path in (folder / 'replicas').iterdir()}))
    seen['replicas'] = go(folder / 'replicas', strategy='ddp')
    torch.save(seen, folder / f'{part}{rank}.pt')
    dist.barrier()


if __name__ == '__main__':
    main(Path(sys.argv[1]), sys.argv[2])
