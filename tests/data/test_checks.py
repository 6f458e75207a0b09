import json
from pathlib import Path

import pytest

from tread_composer.data.checks import check_agreement, check_shards
from tread_composer.data.manifest import Manifest


def test_a_whole_split_passes(split: Path, manifest: Manifest):
    check_shards(split, manifest, hashes=True)


def test_a_missing_shard_is_named(split: Path, manifest: Manifest):
    (split / 'shard.00003.mds').unlink()
    with pytest.raises(ValueError, match=r'shard.00003.mds: this shard is missing'):
        check_shards(split, manifest)
    check_shards(split, manifest, remote=True)


def test_a_truncated_shard_is_named(split: Path, manifest: Manifest):
    shard = split / 'shard.00002.mds'
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r'shard.00002.mds: \d+ bytes, the index says'):
        check_shards(split, manifest)


def test_flipped_bytes_are_found_by_the_hash(split: Path, manifest: Manifest):
    shard = split / 'shard.00001.mds'
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    check_shards(split, manifest)
    with pytest.raises(ValueError, match=r'shard.00001.mds: its xxh64'):
        check_shards(split, manifest, hashes=True)


@pytest.mark.parametrize('remote', [False, True])
def test_the_index_must_agree_with_the_manifest(split: Path, manifest: Manifest, remote: bool):
    with pytest.raises(ValueError, match='200 samples, but the manifest has num_samples=201'):
        check_shards(split, manifest.model_copy(update={'num_samples': 201}), remote=remote)
    with pytest.raises(ValueError, match=r'1,4,6.*the manifest describes.*2,4,6'):
        check_shards(split, manifest.model_copy(update={'kind': 'moments'}), remote=remote)


@pytest.mark.parametrize('content', ['', '{}', '[]', json.dumps({'shards': [{'samples': 1}]})])
def test_a_broken_index_is_named(split: Path, manifest: Manifest, content: str):
    (split / 'index.json').write_text(content)
    with pytest.raises(ValueError, match=r'index.json: empty or broken'):
        check_shards(split, manifest)


def test_an_absent_index_is_named(tmp_path: Path, manifest: Manifest):
    with pytest.raises(ValueError, match=r'index.json: no such file'):
        check_shards(tmp_path, manifest)


def test_agreement_passes_where_the_run_says_nothing_or_the_same(manifest: Manifest):
    check_agreement(manifest)
    check_agreement(
        manifest,
        channels=1,
        kind='pixels',
        latent_size=(4, 6),
        autoencoder='pixels',
        autoencoder_hash=None,
        num_classes=3,
    )


@pytest.mark.parametrize(
    ('expected', 'found'),
    [
        ({'channels': 4}, '1'),
        ({'kind': 'moments'}, "'pixels'"),
        ({'latent_size': (6, 4)}, r'\(4, 6\)'),
        ({'autoencoder': 'a/b'}, "'pixels'"),
        ({'autoencoder_hash': 'sha256:0'}, 'None'),
        ({'num_classes': 0}, '3'),
    ],
)
def test_contradictions_are_named_with_both_values(manifest: Manifest, expected: dict, found: str):
    ((key, value),) = expected.items()
    wanted = repr(value).replace('(', r'\(').replace(')', r'\)')
    with pytest.raises(ValueError, match=f'{key}: the run expects {wanted}, the data have {found}; .+'):
        check_agreement(manifest, **expected)


def test_all_contradictions_are_listed(manifest: Manifest):
    with pytest.raises(ValueError, match=r'(?s)channels.*num_classes'):
        check_agreement(manifest, channels=4, num_classes=1000)
