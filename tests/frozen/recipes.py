"""Short runs of the shipped recipes for digits: every loss, and digests of what comes out."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.frozen.commands import Commands, picture_digest, tensor_digest
from tests.runs import ROOT

RECIPES = tuple(sorted(path.stem for path in (ROOT / 'yamls').glob('digits*.yaml')))
# Recipe and number of ranks. `digits_maskdit_tuning` comes behind what it starts from.
RUNS = (*((name, 1) for name in RECIPES), ('digits_tread', 2), ('digits_maskdit', 2))
QUICK = ('digits_tread', 'digits_maskdit')
QUICK_BATCHES = 5

# Each method is at work from the first batch on. The length of the schedule is spelled out, so that the first batches
# of a shorter run are those of this one.
SHORT = (
    'max_duration=20ba',
    'scheduler={name: cosine_annealing_with_warmup, t_warmup: 5ba, t_max: 20ba}',
    'eval_interval=10ba',
    'save_interval=20ba',
    'progress_bar=false',
    'callbacks.speed_monitor=null',
)
PICTURES = (
    'callbacks.sample_grid.interval=20ba',
    'callbacks.sample_grid.num_steps=4',
    'callbacks.digits_quality.num_samples=50',
    'callbacks.digits_quality.num_steps=4',
)
NO_PICTURES = ('callbacks.sample_grid=null', 'callbacks.digits_quality=null')
MOVING = ('time/', 'throughput/', 'memory/', 'system/')  # metrics that say how fast the machine was


def record_runs(commands: Commands) -> dict[str, Any]:
    """Everything that is frozen of each of ``RUNS``, by ``RECIPE on N ranks``."""
    titles = {1: 'on 1 rank', 2: 'on 2 ranks'}
    return {f'{name} {titles[ranks]}': _record_run(commands, name, ranks) for name, ranks in RUNS}


def first_losses(commands: Commands, name: str) -> list[float]:
    """Training losses of the first batches of a recipe on one rank, without the pictures."""
    return losses_of(commands, _train(commands, name, 1, *NO_PICTURES, f'max_duration={QUICK_BATCHES}ba'))


def losses_of(commands: Commands, run_name: str) -> list[float]:
    """Training losses in the order of the batches, of the only run of an experiment of that name."""
    client, run = _mlflow_run(commands, run_name)
    points = client.get_metric_history(run.info.run_id, 'loss/train/total')
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def _record_run(commands: Commands, name: str, ranks: int) -> dict[str, Any]:
    run_name = _train(commands, name, ranks, *PICTURES)
    client, run = _mlflow_run(commands, run_name)
    evaluated = client.get_metric_history(run.info.run_id, 'metrics/eval/loss')
    # DDPM has samplers of its own.
    sampler = ('--sampler', 'ddpm') if 'ddpm' in name else ()
    where, drawn = f'runs/{run_name}', Path('drawn', run_name)
    commands.succeed(
        'sample', where, '--out', drawn, '--count', '20', '--steps', '8', '--guidance-scale', '1.5', *sampler
    )
    return {
        'losses': [value.hex() for value in losses_of(commands, run_name)],
        'evaluation losses': {str(point.step): point.value.hex() for point in evaluated},
        'last metrics': {
            key: value.hex() for key, value in sorted(run.data.metrics.items()) if not key.startswith(MOVING)
        },
        'raw weights': _exported(commands, where, 'raw'),
        'averaged weights': _exported(commands, where, 'ema'),
        'samples': picture_digest(commands.folder / drawn / 'images'),
        'grids of the run': picture_digest(commands.folder / where / 'samples'),
    }


def _train(commands: Commands, name: str, ranks: int, *settings: str) -> str:
    """Train under a name and in an experiment of its own; returns the name."""
    run_name = name if ranks == 1 else f'{name}_{ranks}'
    names = (f'run_name={run_name}', f'loggers.mlflow.experiment_name={run_name}')
    commands.succeed('train', f'yamls/{name}.yaml', *SHORT, *settings, *names, ranks=ranks)
    return run_name


def _exported(commands: Commands, where: str, weights: str) -> str:
    file = commands.folder / 'exported.safetensors'
    commands.succeed('export', where, '--weights', weights, '--out', file)
    digest = tensor_digest(file)
    file.unlink()
    return digest


def _mlflow_run(commands: Commands, experiment: str) -> tuple[MlflowClient, Any]:
    client = MlflowClient(f'sqlite:///{commands.folder}/runs/mlflow.db')
    entry = client.get_experiment_by_name(experiment)
    assert entry is not None, experiment
    (run,) = client.search_runs([entry.experiment_id])
    return client, run
