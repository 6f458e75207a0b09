"""Dense, TREAD, MaskDiT, FasterDiT and their combination on the digits: quality against steps, FLOPs and time.

    python benchmarks/digits_convergence.py [--out runs/convergence] [--seeds 17 18 19] [--steps 700] [--points 5]

Each method is its shipped YAML, run by the documented command, one process after another; finished runs are kept, so an
interrupted comparison goes on. Seeds are in the outer loop: whatever else the machine does falls on all methods alike.
Every method of a seed sees the same samples, labels and noise. Writes ``results.json``, a table and a picture.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from mlflow import MlflowClient

ROOT = Path(__file__).parent.parent
METHODS = {
    'dense': ('digits.yaml', []),
    'TREAD': ('digits_tread.yaml', []),
    'FasterDiT': ('digits_fasterdit.yaml', []),
    'TREAD + FasterDiT': ('digits_tread_fasterdit.yaml', []),
    # MaskDiT is defined for EDM, so it gets a dense twin with that objective.
    'dense, EDM': ('digits.yaml', ['objective={name: edm, sigma_data: 0.75}']),
    'MaskDiT (EDM)': ('digits_maskdit.yaml', []),
}
QUALITY = {
    'frechet_distance': 'Fréchet distance (classifier features, not an FID; lower is better)',
    'recognised': 'share recognised as the digit asked for',
}


def run(method: str, seed: int, arguments: argparse.Namespace) -> list[dict[str, float]]:
    """Train one method once; its measurements, from the folder if it was finished before."""
    yaml, overrides = METHODS[method]
    name = f'{method}_{seed}'.replace(' ', '').replace('+', '_').replace(',', '_').replace('(', '_').replace(')', '')
    folder = arguments.out / name
    result = folder / 'points.json'
    settings = {'steps': arguments.steps, 'points': arguments.points, 'overrides': overrides}
    if result.exists():
        saved = json.loads(result.read_text())
        if saved['settings'] != settings:
            sys.exit(f'{result} was measured with {saved["settings"]}, this is {settings}: choose another --out')
        return saved['points']
    every = arguments.steps // arguments.points
    words = [
        f'run_name={name}', f'seed={seed}', f'max_duration={arguments.steps}ba', f'save_folder={folder}',
        f'eval_interval={arguments.steps}ba', f'save_interval={arguments.steps}ba', f'data.local={arguments.out}/data',
        'callbacks.sample_grid=null', f'callbacks.digits_quality.interval={every}ba',
        f'callbacks.digits_quality.folder={folder}', f'loggers.mlflow.tracking_uri=sqlite:///{folder.resolve()}/mlflow.db',
        *overrides,
    ]  # fmt: skip
    command = [sys.executable, str(ROOT / 'train.py'), str(ROOT / 'yamls' / yaml), *words]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'w') as log:
        done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    if done.returncode:
        sys.exit(f'{" ".join(command)}\nfailed: see {folder / "log.txt"}')
    points = measurements(folder, flops_per_step(yaml, overrides))
    result.write_text(json.dumps({'settings': settings, 'points': points}))
    return points


def flops_per_step(yaml: str, overrides: list[str]) -> float:
    """TFLOPs of a training step: 2 per multiply-accumulate, the backward pass twice the forward."""
    command = [sys.executable, '-m', 'tread_composer', 'plan', str(ROOT / 'yamls' / yaml), '--json', *overrides]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, 'PYTHONPATH': str(ROOT)}
    )
    plan = json.loads(done.stdout)
    return 6 * plan['gmacs_routed'] * plan['samples_per_step'] / 1000


def measurements(folder: Path, teraflops: float) -> list[dict[str, float]]:
    """Quality by step, with the FLOPs and the seconds of training (evaluation and sampling excluded) until there."""
    client = MlflowClient(f'sqlite:///{folder.resolve()}/mlflow.db')
    experiment = client.get_experiment_by_name('digits')
    assert experiment is not None
    # One that was killed before its first checkpoint began anew: the last one counts.
    found = client.search_runs([experiment.experiment_id], order_by=['attributes.start_time DESC'])[0]

    def history(key: str) -> dict[int, float]:
        return {entry.step: entry.value for entry in client.get_metric_history(found.info.run_id, key)}

    # Composer's clock of training time counts what callbacks do, so the rate of undisturbed windows is taken.
    rate = statistics.median(history('throughput/batches_per_sec').values())
    quality = {key: history(f'digits/{key}') for key in QUALITY}
    return [
        {
            'step': step,
            'teraflops': step * teraflops,
            'seconds': step / rate,
            **{key: quality[key][step] for key in QUALITY},
        }
        for step in sorted(quality['recognised'])
    ]


def table(results: dict[str, dict[int, list[dict[str, float]]]]) -> str:
    """Mean and spread (highest minus lowest of the seeds) at the last step, and what it cost."""
    lines = ['| method | Fréchet distance | recognised | TFLOPs | seconds of training | of the dense twin |']
    lines += ['|---|---|---|---|---|---|']

    def last(method: str, key: str) -> list[float]:
        return [points[-1][key] for points in results[method].values()]

    for method in results:
        twin = 'dense, EDM' if 'EDM' in method else 'dense'
        cells = []
        for key, form in (('frechet_distance', '{:.2f}'), ('recognised', '{:.1%}')):
            values = last(method, key)
            cells.append(
                f'{form.format(statistics.mean(values))} ({form.format(min(values))} to {form.format(max(values))})'
            )
        flops, seconds = last(method, 'teraflops')[0], statistics.median(last(method, 'seconds'))
        ratios = [a / b for a, b in zip(last(method, 'seconds'), last(twin, 'seconds'), strict=True)]
        share = f'{flops / last(twin, "teraflops")[0]:.2f} x FLOPs, {statistics.median(ratios):.2f} x time'
        lines.append(f'| {method} | {cells[0]} | {cells[1]} | {flops:.2f} | {seconds:.0f} | {share} |')
    return '\n'.join(lines)


def draw(results: dict[str, dict[int, list[dict[str, float]]]], path: Path) -> None:
    """Both measures against steps, FLOPs and seconds: the mean of the seeds, and their range."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.5), sharey='row', layout='constrained')
    axis_names = {'step': 'training steps', 'teraflops': 'training TFLOPs', 'seconds': 'seconds of training'}
    for row, quality in zip(axes, QUALITY, strict=True):
        for axis, (key, label) in zip(row, axis_names.items(), strict=True):
            for color, (method, seeds) in zip(plt.cm.tab10.colors, results.items(), strict=False):  # type: ignore[attr-defined]
                runs = list(seeds.values())
                # The median: seconds on a shared machine have outliers; steps and FLOPs are the same for all seeds.
                where = [statistics.median(points[i][key] for points in runs) for i in range(len(runs[0]))]
                values = [[points[i][quality] for points in runs] for i in range(len(runs[0]))]
                style = '--' if 'EDM' in method else '-'
                axis.plot(
                    where, [statistics.mean(v) for v in values], style, marker='o', ms=4, color=color, label=method
                )
                axis.fill_between(
                    where, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, lw=0
                )
            axis.set_xlabel(label)
            axis.grid(alpha=0.25)
        row[0].set_ylabel(QUALITY[quality].replace(' (', '\n('))
    axes[0, 0].set_yscale('log')
    axes[0, 2].legend(fontsize=9)
    count = len(next(iter(results.values())))
    figure.suptitle(
        f'scikit-learn digits, {count} seeds: mean and range; EMA weights, 500 samples, Heun 25 steps, no guidance'
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/convergence'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[17, 18, 19])
    parser.add_argument('--steps', type=int, default=700)
    parser.add_argument('--points', type=int, default=5, help='measurements on the way')
    parser.add_argument('--picture', type=Path, help='(default: OUT/digits_convergence.png)')
    arguments = parser.parse_args()
    if arguments.steps % arguments.points:
        parser.error(f'--steps {arguments.steps} does not divide by --points {arguments.points}')
    results: dict[str, dict[int, Any]] = {method: {} for method in METHODS}
    begin, total = time.monotonic(), len(METHODS) * len(arguments.seeds)
    for seed in arguments.seeds:
        for method in METHODS:
            results[method][seed] = run(method, seed, arguments)
            done = sum(map(len, results.values()))
            left = (time.monotonic() - begin) / done * (total - done)
            print(f'{method}, seed {seed}: {done} of {total} runs, about {left / 60:.0f} min left', file=sys.stderr)
    (arguments.out / 'results.json').write_text(json.dumps(results, indent=1))
    draw(results, arguments.picture or arguments.out / 'digits_convergence.png')
    threads = os.environ.get('OMP_NUM_THREADS', 'all')
    print(f'{arguments.steps} steps, seeds {arguments.seeds}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}, '
          f'torch {torch.__version__}\n{table(results)}')  # fmt: skip


if __name__ == '__main__':
    main()
