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

from tests.frozen.commands import Commands, picture_digest, tensor_digest, tensor_norms
from tests.frozen.recipes import losses_of

RUN, MODEL = 'runs/kept', 'kept.safetensors'
EXPORTS = ('ema', 'raw', 'posthoc:0.1', 'posthoc:0.09')
# The command that made the run; here it makes it longer.
TRAINING = (
    'yamls/digits_tread.yaml',
    'run_name=kept',
    'loggers.mlflow.experiment_name=kept',
    'model={name: dit, patch_size: 2, hidden_size: 8, depth: 4, num_heads: 2, mlp_ratio: 1.0}',
    'algorithms.tread={start: 1, end: -2, selection_rate: 0.5}',
    'algorithms.ema.decay=0.9',
    'algorithms.power_ema={widths: [0.05, 0.1], interval: 5ba}',
    'optimizer.lr=1e-2',
    'scheduler={name: constant}',
    'callbacks.sample_grid=null',
    'callbacks.digits_quality=null',
    'eval_interval=10ba',
    'save_interval=10ba',
    'save_num_checkpoints_to_keep=1',
    'progress_bar=false',
)


def unpack(folder: Path) -> None:
    """Put the run, its snapshots and the exported file where a user would have them below ``folder``."""
    for path in sorted(Path(__file__).parent.glob('files/*.tar.xz')):
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter='data')


def measure(commands: Commands) -> dict[str, Any]:
    """What each command makes of the unpacked files; the run is resumed last."""
    sampled = {
        'of the run': _sample(commands, RUN, 'ema'),
        'of the run, raw': _sample(commands, RUN, 'raw'),
        'of the run, post-hoc': _sample(commands, RUN, 'posthoc:0.09'),
        'of the exported file': _sample(commands, MODEL, 'ema'),
    }
    exported = {weights: _export(commands, RUN, weights) for weights in EXPORTS}
    exported['of the exported file'] = _export(commands, MODEL, 'ema')
    resumed = _resume(commands)
    # Behind the resumed run, which has made the digits that are the reference here.
    how = ('--reference', 'data/digits/train', '--features', 'digits', '--cache', 'cache')
    evaluated = commands.succeed('evaluate', MODEL, *how, '--count', '20', '--steps', '4', '--samples', 'measured')
    return {'sampled': sampled, 'exported': exported, 'resumed': resumed, 'evaluated': commands.normalised(evaluated)}


def _resume(commands: Commands) -> dict[str, Any]:
    """Train the run for 10 batches more."""
    (batches,) = re.findall(r'batches \d+ to \d+', commands.succeed('train', *TRAINING, 'max_duration=30ba'))
    snapshots = (commands.folder / RUN / 'snapshots').glob('*.safetensors')
    return {
        'batches': batches,
        'losses': [value.hex() for value in losses_of(commands, 'kept')],
        'weights': {weights: _export(commands, RUN, weights) for weights in EXPORTS},
        'snapshots': sorted(path.name for path in snapshots),
    }


def _sample(commands: Commands, path: str, weights: str) -> dict[str, Any]:
    out = commands.folder / 'sampled' / f'{Path(path).name}-{weights.replace(":", "-")}'
    how = ('--weights', weights, '--count', '4', '--steps', '8', '--guidance-scale', '1.5')
    text = commands.succeed('sample', path, '--out', out, *how)
    files = sorted((out / 'images').glob('*.png'))
    return {
        'said': commands.normalised(text),
        'digest': picture_digest(out / 'images'),
        'pixels': {file.name: np.asarray(Image.open(file)).tobytes().hex() for file in files},
    }


def _export(commands: Commands, path: str, weights: str) -> dict[str, Any]:
    file = commands.folder / 'again.safetensors'
    text = commands.succeed('export', path, '--weights', weights, '--out', file)
    result = {'said': commands.normalised(text), 'digest': tensor_digest(file), 'norms': tensor_norms(file)}
    file.unlink()
    return result
