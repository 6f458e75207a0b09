"""The house's levels (docs/architecture): a file imports lower levels and its own folder only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'tread_composer'
# From the bottom up; what stands in one row does not import its neighbours. `data/__init__` re-exports two files.
LEVELS = [
    ('core',),
    ('routing', 'batch', 'protocols', 'randomness', 'errors', 'precision', 'tensor_file'),
    ('models', 'objectives', 'samplers', 'autoencoders', 'data', 'snapshots'),
    (
        'data.mapped',
        'data.registration',
        'data.latents',
        'data.in_memory',
        'data.loaders',
        'data.digits',
        'data.checks',
    ),
    ('conversion',),
    ('metrics',),
    ('weights', 'checkpoint'),
    ('algorithms', 'callbacks'),
    ('latent_diffusion',),
    ('config',),
    ('run_data',),
    ('run_folder',),
    ('builders',),
    ('plan', 'snr', 'train'),
    ('export_file', 'posthoc'),
    ('trained',),
    ('exporting', 'report'),
    ('generate', 'importing', 'compare'),
    ('evaluate', 'advisor'),
    ('sweep',),
    ('cli',),
    ('__main__',),
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def level_of(module: str) -> int:
    while module and module not in LEVEL_OF:
        module = module.rpartition('.')[0]
    assert module, 'a file of no level'
    return LEVEL_OF[module]


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports; of `from package import name`, the name where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            for alias in node.names:
                full = f'{node.module}.{alias.name}'
                at = ROOT / full.replace('.', '/')
                found.add(full if at.is_dir() or at.with_suffix('.py').exists() else str(node.module))
    return {name for name in found if name.split('.')[0] in ('tread_composer', 'streaming_data')}


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path):
    module = module_of(path)
    if not module:  # the package itself names its doors, and imports them when they are used (test_startup)
        return
    for name in imported(path):
        assert not name.startswith('streaming_data'), f'{module} imports {name}'
        target = name.removeprefix('tread_composer').lstrip('.')
        if not target:
            continue  # the package: its version
        same_folder = module.split('.')[0] == target.split('.')[0] and '.' in target
        one_algorithm = not (module.startswith('algorithms.') and target.startswith('algorithms.')) or (
            target in ('algorithms.averages', 'algorithms.bound', 'algorithms.rules', 'algorithms.schedule')
            or module.split('.')[1] == target.split('.')[1]
        )
        assert one_algorithm, f'{module} imports another algorithm: {name}'
        assert level_of(target) < level_of(module) or same_folder, f'{module} imports {name}'


def test_every_file_has_a_level():
    for path in FILES:
        if module_of(path):
            level_of(module_of(path))


@pytest.mark.parametrize(
    ('module', 'absent'),
    [
        ('tread_composer.routing', ('composer', 'streaming', 'mlflow', 'diffusers', 'transformers')),
        ('tread_composer.models', ('composer', 'streaming', 'mlflow', 'diffusers')),
        ('tread_composer.samplers', ('composer', 'streaming', 'mlflow', 'diffusers')),
        ('tread_composer.advisor', ('composer', 'streaming', 'mlflow', 'diffusers')),
        ('tread_composer.config', ('mlflow', 'diffusers')),
    ],
)
def test_what_an_import_does_not_bring_along(module, absent):
    code = f'import sys, {module}; print([name for name in {absent!r} if name in sys.modules])'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == '[]'
