"""Dense, TREAD, MaskDiT, FasterDiT and combinations on one data set: quality against steps, FLOPs and time.

    python benchmarks/convergence.py digits
    python benchmarks/convergence.py cifar10 --data data/cifar10 [--small] [--minutes 9] [--inception FILE]
    python benchmarks/convergence.py tiny_imagenet --data data/tiny_imagenet

Each method is its shipped YAML, run by the documented command, one process after another. Finished runs are kept, one
that is cut off (by ``--minutes`` too) goes on from its checkpoint, and the same command goes on with the comparison.
Seeds are in the outer loop: whatever else the machine does falls on all methods alike. Every method of a seed sees the
same samples, labels and noise. Writes ``results.json``, a table, a picture, and ``losses.csv``, the curves of the
training loss. Several machines may take some of the seeds or methods each: ``--join`` puts their results together, if
all have the same classifier (copy it into ``--out`` before the first run).

Quality is measured in features of a classifier that was trained on the training images (``image_classifier.py``; for
the digits ``metrics.digits``), which is no FID; with ``--inception`` in those of Inception. ``--small`` is for CPUs: a
network of 8 blocks of width 128, patches of 4 pixels (8 on Tiny-ImageNet), 64 tokens, batches of 64, float32.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import torch
from mlflow import MlflowClient

from tread_composer.io.chart import logarithmic_y
from tread_composer.io.files import write_json
from tread_composer.metrics.protocol import differences, load_results

ROOT = Path(__file__).parent.parent
LOSS = 'loss/train/total'
_FILES = {
    'dense': '',
    'TREAD': '_tread',
    'FasterDiT': '_fasterdit',
    'TREAD + FasterDiT': '_tread_fasterdit',
    # MaskDiT is defined for EDM, so it gets a dense twin with that objective.
    'dense, EDM': '_edm',
    'TREAD, EDM': '_edm_tread',
    'MaskDiT (EDM)': '_maskdit',
}
_AXES = {'step': 'training steps', 'teraflops': 'training TFLOPs', 'seconds': 'seconds of training'}
Points = list[dict[str, float]]
Results = dict[str, dict[int, Points]]


@dataclass(frozen=True)
class Benchmark:
    """What is compared on a data set, and how it is measured.

    Args:
        methods: Name to recipe and ``key=value`` texts.
        words: Of every run.
        evaluation: Arguments of the callback.
        qualities: Name of a metric to what the picture calls it.
        experiment: MLflow's.
        caption: What was measured.
    """

    methods: dict[str, tuple[str, list[str]]]
    words: list[str]
    evaluation: dict[str, Any]
    qualities: dict[str, str]
    experiment: str
    caption: str


def digits() -> Benchmark:
    """The quickstart's network and data."""
    methods = {name: (f'digits{ending}.yaml', []) for name, ending in _FILES.items() if 'EDM' not in name}
    methods['dense, EDM'] = 'digits.yaml', ['objective={name: edm, sigma_data: 0.75}']
    methods['MaskDiT (EDM)'] = 'digits_maskdit.yaml', []
    return Benchmark(
        methods,
        ['callbacks.digits_quality=null'],
        {'reference': 'digits', 'features': 'digits', 'metrics': ['fid', 'recognised'], 'num_samples': 500},
        {
            'fd_digits_500': 'Fréchet distance (classifier features, not an FID; lower is better)',
            'recognised_digits_500': 'share recognised as the digit asked for',
        },
        'digits',
        'scikit-learn digits, EMA weights, 500 samples, Heun 25 steps, no guidance',
    )


