"""The rooms of the package stand in one order: a file imports its own room and rooms before it, nothing else."""

import ast
import graphlib
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / 'tread_composer'
# From the ground up.
ROOMS = (
    'core', 'io', 'routing', 'models', 'objectives', 'samplers', 'autoencoders', 'data', 'metrics', 'algorithms',
    'latent_diffusion', 'callbacks', 'config', 'builders', 'weights', 'run', 'sample', 'compare', 'evaluate', 'advisor',
    'conversion', 'cli',
)  # fmt: skip
# The converters read no model and no run, and nobody but their command lines needs them.
LEAVES = {'conversion': ('cli',)}
FILES = [path for path in sorted(PACKAGE.rglob('*.py')) if path.parent != PACKAGE or path.stem in ROOMS]


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix('').parts[0]


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, at its head or within a function."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{path}: relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for parts in (name.split('.') for name in names):
            assert parts[0] != 'streaming_data', f'{path} imports a script'
            if parts[0] == 'tread_composer' and parts[1:] not in ([], ['__version__']):
                rooms.add(parts[1])
    return rooms


def test_a_file_imports_its_own_room_and_rooms_below():
    for path in FILES:
        floor = ROOMS.index(room_of(path))
        for room in imported_rooms(path):
            assert ROOMS.index(room) <= floor, f'{path.relative_to(ROOT)} imports {room}'
            assert room_of(path) in (room, *LEAVES.get(room, ROOMS)), f'{path.relative_to(ROOT)} imports {room}'


def test_no_files_import_each_other_in_a_circle():
    """Within a room too, and for types alone as well; ``__init__`` files only hand names on."""
    modules = {
        '.'.join(path.relative_to(ROOT).with_suffix('').parts): path for path in FILES if path.stem != '__init__'
    }
    imports = {}
    for module, path in modules.items():
        nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        imports[module] = {node.module for node in nodes} & modules.keys()
    graphlib.TopologicalSorter(imports).prepare()  # CycleError names the circle


def test_every_file_stands_in_a_room_and_an_algorithm_imports_no_other():
    loose = {path.stem for path in PACKAGE.glob('*.py')} - {'__init__', '__main__'}
    assert loose <= set(ROOMS), loose
    assert {path.name for path in PACKAGE.iterdir() if (path / '__init__.py').exists()} <= set(ROOMS)
    for path in PACKAGE.glob('algorithms/*/*.py'):
        for part in re.findall(r'^ *from tread_composer\.algorithms\.(\w+)', path.read_text(), re.MULTILINE):
            assert part == path.parent.name or (PACKAGE / 'algorithms' / f'{part}.py').exists(), f'{path}: {part}'
