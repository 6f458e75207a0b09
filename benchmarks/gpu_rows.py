"""What ``gpu.py`` runs, in order of importance."""

import argparse
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

__all__ = ['Row', 'rows_of']

# A rehearsal walks every path on a CPU: a network of a few thousand parameters, and no figure of it means anything.
SMALL = ('model={preset: null, patch_size: 2, hidden_size: 32, depth: 8, num_heads: 2}', 'data.latent_size=16')
SHORT = (
    'max_duration=12ba', 'eval_interval=6ba', 'save_interval=12ba', 'callbacks.sample_grid=null',
    'callbacks.digits_quality=null', 'scheduler={name: constant}',
)  # fmt: skip

PLAIN = 'algorithms.tread.float32_after=false'  # without the recipes' block in float32 behind the route
PYTEST = ('-m', 'gpu', '-q', '-rs', '-p', 'no:cacheprovider', '--continue-on-collection-errors')
LONG = '--tokens 1024'
# Name, recipe, samples of a step (for 80 GB), settings, then flags of step_time.py.
FIRST_STEPS = (
    ('xl/2 eager', 'xl', 64, ''),
    ('xl/2 compiled', 'xl', 64, '--compile'),
    ('b/2 eager', 'b', 128, ''),
    ('b/2 compiled', 'b', 128, '--compile'),
    ('s/2 eager', 's', 256, ''),
    ('s/2 compiled', 's', 256, '--compile'),
    ('xl/2 compiled, no float32 block', 'xl', 64, f'{PLAIN} --compile'),
    ('xl/2 compiled, static shapes', 'xl', 64, f'{PLAIN} --compile --dynamic false'),
)
FURTHER_STEPS = (
    ('xl/2 compiled, fused AdamW', 'xl', 64, f'optimizer.fused=true {PLAIN} --compile'),
    ('xl/2 compiled as a whole', 'xl', 64, f'{PLAIN} --compile model'),
    ('l/2 eager', 'l', 64, ''),
    ('l/2 compiled', 'l', 64, '--compile'),
    ('xl/2 compiled, 1024 tokens', 'xl', 16, f'{LONG} --compile'),
    ('b/2 compiled, 1024 tokens', 'b', 32, f'{LONG} --compile'),
    ('s/2 compiled, 1024 tokens', 's', 64, f'{LONG} --compile'),
    ('l/2 compiled, 1024 tokens', 'l', 16, f'{LONG} --compile'),
    ('xl/2 eager, xformers', 'xl', 64, 'model.attention=xformers'),
    ('xl/2 compiled, xformers', 'xl', 64, 'model.attention=xformers --compile'),
    ('xl/2 compiled, xformers, 1024 tokens', 'xl', 16, f'model.attention=xformers {LONG} --compile'),
    ('xl/2 compiled, flex', 'xl', 64, 'model.attention=flex --compile'),
    ('xl/2 compiled, flex, 1024 tokens', 'xl', 16, f'model.attention=flex {LONG} --compile'),
)


@dataclass(frozen=True)
class Row:
    """One process to run.

    Args:
        name: What it is found by when a run goes on.
        words: Behind ``python``.
        seconds: What it should take; it is not started with less left.
        limit: After so many seconds it is ended.
        alone: It uses all GPUs.
    """

    name: str
    words: tuple[str, ...]
    seconds: int
    limit: int
    alone: bool = False


def rows_of(options: argparse.Namespace) -> list[Row]:
    """What is measured, the most important first.

    Args:
        options: ``device``, ``rehearse``, and ``share``: what of the batches the card takes.
    """
    return [
        Row('tests', ('-m', 'pytest', *_gpu_tests(), *PYTEST), 180, 480, alone=True),
        *(_step(*row, options) for row in FIRST_STEPS),
        _in_trainer(options),
        _quickstart(options),
        *(_step(*row, options) for row in FURTHER_STEPS),
        *(_largest(size, options) for size in ('xl', 'b')),
    ]


def _gpu_tests() -> list[str]:
    """Files with such tests: to collect the others takes longer, and needs packages that a GPU machine may lack."""
    root = Path(__file__).parent.parent
    files = sorted((root / 'tests').rglob('test_*.py'))
    return [str(path.relative_to(root)) for path in files if 'pytest.mark.gpu' in path.read_text()]


def _step(name: str, size: str, batch: int, text: str, options: argparse.Namespace) -> Row:
    words, seconds = text.split(), 120 if '--compile' in text else 60
    common = ['--device', options.device, '--dtype', 'bf16', '--label', name]
    if options.rehearse:
        words, seconds = [*SMALL, *text.replace(LONG, '').split()], seconds // 2
        common += ['--batch-size', '2', '--pairs', '2', '--label', 'rehearsal']
    else:
        common += ['--batch-size', str(max(1, int(batch * options.share)))]
    return Row(name, ('benchmarks/step_time.py', f'yamls/dit_{size}_tread.yaml', *words, *common), seconds, 4 * seconds)


def _in_trainer(options: argparse.Namespace) -> Row:
    small = (*SMALL, 'precision=fp32', 'data.num_workers=0', '--batches', '6', '--batch-size', '4')
    words = ('benchmarks/trainer_step.py', 'yamls/dit_b_tread.yaml', *(small if options.rehearse else ()))
    return Row('b/2 in the Trainer', (*words, '--device', options.device), 90, 240)


def _quickstart(options: argparse.Namespace) -> Row:
    folder = f'{tempfile.gettempdir()}/quickstart-{os.getpid()}'
    device = 'gpu' if options.device == 'cuda' else 'cpu'  # in Composer's words
    settings = (f'device={device}', f'save_folder={folder}/run', f'data.local={folder}/data', 'loggers.mlflow=null')
    words = ('train.py', 'yamls/digits_tread.yaml', *settings, 'progress_bar=false')
    return Row('quickstart', (*words, *(SHORT if options.rehearse else ())), 75, 300)


def _largest(size: str, options: argparse.Namespace) -> Row:
    small = (*SMALL, '--at-most', '4') if options.rehearse else ()
    words = ('benchmarks/largest_microbatch.py', f'yamls/dit_{size}_tread.yaml', *small, '--device', options.device)
    return Row(f'{size}/2 largest microbatch', words, 90, 240)
