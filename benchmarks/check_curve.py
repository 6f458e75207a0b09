"""Does a run begin as ours did? Its training loss against the band of several seeds under docs/curves/.

    python benchmarks/check_curve.py runs/digits_tread                                  (make check-curve)
    python benchmarks/check_curve.py RUN RUN ... --write docs/curves/digits_tread.csv   (makes the band)

The loss is averaged over windows of 20 batches, up to batch 200: one batch says little. The band reaches from the
lowest to the highest seed and half of that beyond each end, at least 2 % of the loss: three seeds do not show the
extremes.
"""

import argparse
import csv
import statistics
import sys
from pathlib import Path

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import yaml

from tread_composer.compare.runs import store_of
from tread_composer.core.errors import UserError
from tread_composer.io.files import whole_file
from tread_composer.io.table import text_table

CURVES = Path(__file__).parent.parent / 'docs' / 'curves'
LOSS = 'loss/train/total'
WINDOW, UNTIL = 20, 200
_LEAST = 0.02  # of the loss: the width of the band on either side


def windows(folder: Path) -> dict[int, float]:
    """Mean loss of each whole window, by its last batch."""
    config = yaml.safe_load((folder / 'config.yaml').read_text())
    try:
        client, run = store_of(config, folder)
    except UserError as error:
        sys.exit(f'{folder}: {error}')
    losses = {entry.step + 1: entry.value for entry in client.get_metric_history(run.info.run_id, LOSS)}
    means = {}
    for end in range(WINDOW, UNTIL + 1, WINDOW):
        values = [losses[batch] for batch in range(end - WINDOW + 1, end + 1) if batch in losses]
        if len(values) == WINDOW:
            means[end] = statistics.mean(values)
    if not means:
        sys.exit(f'{folder}: MLflow has no {WINDOW} batches of {LOSS}; train with the logger mlflow, which has it')
    return means


def write_band(folders: list[Path], path: Path) -> None:
    """The band of these runs."""
    curves = [windows(folder) for folder in folders]
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as unfinished, open(unfinished, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(('batch', 'low', 'high'))
        for batch in sorted(set.intersection(*(set(curve) for curve in curves))):
            low, high = (bound(curve[batch] for curve in curves) for bound in (min, max))
            margin = max((high - low) / 2, _LEAST * high)
            writer.writerow((batch, f'{low - margin:.4f}', f'{high + margin:.4f}'))


def check(folder: Path, path: Path) -> bool:
    """Whether every window of the run lies in the band; prints all of them."""
    curve, inside, rows = windows(folder), True, []
    with open(path) as file:
        bands = {int(row['batch']): (float(row['low']), float(row['high'])) for row in csv.DictReader(file)}
    for batch, (low, high) in bands.items():
        value = curve.get(batch)
        verdict = 'not trained yet' if value is None else 'inside' if low <= value <= high else 'OUTSIDE'
        inside &= verdict != 'OUTSIDE'
        rows.append((batch, '' if value is None else f'{value:.4f}', f'{low:.4f} to {high:.4f}', verdict))
    print(text_table(('batches to', 'loss', 'band', ''), rows, 'rrll'))
    print(f'{folder}: {"begins as ours did" if inside else "does not begin as ours did"} ({path.name})')
    return inside


def main() -> int:
    """0 inside, 1 outside."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help="a run's folder")
    parser.add_argument('--band', type=Path, help='(default: docs/curves/<name of the run>.csv)')
    parser.add_argument('--write', type=Path, help='make a band of these runs')
    options = parser.parse_args()
    if options.write is not None:
        write_band(options.runs, options.write)
        return 0
    results = []
    for folder in options.runs:
        path = options.band or CURVES / f'{folder.name}.csv'
        if not path.exists():
            sys.exit(
                f'{folder}: there is no {path}; there are {", ".join(p.name for p in sorted(CURVES.glob("*.csv")))}'
            )
        results.append(check(folder, path))
    return 0 if all(results) else 1


if __name__ == '__main__':
    sys.exit(main())