def images(dataset: str, options: argparse.Namespace) -> Benchmark:
    """CIFAR-10 or Tiny-ImageNet, as pixels of our own converter."""
    count, words = options.samples, [f'data.local={options.data.resolve()}']
    if options.small:
        patch = {'cifar10': 4, 'tiny_imagenet': 8}[dataset]
        words += [
            f'model={{name: dit, patch_size: {patch}, hidden_size: 128, depth: 8, num_heads: 4}}',
            'global_train_batch_size=64', 'global_eval_batch_size=64', 'precision=fp32', 'optimizer.lr=1e-3',
            'algorithms.ema.decay=0.999', 'scheduler.t_warmup=100ba', 'data.num_workers=0',
        ]  # fmt: skip
    evaluation: dict[str, Any] = {'reference': str((options.data / 'train').resolve()), 'num_samples': count}
    if options.inception is not None:
        evaluation |= {'features': 'inception', 'inception': str(options.inception.resolve()), 'metrics': ['fid']}
        qualities = {'fid' if count >= 50_000 else f'fid_{count}': 'FID (lower is better)'}
    else:
        module = 'benchmarks.image_classifier'
        evaluation |= {'features': f'{module}:ClassifierFeatures', 'metrics': ['fid', f'{module}:Recognised']}
        qualities = {
            f'fd_image_classifier_{count}': 'Fréchet distance (classifier features, not an FID; lower is better)',
            f'recognised_image_classifier_{count}': 'share recognised as the class asked for',
        }
    # The small network has blocks 0 to 7, of which MaskDiT's decoder is to be the smaller part.
    decoder = '{mask_ratio: 0.5, mae_weight: 0.1, decoder_depth: 2, decoder_hidden_size: 64, decoder_num_heads: 4}'
    small = {'MaskDiT (EDM)': [f'algorithms.maskdit={decoder}']} if options.small else {}
    methods = {name: (f'{dataset}{ending}.yaml', small.get(name, [])) for name, ending in _FILES.items()}
    network = 'small network' if options.small else 'S'
    caption = f'{dataset}, {network}, EMA weights, {count:,} samples, Heun 25 steps, no guidance'
    return Benchmark(methods, words, evaluation, qualities, dataset, caption)


def make_classifier(options: argparse.Namespace) -> None:
    """The judge of the images, once; its file is found by the environment variable."""
    path = options.out / 'classifier.safetensors'
    if not path.exists():
        script = ROOT / 'benchmarks' / 'image_classifier.py'
        words = [str(options.data), '--out', str(path), '--epochs', str(options.classifier_epochs)]
        subprocess.run([sys.executable, str(script), *words], check=True, env=_environment())
    os.environ['IMAGE_CLASSIFIER'] = str(path.resolve())


def _environment() -> dict[str, str]:
    return {**os.environ, 'PYTHONPATH': str(ROOT)}


def run_name(benchmark: Benchmark, method: str, seed: int) -> str:
    """The name of a run and of its folder."""
    yaml, overrides = benchmark.methods[method]
    return f'{Path(yaml).stem}{"_edm" if "sigma_data" in str(overrides) else ""}_{seed}'


