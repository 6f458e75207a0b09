"""Whether the cheap figures of the documents still hold: `python benchmarks/check_figures.py`, about 40 s of one core.

Counted again are parameters, multiply-adds, what follows from them, and versions. A figure that a benchmark has
measured is only compared with the table in benchmarks/README.md. Exit code 1 names file, figure and new value.
"""

import argparse
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()

from tread_composer.config import load_config
from tread_composer.run.plan import make_plan

ROOT = Path(__file__).resolve().parents[1]
CARDS = 'tread_composer/algorithms'
A100, H100 = 312e12, 989e12  # bfloat16 FLOPs a second
UTILISATION = 0.26  # the share of them that docs/imagenet.md takes
TWO_VIEWS = 2 * 2 * 4 * 32 * 32 * 2  # bytes: mean and log-variance of an image and of its mirror image in fp16

Row = tuple[str, Callable[[], Iterable[float | str]]]
"""A pattern whose groups are figures of a page, and what makes them."""


@functools.cache
def plan(recipe: str, *overrides: str, memory: bool = False) -> dict[str, Any]:
    """What `plan yamls/RECIPE.yaml --json` says; of the memory only where it is asked, since that takes seconds."""
    return make_plan(load_config(ROOT / 'yamls' / f'{recipe}.yaml', overrides), 1, 1, memory=memory)


def memory(recipe: str) -> float:
    """GiB of a device."""
    return plan(recipe, memory=True)['memory_gib']['total']


def flops(recipe: str) -> float:
    """Of a whole training: forward, and twice that for backward."""
    figures = plan(recipe)
    return 6e9 * figures['gmacs_routed'] * figures['samples_per_step'] * figures['batches']


def hours(peak: float, work: float) -> float:
    return work / (peak * UTILISATION) / 3600


def gigabytes(recipe: str, bytes_each: int) -> list[float]:
    return [bytes_each * plan(recipe)['parameters'] / 1e9]


def millions(*recipes: str) -> list[float]:
    return [plan(recipe)['parameters'] / 1e6 for recipe in recipes]


def samples_per_second(recipe: str) -> list[float]:
    return [H100 / 6e9 / plan(recipe)['gmacs_routed']]


def teraflops(*recipes: str) -> list[float]:
    return [flops(recipe) / 1e12 for recipe in recipes]


def maskdit(*size: str) -> list[float]:
    masked, whole = plan('dit_xl_maskdit', *size), plan('dit_xl_maskdit_tuning', *size)
    return [masked['gmacs_dense'], masked['gmacs_routed'], masked['ideal_step_ratio'], whole['gmacs_routed']]


def step_ratios() -> list[float]:
    presets = [f'model.preset=DiT-{size}/2' for size in ('S', 'B', 'L', 'XL', 'H')]
    return [plan('dit_xl_maskdit', preset)['ideal_step_ratio'] for preset in presets]


def pinned(stack: str, *packages: str) -> list[str]:
    text = (ROOT / 'constraints' / f'{stack}.txt').read_text()
    return [re.findall(rf'^{package}==(\S+)', text, re.MULTILINE)[0] for package in packages]


def measured(column: int, *methods: str) -> list[str]:
    """Cells of the table of the digits: distance 0, recognised 1, TFLOPs 2, seconds 3."""
    text = (ROOT / 'benchmarks' / 'README.md').read_text()
    rows = [re.findall(rf'^\| {method} \|(.*)\|$', text, re.MULTILINE)[0] for method in methods]
    return [row.split('|')[column].strip() for row in rows]


def refusals() -> list[float]:
    """Inputs that the tests know to be refused: overrides of a recipe, and those whose words are held to the letter."""
    text = (ROOT / 'tests' / 'config' / 'test_refusals.py').read_text()
    overrides = len(re.findall(r'^[a-z][\w.]*[ =].* -> ', text, re.MULTILINE))  # lines of its tables
    recorded = json.loads((ROOT / 'tests' / 'frozen' / 'refusals.json').read_text())['recorded']
    return [overrides, len(recorded)]


def header(method: str) -> list[str]:
    """Recognised digits with their range, and the distance."""
    return [*measured(1, method), measured(0, method)[0].split()[0]]


