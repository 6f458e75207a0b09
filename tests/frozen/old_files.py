"""Files made by an earlier version, and what each command makes of them.

``files/`` holds a run of ``digits_tread`` with a tiny network (20 batches): its folder, the snapshots of ``power_ema``,
and its averaged weights as an exported file. They are never made again: they stand for the files that users have.
"""

import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.frozen.commands import Commands, normalised, picture_digest, tensor_digest, tensor_norms
from tests.frozen.recipes import losses_of

__all__ = ['EXPORTS', 'FILES', 'RUN', 'make_files', 'measure', 'resume', 'unpack']

FILES = Path(__file__).parent / 'files'
RUN = 'runs/kept'
MODEL = 'kept.safetensors'
EXPORTS = ('ema', 'raw', 'posthoc:0.1', 'posthoc:0.09')

TRAINING = (
    'yamls/digits_tread.yaml',
    'run_name=kept',
    'loggers.mlflow.experiment_name=kept',
    'model={name: dit, patch_size: 2, hidden_size: 8, depth: 4, num_heads: 2, mlp_ratio: 1.0}',
    'algorithms.tread={start: 1, end: -2, selection_rate: 0.5}',
    'algorithms.ema.decay=0.9',
    'algorithms.power_ema={widths: [0.05, 0.1], interval: 5ba}',
    'optimizer.lr=1e-2',
    'scheduler={name: constant}',  # the run is made longer
    'callbacks.sample_grid=null',
    'callbacks.digits_quality=null',
    'eval_interval=10ba',
    'save_interval=10ba',
    'save_num_checkpoints_to_keep=1',
    'progress_bar=false',
)


def make_files(folder: Path, commands: Commands) -> None:
    """Make ``files/``. Only once: by the version that the files are to stand for.

    Args:
        folder: As made by ``with_recipes``.
        commands: In that folder.
    """
    commands.succeed('train', *TRAINING, 'max_duration=20ba')
    commands.succeed('export', RUN, '--out', MODEL)
    (folder / RUN / 'environment.json').unlink()  # names the machine, and nothing reads it
    FILES.mkdir(exist_ok=True)
    snapshots = sorted((folder / RUN / 'snapshots').iterdir())
    others = [path for path in sorted((folder / RUN).rglob('*')) if path.parent.name != 'snapshots']
    for name, paths in (('run', others), ('snapshots', snapshots), ('exported', [folder / MODEL])):
        with tarfile.open(FILES / f'{name}.tar.xz', 'w:xz') as archive:
            for path in paths:
                archive.add(path, path.relative_to(folder), recursive=False, filter=_nameless)


def _nameless(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the user and the time of the machine that the files were made on."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ''
    return member


def unpack(folder: Path) -> None:
    """Put the run, its snapshots and the exported file where a user would have them below ``folder``."""
    for path in sorted(FILES.glob('*.tar.xz')):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter='data')


def resume(folder: Path, commands: Commands) -> dict[str, Any]:
    """Train the run for 10 batches more, and say what came of it."""
    done = commands.succeed('train', *TRAINING, 'max_duration=30ba')
    (batches,) = re.findall(r'batches \d+ to \d+', done.out)
    return {
        'batches': batches,
        'losses': [value.hex() for value in losses_of(folder, 'kept')],
        'weights': {weights: _export(folder, commands, RUN, weights) for weights in EXPORTS},
        'snapshots': sorted(path.name for path in (folder / RUN / 'snapshots').glob('*.safetensors')),
    }


def measure(folder: Path, commands: Commands) -> dict[str, Any]:
    """What each command makes of the kept files; the run is resumed last.

    Args:
        folder: As made by ``with_recipes``, with the files unpacked.
        commands: In that folder.
    """
    sampled = {
        'of the run': _sample(folder, commands, RUN, 'ema'),
        'of the run, raw': _sample(folder, commands, RUN, 'raw'),
        'of the run, post-hoc': _sample(folder, commands, RUN, 'posthoc:0.09'),
        'of the exported file': _sample(folder, commands, MODEL, 'ema'),
    }
    exported = {weights: _export(folder, commands, RUN, weights) for weights in EXPORTS}
    exported['of the exported file'] = _export(folder, commands, MODEL, 'ema')
    resumed = resume(folder, commands)
    # Behind the resumed run, which has made the digits that are the reference here.
    how = ('--reference', 'data/digits/train', '--features', 'digits', '--cache', 'cache')
    evaluated = commands.succeed('evaluate', MODEL, *how, '--count', '20', '--steps', '4', '--samples', 'measured')
    return {
        'sampled': sampled,
        'exported': exported,
        'resumed': resumed,
        'evaluated': normalised(evaluated.out, folder),
    }


def _sample(folder: Path, commands: Commands, path: str, weights: str) -> dict[str, Any]:
    out = folder / 'sampled' / f'{Path(path).name}-{weights.replace(":", "-")}'
    how = ('--weights', weights, '--count', '4', '--steps', '8', '--guidance-scale', '1.5')
    done = commands.succeed('sample', path, '--out', out, *how)
    files = sorted((out / 'images').glob('*.png'))
    return {
        'said': normalised(done.out, folder),
        'digest': picture_digest(out / 'images'),
        'pixels': {file.name: np.asarray(Image.open(file)).tobytes().hex() for file in files},
    }


def _export(folder: Path, commands: Commands, path: str, weights: str) -> dict[str, Any]:
    file = folder / 'again.safetensors'
    done = commands.succeed('export', path, '--weights', weights, '--out', file)
    result = {
        'said': normalised(done.out, folder), 'digest': tensor_digest(file), 'norms': tensor_norms(file)
    }  # fmt: skip
    file.unlink()
    return result
