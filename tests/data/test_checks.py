import json
import os
from pathlib import Path

import pytest

from tests.data.worlds import flip_last_byte
from tread_composer.data.checks import check_agreement, check_shards
from tread_composer.data.manifest import Manifest


@pytest.mark.parametrize(
    ('damage', 'message', 'passes'),
    [
        (Path.unlink, 'this shard is missing', {'remote': True}),
        (lambda shard: os.truncate(shard, shard.stat().st_size - 1), r'\d+ bytes, the index says', {'remote': True}),
        (flip_last_byte, 'its xxh64 is not the one of the index', {}),
    ],
)
def test_a_shard_that_is_missing_cut_off_or_changed_is_named(split, manifest, damage, message, passes):
    check_shards(split, manifest, hashes=True)
    damage(split / 'shard.00003.mds')
    with pytest.raises(ValueError, match=rf'shard\.00003\.mds: {message}'):
        check_shards(split, manifest, hashes=True)
    check_shards(split, manifest, **passes)


@pytest.mark.parametrize('remote', [False, True])
def test_the_index_must_agree_with_the_manifest(split: Path, manifest: Manifest, remote: bool):
    with pytest.raises(ValueError, match='200 samples, but the manifest has num_samples=201'):
        check_shards(split, manifest.model_copy(update={'num_samples': 201}), remote=remote)
    with pytest.raises(ValueError, match=r'1,4,6.*the manifest describes.*2,4,6'):
        check_shards(split, manifest.model_copy(update={'kind': 'moments'}), remote=remote)


@pytest.mark.parametrize('content', ['', '{}', '[]', json.dumps({'shards': [{'samples': 1}]}), None])
def test_an_index_that_is_broken_or_absent_is_named(split: Path, manifest: Manifest, content: str | None):
    (split / 'index.json').unlink()
    if content is not None:
        (split / 'index.json').write_text(content)
    with pytest.raises(
        ValueError,
        match=r'index\.json: ' + ('no such file' if content is None else 'empty or broken|shard 0: format: '),
    ):
        check_shards(split, manifest)


@pytest.mark.parametrize(
    ('place', 'value', 'message'),
    [
        *(('basename', path, 'basename: .* leads out of the folder') for path in (
            '../shard.00003.mds', '/shard.00003.mds', '..', 'part/../../shard.00003.mds', 'a\\b',
        )),
        *(('bytes', value, 'bytes: ') for value in (-1, 3.5)),
        *(('samples', value, 'samples: ') for value in (0, -1, 1.5)),
    ],
)  # fmt: skip
def test_an_index_counts_samples_and_names_files_of_its_own_folder_only(split, manifest, place, value, message: str):
    index = json.loads((split / 'index.json').read_text())
    shard = index['shards'][3]
    (shard if place == 'samples' else shard['raw_data'])[place] = value
    (split / 'index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf'index\.json: shard 3: .*{message}'):
        check_shards(split, manifest, remote=True)


def test_agreement_passes_where_the_run_says_nothing_or_the_same(manifest: Manifest):
    check_agreement(manifest)
    facts = {'channels': 1, 'kind': 'pixels', 'latent_size': (4, 6), 'autoencoder': 'pixels', 'num_classes': 3}
    check_agreement(manifest, **facts, autoencoder_hash=None)
    with pytest.raises(ValueError, match=r'(?s)channels.*num_classes'):  # all contradictions are listed
        check_agreement(manifest, channels=4, num_classes=1000)


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
