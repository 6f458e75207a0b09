"""Short runs of the shipped recipes for digits: every loss, and digests of what comes out."""

from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from tests.frozen.commands import ROOT, Commands, launch_ranks, picture_digest, tensor_digest

__all__ = ['QUICK', 'RECIPES', 'RUNS', 'first_losses', 'losses_of', 'record_runs']

RECIPES = tuple(sorted(path.stem for path in (ROOT / 'yamls').glob('digits*.yaml')))
RUNS = (*((name, 1) for name in RECIPES), ('digits_tread', 2), ('digits_maskdit', 2))
"""Recipe and number of ranks, in an order in which ``digits_maskdit_tuning`` comes behind what it starts from."""

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


def record_runs(folder: Path, commands: Commands) -> dict[str, Any]:
    """Everything that is frozen of each of ``RUNS``, by ``RECIPE on N ranks``.

    Args:
        folder: As made by ``with_recipes``; the runs stay in it.
        commands: In that folder.
    """
    return {_title(name, ranks): _record_run(folder, commands, name, ranks) for name, ranks in RUNS}


def first_losses(folder: Path, commands: Commands, name: str) -> list[float]:
    """Training losses of the first batches of a recipe, without the pictures."""
    _train(folder, commands, name, 1, *NO_PICTURES, f'max_duration={QUICK_BATCHES}ba')
    return losses_of(folder, _experiment(name, 1))


def losses_of(folder: Path, experiment: str) -> list[float]:
    """Training losses in the order of the batches, of the only run of an experiment."""
    client, run = _mlflow_run(folder, experiment)
    points = client.get_metric_history(run.info.run_id, 'loss/train/total')
    return [point.value for point in sorted(points, key=lambda point: point.step)]


def _record_run(folder: Path, commands: Commands, name: str, ranks: int) -> dict[str, Any]:
    _train(folder, commands, name, ranks, *PICTURES)
    where = f'runs/{_run_name(name, ranks)}'
    client, run = _mlflow_run(folder, _experiment(name, ranks))
    evaluated = client.get_metric_history(run.info.run_id, 'metrics/eval/loss')
    # DDPM has samplers of its own.
    sampler = ('--sampler', 'ddpm') if 'ddpm' in name else ()
    drawn = Path('drawn', _run_name(name, ranks))
    how = ('--count', '20', '--steps', '8', '--guidance-scale', '1.5', *sampler)
    commands.succeed('sample', where, '--out', drawn, *how)
    return {
        'losses': [value.hex() for value in losses_of(folder, _experiment(name, ranks))],
        'evaluation losses': {str(point.step): point.value.hex() for point in evaluated},
        'last metrics': {
            key: value.hex() for key, value in sorted(run.data.metrics.items()) if not key.startswith(MOVING)
        },
        'raw weights': _exported(folder, commands, where, 'raw'),
        'averaged weights': _exported(folder, commands, where, 'ema'),
        'samples': picture_digest(folder / drawn / 'images'),
        'grids of the run': picture_digest(folder / where / 'samples'),
    }


def _train(folder: Path, commands: Commands, name: str, ranks: int, *settings: str) -> None:
    own = [f'run_name={_run_name(name, ranks)}', f'loggers.mlflow.experiment_name={_experiment(name, ranks)}']
    words = [f'yamls/{name}.yaml', *SHORT, *settings, *own]
    if ranks == 1:
        commands.succeed('train', *words)
    else:
        launch_ranks(folder, ranks, words)


def _exported(folder: Path, commands: Commands, where: str, weights: str) -> str:
    file = folder / 'exported.safetensors'
    commands.succeed('export', where, '--weights', weights, '--out', file)
    digest = tensor_digest(file)
    file.unlink()
    return digest


def _mlflow_run(folder: Path, experiment: str) -> tuple[MlflowClient, Any]:
    client = MlflowClient(f'sqlite:///{folder}/runs/mlflow.db')
    entry = client.get_experiment_by_name(experiment)
    assert entry is not None, experiment
    (run,) = client.search_runs([entry.experiment_id])
    return client, run


def _run_name(name: str, ranks: int) -> str:
    return name if ranks == 1 else f'{name}_{ranks}'


def _experiment(name: str, ranks: int) -> str:
    return f'frozen_{_run_name(name, ranks)}'


def _title(name: str, ranks: int) -> str:
    return f'{name} on {ranks} rank{"s" if ranks > 1 else ""}'