def run(benchmark: Benchmark, method: str, seed: int, options: argparse.Namespace, end: float) -> Points:
    """Train one method once; its measurements, from the folder if it was finished before.

    Raises:
        TimeoutError: ``end``, as ``time.monotonic`` counts, came before its end.
    """
    yaml, overrides = benchmark.methods[method]
    name = run_name(benchmark, method, seed)
    folder = (options.out / name).resolve()
    result = folder / 'points.json'
    words = [*benchmark.words, *overrides]
    settings = {'steps': options.steps, 'points': options.points, 'words': words, 'evaluation': benchmark.evaluation}
    if result.exists():
        saved = json.loads(result.read_text())
        if saved['settings'] != settings:
            sys.exit(f'{result} was measured with {saved["settings"]}, this is {settings}: choose another --out')
        return saved['points']
    every = options.steps // options.points
    evaluation = {**benchmark.evaluation, 'interval': f'{every}ba', 'num_steps': 25, 'folder': str(folder)}
    command = [
        sys.executable, str(ROOT / 'train.py'), str(ROOT / 'yamls' / yaml),
        f'run_name={name}', f'seed={seed}', f'max_duration={options.steps}ba', f'save_folder={folder}',
        f'eval_interval={options.steps}ba', f'save_interval={max(every // 4, 1)}ba', 'save_num_checkpoints_to_keep=1',
        'callbacks.sample_grid=null', f'callbacks.evaluation={json.dumps(evaluation)}',
        f'callbacks.speed_monitor={{window_size: {min(20, max(every - 1, 1))}}}', f'loggers.mlflow.tracking_uri=sqlite:///{folder}/mlflow.db',
        *words,
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'log.txt', 'a') as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        try:
            code = child.wait(timeout=max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            raise TimeoutError from None
    if code:
        sys.exit(f'{" ".join(command)}\nfailed: see {folder / "log.txt"}')
    points = measurements(benchmark, folder, flops_per_step(yaml, words))
    if [point['step'] for point in points] != list(range(every, options.steps + 1, every)):
        sys.exit(f'{folder}: not all of {options.points} measurements are there; {folder / "log.txt"} says why')
    write_json(result, {'settings': settings, 'points': points})
    return points


def flops_per_step(yaml: str, words: list[str]) -> float:
    """TFLOPs of a training step: 2 per multiply-accumulate, the backward pass twice the forward."""
    command = [sys.executable, '-m', 'tread_composer', 'plan', str(ROOT / 'yamls' / yaml), '--json', *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=_environment())
    plan = json.loads(done.stdout)
    return 6 * plan['gmacs_routed'] * plan['samples_per_step'] / 1000


def measurements(benchmark: Benchmark, folder: Path, teraflops: float) -> Points:
    """Quality by step, with the FLOPs and the seconds of training (evaluation and sampling excluded) until there."""
    client = MlflowClient(f'sqlite:///{folder}/mlflow.db')
    experiment = client.get_experiment_by_name(benchmark.experiment)
    assert experiment is not None
    # One that was killed before its first checkpoint began anew: the last one counts.
    latest = client.search_runs([experiment.experiment_id], order_by=['attributes.start_time DESC'])[0]

    def history(key: str) -> dict[int, float]:
        return {entry.step: entry.value for entry in client.get_metric_history(latest.info.run_id, key)}

    with open(folder / 'loss.csv', 'w', newline='') as file:
        losses = sorted((step + 1, loss) for step, loss in history(LOSS).items())  # logged before the batch counts
        csv.writer(file).writerows([('batch', 'loss'), *losses])
    # Composer's clock of training time counts what callbacks do, so the rate of undisturbed windows is taken.
    rate = statistics.median(history('throughput/batches_per_sec').values())
    quality: dict[int, dict[str, float]] = {}
    for entry in load_results(folder / 'results.json'):
        quality.setdefault(entry['batch'], {})[entry['metric']] = entry['value']
    return [
        {'step': step, 'teraflops': step * teraflops, 'seconds': step / rate, **values}
        for step, values in sorted(quality.items())
    ]


def protocol_of(benchmark: Benchmark, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """What two results must share to stand in one table: the training, and how images were drawn and measured."""
    measured = load_results(options.out / run_name(benchmark, method, seed) / 'results.json')[0]['protocol']
    words = [word for word in benchmark.words if not word.startswith('data.local=')]  # a path; the hash says what it is
    return {'steps': options.steps, 'points': options.points, 'words': words, **measured}


def join(results: Results, protocol: dict[str, Any], path: Path, other: dict[str, Any]) -> None:
    """Add what another machine, or an earlier session, has measured by the same command: its ``results.json``."""
    faults = differences(protocol, other['protocol'])
    for method, seeds in other['results'].items():
        faults += [f'{method}, seed {seed}, is ours too' for seed in seeds if int(seed) in results.get(method, {})]
    if faults:
        sys.exit(f'--join {path}: these results do not join with ours: {"; ".join(faults)}')
    for method, seeds in other['results'].items():
        results.setdefault(method, {}).update({int(seed): points for seed, points in seeds.items()})


def write_losses(results: Results, options: argparse.Namespace, benchmark: Benchmark) -> None:
    """The training loss of all runs, means of windows of 50 batches: method, seed, last batch, loss."""
    with open(options.out / 'losses.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('method', 'seed', 'batch', 'loss'))
        for method, seeds in results.items():
            for seed in seeds:
                with open(options.out / run_name(benchmark, method, seed) / 'loss.csv') as losses:
                    values = [float(row['loss']) for row in csv.DictReader(losses)]
                for end in range(50, len(values) + 1, 50):
                    writer.writerow((method, seed, end, f'{statistics.mean(values[end - 50 : end]):.4f}'))


def dense_twin(method: str) -> str:
    """What a method is compared with: the same objective without it."""
    return 'dense, EDM' if 'EDM' in method else 'dense'


def time_share(results: Results, method: str) -> float | None:
    """Seconds of a method by those of its dense twin: seed by seed, since seeds may come from several machines."""
    runs, twins = results[method], results.get(dense_twin(method), {})
    shares = [runs[seed][-1]['seconds'] / twins[seed][-1]['seconds'] for seed in runs.keys() & twins.keys()]
    return statistics.median(shares) if shares else None


def table(benchmark: Benchmark, results: Results) -> str:
    """Mean and range of the seeds at the last step, and what it cost."""
    header = ['method', 'seeds', *benchmark.qualities, 'TFLOPs', 'seconds of training', 'of the dense twin']
    lines = [f'| {" | ".join(header)} |', '|---' * len(header) + '|']

    def last(method: str, key: str) -> list[float]:
        return [points[-1][key] for points in results[method].values()]

    for method in results:
        twin = dense_twin(method)
        cells = []
        for key in benchmark.qualities:
            form, values = '{:.1%}' if 'recognised' in key else '{:.2f}', last(method, key)
            mean, low, high = (form.format(value) for value in (statistics.mean(values), min(values), max(values)))
            cells.append(f'{mean} ({low} to {high})')
        flops, seconds = last(method, 'teraflops')[0], statistics.median(last(method, 'seconds'))
        share = time_share(results, method)
        costs = 'not measured'
        if share is not None:
            costs = f'{flops / last(twin, "teraflops")[0]:.2f} x FLOPs, {share:.2f} x time'
        cells = [method, str(len(results[method])), *cells, f'{flops:.2f}', f'{seconds:.0f}', costs]
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines)


def draw(benchmark: Benchmark, results: Results, path: Path) -> None:
    """Each measure against steps, FLOPs and seconds: the mean of the seeds, and their range."""
    rows = len(benchmark.qualities)
    figure, axes = plt.subplots(rows, 3, figsize=(13, 3.75 * rows), sharey='row', layout='constrained', squeeze=False)
    for row, quality in zip(axes, benchmark.qualities, strict=True):
        for axis, (key, label) in zip(row, _AXES.items(), strict=True):
            for color, method in zip(plt.cm.tab10.colors, results, strict=False):  # type: ignore[attr-defined]
                _draw_method(axis, method, results, (key, quality), color)
            axis.set_xlabel(label)
            axis.grid(alpha=0.25)
        row[0].set_ylabel(benchmark.qualities[quality].replace(' (', '\n('))
    logarithmic_y(axes[0, 0])
    axes[0, 2].legend(fontsize=9)
    figure.suptitle(f'{benchmark.caption}; mean and range of the seeds')
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_method(axis: Any, method: str, results: Results, keys: tuple[str, str], color: Any) -> None:
    where, quality = keys
    runs = list(results[method].values())
    numbers = range(len(runs[0]))
    # The median: seconds on a shared machine have outliers; steps and FLOPs are the same for all seeds.
    xs = [statistics.median(points[i][where] for points in runs) for i in numbers]
    share = time_share(results, method)
    if where == 'seconds' and share is not None:  # on the machine of the dense twin's median
        seconds = share * statistics.median(points[-1]['seconds'] for points in results[dense_twin(method)].values())
        xs = [x * seconds / xs[-1] for x in xs]
    values = [[points[i][quality] for points in runs] for i in numbers]
    style = '--' if 'EDM' in method else '-'
    label = f'{method}, seeds: {len(runs)}'
    axis.plot(xs, [statistics.mean(v) for v in values], style, marker='o', ms=4, color=color, label=label)
    axis.fill_between(xs, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.12, lw=0)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('dataset', choices=['digits', 'cifar10', 'tiny_imagenet'])
    parser.add_argument('--data', type=Path, help='folder of the converted data; not for the digits')
    parser.add_argument('--out', type=Path, help='(default: runs/convergence/DATASET)')
    parser.add_argument('--methods', nargs='+', choices=list(_FILES), help='(default: all)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[17, 18, 19])
    parser.add_argument('--steps', type=int, help='(default: 700 for the digits, else 4,000)')
    parser.add_argument('--points', type=int, default=5, help='measurements on the way (default: 5)')
    parser.add_argument('--samples', type=int, default=5000, help='images of a measurement; the digits take 500')
    parser.add_argument('--small', action='store_true', help='the network for CPUs')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='stop then; the same command goes on')
    parser.add_argument('--inception', type=Path, help="Inception's weights, for an FID")
    parser.add_argument('--classifier-epochs', type=int, default=8)
    parser.add_argument('--join', type=Path, nargs='+', default=[], metavar='FILE', help="others' results.json")
    parser.add_argument('--picture', type=Path, help='(default: OUT/convergence.png)')
    options = parser.parse_args()
    options.steps = options.steps or (700 if options.dataset == 'digits' else 4000)
    options.out = options.out or Path('runs/convergence') / options.dataset
    if options.steps % options.points:
        parser.error(f'--steps {options.steps} does not divide by --points {options.points}')
    if (options.data is None) != (options.dataset == 'digits'):
        parser.error('--data: is needed for all but the digits, which have their own')
    return options


def main() -> int:
    """0 when all runs are done, 3 when ``--minutes`` were over before."""
    options = parse()
    others = {path: json.loads(path.read_text()) for path in options.join}  # before the hours of training
    begin = time.monotonic()
    if options.dataset == 'digits':
        benchmark = digits()
        benchmark.words.append(f'data.local={options.out.resolve()}/data')
    else:
        benchmark = images(options.dataset, options)
        if options.inception is None:
            make_classifier(options)
    methods = [name for name in benchmark.methods if options.methods is None or name in options.methods]
    results: Results = {method: {} for method in methods}
    total = len(methods) * len(options.seeds)
    for seed in options.seeds:
        for method in methods:
            try:
                results[method][seed] = run(benchmark, method, seed, options, begin + 60 * options.minutes)
            except TimeoutError:
                print(f'{method}, seed {seed}: goes on from its checkpoint with the same command', file=sys.stderr)
                return 3
            done = sum(map(len, results.values()))
            left = (time.monotonic() - begin) / done * (total - done)
            print(f'{method}, seed {seed}: {done} of {total} runs, about {left / 60:.0f} min left', file=sys.stderr)
    write_losses(results, options, benchmark)
    protocol = protocol_of(benchmark, methods[0], options.seeds[0], options)
    for path, other in others.items():
        join(results, protocol, path, other)
    results = {method: results[method] for method in benchmark.methods if method in results}  # dense first
    write_json(options.out / 'results.json', {'protocol': protocol, 'results': results})
    draw(benchmark, results, options.picture or options.out / 'convergence.png')
    threads = os.environ.get('OMP_NUM_THREADS', 'all')
    seeds = sorted({seed for runs in results.values() for seed in runs})
    print(f'{options.steps} steps, seeds {seeds}, {os.cpu_count()} cores, OMP_NUM_THREADS {threads}, '
          f'torch {torch.__version__}\n{table(benchmark, results)}')  # fmt: skip
    return 0


if __name__ == '__main__':
    sys.exit(main())
