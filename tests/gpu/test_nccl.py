"""Several GPUs, connected by NCCL, train as one process does: DDP, FSDP2, FSDP1, and HSDP on four."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu.nccl_worlds import recipes
from tests.parallel_worlds import train

ROOT = Path(__file__).parents[2]
ROUNDING = 1e-4  # of sums in another order, after four steps that move the weights by 0.2
WORLDS = [(ranks, name) for ranks in (2, 4) for name in recipes(ranks)]

pytestmark = pytest.mark.gpu


def on_gpus(ranks: int, folder: Path) -> dict[str, dict]:
    """What rank 0 saw of each training."""
    path = folder / f'seen_by_{ranks}.pt'
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(ranks)]
    # Composer asks for the number of the node under a name that torch's launcher does not set.
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')])}
    environment |= {'NODE_RANK': '0', 'FSDP_VERSION': '1'}
    words = [sys.executable, *launcher, '-m', 'tests.gpu.nccl_worlds', str(path)]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(path, weights_only=True)


@pytest.fixture(scope='module')
def worlds(tmp_path_factory):
    """Of all numbers of ranks that this machine has GPUs for."""
    folder, gpus = tmp_path_factory.mktemp('nccl'), torch.cuda.device_count()
    return {ranks: on_gpus(ranks, folder) for ranks in (2, 4) if ranks <= gpus}


@pytest.fixture(scope='module')
def one():
    """The same training in one process."""
    return train('ddp', precision='fp32', device='gpu')[0]


@pytest.mark.parametrize(
    ('ranks', 'name'),
    [
        pytest.param(
            *world, marks=pytest.mark.skipif(torch.cuda.device_count() < world[0], reason=f'needs {world[0]} GPUs')
        )
        for world in WORLDS
    ],
)
def test_several_gpus_train_as_one(worlds, one, ranks, name):
    seen = worlds[ranks][name]
    for kind in ('weights', 'average'):
        assert seen[kind].keys() >= one[kind].keys()
        for key, value in one[kind].items():
            assert torch.allclose(seen[kind][key].cpu(), value.cpu(), rtol=0, atol=ROUNDING), (kind, key)
