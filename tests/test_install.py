"""``constraints/`` and ``[tool.uv]`` say what Composer, streaming and we declare, less the ceilings."""

import importlib.metadata
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.runs import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
CONSTRAINTS = ROOT / 'constraints'
# torchvision belongs to one torch each, as its own metadata says; numpy and transformers say under which ceilings.
STACKS = {
    'torch27.txt': {'torch': '2.7.0', 'torchvision': '0.22.0', 'xformers': '0.0.30'},
    'torch211.txt': {'torch': '2.11.0', 'torchvision': '0.26.0', 'xformers': '0.0.35'},
    'newest.txt': {'torch': '2.15.0', 'torchvision': '0.29.2', 'xformers': '0.0.35'},
}
CEILINGS_OF = ('mosaicml', 'mosaicml-streaming')
USERS_OWN = {'torch', 'torchvision', *CEILINGS_OF}


def read(name):
    lines = (CONSTRAINTS / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith('#')]


def floors(requirements):
    """Package -> its lowest permitted version; the highest of them where a package is named twice."""
    lowest = {}
    for requirement in requirements:
        (version,) = [spec.version for spec in requirement.specifier if spec.operator in ('>=', '==')]
        name = canonicalize_name(requirement.name)
        lowest[name] = max(Version(version), lowest.get(name, Version('0')))
    return lowest


def declared(distribution):
    return [Requirement(text) for text in importlib.metadata.requires(distribution) or () if 'extra ==' not in text]


def ours():
    return [Requirement(text) for text in PYPROJECT['project']['dependencies']]


@pytest.mark.parametrize('distribution', CEILINGS_OF)
def test_metadata_for_uv_is_what_the_release_declares_without_its_ceilings(distribution):
    (entry,) = [entry for entry in PYPROJECT['tool']['uv']['dependency-metadata'] if entry['name'] == distribution]
    (pin,) = [requirement for requirement in ours() if requirement.name == distribution]
    assert importlib.metadata.version(distribution) == entry['version'] == str(pin.specifier).removeprefix('==')
    written = [Requirement(text) for text in entry['requires-dist']]
    assert floors(written) == floors(declared(distribution))
    assert all(spec.operator == '>=' for requirement in written for spec in requirement.specifier)


def test_the_file_for_a_torch_of_the_user_names_everything_but_the_torch():
    wanted = [*declared('mosaicml'), *declared('mosaicml-streaming'), *ours()]
    beside = read('beside_your_torch.txt')
    assert floors(beside) == {name: lowest for name, lowest in floors(wanted).items() if name not in USERS_OWN}
    pinned = {requirement.name for requirement in beside if not str(requirement.specifier).startswith('>=')}
    assert pinned == {'torch-fidelity'}


@pytest.mark.parametrize('name', STACKS)
def test_a_stack_holds_the_pairs_and_every_package_that_is_needed(name):
    stack = read(name)
    exact = {canonicalize_name(requirement.name): str(requirement.specifier) for requirement in stack}
    assert {package: exact[package] for package in STACKS[name]} == {p: f'=={v}' for p, v in STACKS[name].items()}
    assert all(re.fullmatch(r'==[\w.!]+', specifier) for specifier in exact.values())
    needed = [*declared('mosaicml'), *declared('mosaicml-streaming'), *ours()]
    assert {canonicalize_name(requirement.name) for requirement in needed} <= set(exact)
    if name == 'torch27.txt':  # the ceilings are kept there
        plain = [requirement for requirement in stack if requirement.marker is None]
        pins = {canonicalize_name(requirement.name): str(requirement.specifier)[2:] for requirement in plain}
        for requirement in needed:
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is None or requirement.specifier.contains(pin), (str(requirement), pin)


def test_no_file_names_an_address_and_a_torch_has_no_upper_bound():
    for path in CONSTRAINTS.iterdir():
        assert not re.search(r'://|--(extra-)?index|--find-links| @ ', path.read_text()), path.name
    assert sorted(path.name for path in CONSTRAINTS.iterdir()) == sorted([*STACKS, 'beside_your_torch.txt'])
    assert [str(requirement.specifier) for requirement in ours() if requirement.name == 'torch'] == ['>=2.7']