PAIR, DIGITS = ('dit_xl', 'dit_xl_tread'), ('digits', 'digits_tread')
N = r'([\d.,e]+)'  # a number
MEASURED = r'by us: (.*? \(.*?\)) of 500.*?distance ([\d.]+)'
FIGURES: dict[str, list[Row]] = {
    'README.md': [
        (rf'FLOPs of a training step \| 1 \| {N}x', lambda: [plan('dit_xl_tread')['ideal_step_ratio']]),
        (rf'a factor of {N} in arithmetic', lambda: [plan('digits_tread')['ideal_step_ratio']]),
    ],
    'docs/install.md': [
        (r'`newest` \(default\) \| ([\d.]+),', lambda: pinned('newest', 'torch')),
        (r'`2.11` \| ([\d.]+),', lambda: pinned('torch211', 'torch')),
        (r'`2.7` \| ([\d.]+),', lambda: pinned('torch27', 'torch')),
        (r'mosaicml==(\S+) mosaicml-streaming==(\S+)', lambda: pinned('newest', 'mosaicml', 'mosaicml-streaming')),
    ],
    'docs/promises.md': [(rf'test_refusals.py`: {N} inputs, `tests/frozen`: {N},', refusals)],
    'docs/imagenet.md': [
        (rf'GMACs per image.*?\| {N} \| {N} ', lambda: [plan(recipe)['gmacs_routed'] for recipe in PAIR]),
        (rf'training FLOPs \| {N} \| {N} ', lambda: map(flops, PAIR)),
        (rf'\| A100 hours .*?\| {N} \| {N} ', lambda: [hours(A100, flops(recipe)) for recipe in PAIR]),
        (rf'H200 hours .*?\| {N} \| {N} ', lambda: [hours(H100, flops(recipe)) for recipe in PAIR]),
        (rf'microbatch 32 \| {N} GiB \| {N} GiB', lambda: map(memory, PAIR)),
        (rf'Heun steps, A100 hours \| {N} ', lambda: [hours(A100, 50_000 * 79 * 2e9 * plan('dit_xl')['gmacs_dense'])]),
        (rf'latents, with mirrors \| {N} GB', lambda: [(1_281_167 + 50_000) * TWO_VIEWS / 1e9]),
        (rf'samples as npz \| {N} GB', lambda: [50_000 * 256 * 256 * 3 / 1e9]),
    ],
    'benchmarks/README.md': [
        (rf'dense: at most {N} samples', lambda: samples_per_second('dit_xl')),
        (rf'routed: at most {N} samples', lambda: samples_per_second('dit_xl_tread')),
        (rf'\| dense \|.*?\|.*?\| {N} ', lambda: teraflops('digits')),
        (rf'\| TREAD \|.*?\|.*?\| {N} ', lambda: teraflops('digits_tread')),
        (rf'\| MaskDiT.*?\|.*?\|.*?\| {N} ', lambda: teraflops('digits_maskdit')),
    ],
    f'{CARDS}/ema/README.md': [
        (rf'{N} GiB for the {N} million', lambda: [4 * plan('dit_xl')['parameters'] / 2**30, *millions('dit_xl')]),
    ],
    f'{CARDS}/power_ema/README.md': [
        (rf'{N} GB for XL/2', lambda: gigabytes('dit_xl', 8)),
        (rf'32 of XL/2 are {N} GB', lambda: gigabytes('dit_xl', 32 * 8)),
    ],
    f'{CARDS}/maskdit/README.md': [
        (rf'256 tokens \| {N} G \| {N} G \({N}x\) \| {N} G', maskdit),
        (rf'1024 tokens \| {N} G \| {N} G \({N}x\) \| {N} G', lambda: maskdit('data.latent_size=64')),
        (rf'{N} M; with decoder {N} M', lambda: millions('dit_xl', 'dit_xl_maskdit')),
        (rf'S/2 {N}x, B/2 {N}x, L/2 {N}x,\s+XL/2 {N}x, H/2 {N}x', step_ratios),
    ],
    f'{CARDS}/tread/README.md': [
        (rf'training TFLOPs \| {N} \| {N} ', lambda: teraflops(*DIGITS)),
        (r'samples recognised.*?\| (\S+ % \(.*?\)) \| (\S+ % \(.*?\)) ', lambda: measured(1, 'dense', 'TREAD')),
        (r'Fréchet distance in.*?\| (\S+ \(.*?\)) \| (\S+ \(.*?\)) ', lambda: measured(0, 'dense', 'TREAD')),
        (r'seconds of training.*?\| (\d+) \| (\d+) ', lambda: measured(3, 'dense', 'TREAD')),
    ],
    'yamls/digits.yaml': [(MEASURED, lambda: header('dense'))],
    'yamls/digits_tread.yaml': [(MEASURED, lambda: header('TREAD'))],
}
# Weights, average and two moments in float32.
for name in ('dit_s', 'dit_b', 'dit_l', 'dit_xl', 'lightning_dit_xl'):
    size = functools.partial(gigabytes, name, 16)
    FIGURES.setdefault(f'yamls/{name}.yaml', []).append((rf'a checkpoint is about {N} GB', size))


def fits(size: str, *overrides: str) -> list[float]:
    """Of the table of memory: what stands whatever the microbatch, MiB an image, and the largest microbatches."""
    figures = plan(f'dit_{size}_tread', *overrides, memory=True)
    parts = figures['memory_gib']
    kept = sum(parts[name] for name in ('weights', 'gradients', 'optimizer', 'average'))
    return [kept, 1024 * parts['activations'] / figures['microbatch'], *figures['largest_microbatch'].values()]


FIGURES['docs/configuration.md'] = [
    (rf'DiT-{size.upper()}/2 {kind} ' + rf'\| {N} ' * 6, functools.partial(fits, size, *words))
    for size in ('s', 'b', 'l', 'xl')
    for kind, words in (('dense', ['algorithms.tread=null']), ('TREAD', []))
]


def as_written(value: float | str, figure: str) -> str:
    """A value with the digits of the figure in a document."""
    if isinstance(value, str):
        return value
    digits = len(figure.partition('e')[0].replace(',', '').partition('.')[2])
    if 'e' in figure:
        return f'{value:.{digits}e}'.replace('e+', 'e')
    return f'{value:,.{digits}f}' if ',' in figure else f'{value:.{digits}f}'


def stale_figures(root: Path = ROOT) -> list[str]:
    """A line for each figure that no longer holds, or is no longer where it was."""
    stale = []
    for page, (pattern, values) in [(page, row) for page, rows in FIGURES.items() for row in rows]:
        match = re.search(pattern, (root / page).read_text())
        if match is None:
            stale.append(f'{page}: no figure matches {pattern!r}')
            continue
        for figure, value in zip(match.groups(), values(), strict=True):
            new = as_written(value, figure)
            if figure != new:
                stale.append(f'{page}: {figure} in {match[0]!r} is {new} now')
    return stale


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    lines = stale_figures()
    print('\n'.join(lines or [f'the figures of {len(FIGURES)} files hold']))
    sys.exit(1 if lines else 0)
