"""Arbitrary files and words: each is read or refused in words, at once. `make fuzz` tries 400 times as many."""

import json
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.runs import YAMLS
from tread_composer.config import ConfigError, load_config
from tread_composer.config.document import dump_yaml, read_document
from tread_composer.core.errors import UserError
from tread_composer.data.manifest import Manifest
from tread_composer.data.shards import read_index

# The same examples each time, and no file of them beside the code.
_ALWAYS: dict[str, Any] = {'deadline': None, 'database': None}
settings.register_profile('default-of-tests', max_examples=50, derandomize=True, **_ALWAYS)
settings.register_profile('long', max_examples=20_000, **_ALWAYS)
if settings.get_current_profile_name() == 'default':
    settings.load_profile('default-of-tests')

EXTREMES = [0, -1, 1, 2**31, 2**32, 2**63, 10**30, 1e-30, 1e300]
UNITS = ['ep', 'ba', 'sp', 'tok', 'iter', 'sec', 'dur', '', ' ba', 'x']
WORDS = ['', '.', '..', '../x', '/', '~', '${seed}', '${oc.env:HOME}', '${', 'os:system', ':', 'dit', 'null']
SIGNS = string.ascii_letters + '${}[]&*!|>%@`\'"#,:-._/\\ \n\0\x1b'
NUMBERS = st.one_of(st.integers(), st.integers(-3, 20), st.floats(), st.sampled_from(EXTREMES))
TIMES = st.builds('{}{}'.format, NUMBERS, st.sampled_from(UNITS))
TEXTS = st.one_of(st.text(max_size=20), st.text(SIGNS, max_size=20), TIMES, st.sampled_from(WORDS))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)


def places(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Where something stands in a tree of mappings and lists."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [inner for key, value in entries for inner in [(*path, key), *places(value, (*path, key))]]


def replaced(tree: Any, path: tuple[str | int, ...], value: object) -> Any:
    """A copy with another value at one place."""
    tree = json.loads(json.dumps(tree))
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


RECIPES = [load_config(YAMLS / f'{name}.yaml').to_dict() for name in ('digits_tread', 'dit_xl_maskdit', 'digits_ddpm')]
SECTIONS = st.sampled_from(RECIPES).flatmap(
    lambda tree: st.builds(replaced, st.just(tree), st.sampled_from(places(tree)), VALUES)
)


def refused_in_words(path: Path, read: Callable[[Path], Any]) -> Any:
    """What is read, from the folder of ``path``; None where it is refused, naming the file."""
    try:
        return read(path.parent)
    except UserError as error:
        text = str(error)
    assert path.name in text
    return None


def loaded_again(path: Path, *overrides: str) -> None:
    """What is accepted can be written and read again; what is not, is refused in words."""
    try:
        config = load_config(path, overrides)
    except ConfigError as error:
        text = str(error)
    else:
        path.write_text(config.to_yaml())
        assert load_config(path).to_dict() == config.to_dict()
        return
    assert text.strip()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('fuzz')


@given(tree=SECTIONS)
def test_a_value_of_any_kind_at_any_place_of_a_recipe(folder, tree):
    try:
        text = dump_yaml(tree)
    except yaml.YAMLError:  # YAML has no such characters
        return
    (folder / 'run.yaml').write_text(text, encoding='utf-8', errors='surrogatepass')
    loaded_again(folder / 'run.yaml')


@given(key=st.sampled_from([*places(RECIPES[0])]), text=st.one_of(TEXTS, VALUES.map(json.dumps)))
def test_any_override(folder, key, text):
    (folder / 'base.yaml').write_text(dump_yaml(RECIPES[0]))
    loaded_again(folder / 'base.yaml', f'{".".join(map(str, key))}={text}')


@given(
    content=st.one_of(st.binary(max_size=200), st.text(max_size=200).map(lambda text: text.encode('utf-8', 'replace')))
)
def test_any_file_as_a_recipe(folder, content):
    (folder / 'any.yaml').write_bytes(content)
    refused_in_words(folder / 'any.yaml', lambda parent: read_document(parent / 'any.yaml'))


MANIFEST = {
    'format_version': 1, 'kind': 'moments', 'autoencoder': 'x/y', 'autoencoder_hash': 'sha256:0', 'channels': 4,
    'latent_height': 2, 'latent_width': 2, 'resolution': 16, 'crop': 'center', 'mirrored': True, 'num_samples': 3,
    'num_classes': 2, 'class_names': ('a', 'b'), 'mean': (0.0,) * 4, 'std': (1.0,) * 4, 'permutation_seed': 0,
    'tool_version': '0.1.0', 'source': 'a test',
}  # fmt: skip
MANIFEST = json.loads(Manifest(**MANIFEST).model_dump_json())
SHARD = {
    'column_encodings': ['int', 'bytes'], 'column_names': ['label', 'latents'], 'column_sizes': [8, None],
    'compression': None, 'format': 'mds', 'hashes': [], 'samples': 3, 'size_limit': 1000, 'version': 2,
    'raw_data': {'basename': 'shard.00000.mds', 'bytes': 100, 'hashes': {}}, 'zip_data': None,
}  # fmt: skip
INDEX = {'version': 2, 'shards': [SHARD, SHARD]}


@given(path=st.sampled_from(places(MANIFEST)), value=VALUES)
def test_any_manifest(folder, path, value):
    (folder / 'manifest.json').write_text(json.dumps(replaced(MANIFEST, path, value)))
    manifest = refused_in_words(folder / 'manifest.json', Manifest.load)
    assert manifest is None or len(manifest.mean) == manifest.channels


@given(path=st.sampled_from(places(INDEX)), value=VALUES)
def test_any_index(folder, path, value):
    (folder / 'index.json').write_text(json.dumps(replaced(INDEX, path, value)))
    shards = refused_in_words(folder / 'index.json', read_index) or ()
    assert all(folder in shard.path.parents and '..' not in shard.path.parts and shard.samples > 0 for shard in shards)


@given(content=st.binary(max_size=200))
def test_bytes_as_manifest_and_index(folder, content):
    for name, read in (('manifest.json', Manifest.load), ('index.json', read_index)):
        (folder / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read(folder)
