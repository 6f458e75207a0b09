import json
import os
from pathlib import Path

import pytest

from tread_composer.data.columns import columns, stored_shape
from tread_composer.data.manifest import Manifest


def test_columns_have_fixed_shapes_and_moments_twice_the_channels():
    assert columns('samples', (4, 32, 16)) == {'latents': 'ndarray:float16:4,32,16', 'label': 'int64', 'name': 'str'}
    assert columns('moments', (4, 32, 16))['latents'] == 'ndarray:float16:8,32,16'
    assert columns('moments', (4, 32, 16), mirrored=True)['latents_mirrored'] == 'ndarray:float16:8,32,16'


def test_columns_refuse_what_has_no_meaning():
    for kind, shape, said in (('mean', (4, 8, 8), 'moments'), ('pixels', (8, 8), 'three')):
        with pytest.raises(ValueError, match=said):
            stored_shape(kind, shape)


def test_manifest_survives_a_round_trip(manifest: Manifest, tmp_path: Path):
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert manifest.latent_shape == stored_shape(manifest.kind, manifest.latent_shape) == (1, 4, 6)
    assert os.listdir(tmp_path) == ['manifest.json']
    changes = {'kind': 'moments', 'autoencoder': 'a/b', 'autoencoder_hash': 'sha256:0'}
    moments = Manifest.model_validate(manifest.model_dump() | changes)
    assert moments.latent_shape == (1, 4, 6) and stored_shape(moments.kind, moments.latent_shape) == (2, 4, 6)
    with open(tmp_path / 'manifest.json') as still_open:
        manifest.model_copy(update={'source': 'another'}).save(tmp_path)
        # A file written in place would show the new text through the handle that was open before.
        assert json.load(still_open)['source'] == 'a test'
    assert Manifest.load(tmp_path).source == 'another'


def test_older_data_say_nothing_of_scaling_and_background(manifest: Manifest, tmp_path: Path):
    content = json.loads(manifest.model_dump_json())
    (tmp_path / 'manifest.json').write_text(
        json.dumps({key: value for key, value in content.items() if key not in ('scaling', 'background')})
    )
    older = Manifest.load(tmp_path)
    assert older == manifest and older.auto_scaling.source == 'measured'
    assert older.auto_scaling.scale == pytest.approx([1 / std for std in manifest.std], rel=1e-5)
    assert older.auto_scaling.shift == pytest.approx(manifest.mean, rel=1e-5)


@pytest.mark.parametrize('key', sorted(Manifest.model_fields.keys() - {'scaling', 'background'}))
def test_every_key_is_required_by_name(manifest: Manifest, tmp_path: Path, key: str):
    content = json.loads(manifest.model_dump_json())
    del content[key]
    (tmp_path / 'manifest.json').write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf'manifest.json: {key}: missing'):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ('changes', 'said'),
    [
        ({'chanels': 1}, 'chanels: unknown key. Known: channels'),
        ({'format_version': 2}, 'format_version: 2 is not allowed'),
        ({'kind': 'mean'}, "kind: 'mean' is not allowed"),
        ({'channels': '1'}, "channels: '1' is not allowed"),
        ({'channels': True}, 'channels: True is not allowed'),
        ({'num_samples': 1.0}, 'num_samples: 1.0 is not allowed'),
        ({'num_samples': 0}, 'num_samples: 0 is not allowed'),
        ({'num_classes': -1}, 'num_classes: -1 is not allowed'),
        ({'mirrored': 0}, 'mirrored: 0 is not allowed'),
        ({'std': [0.0]}, 'std.0: 0.0 is not allowed'),
        ({'mean': [float('nan')]}, 'mean.0: nan is not allowed'),
        ({'mean': [0.0, 0.0]}, 'mean has 2 entries for 1 channels'),
        ({'std': []}, 'std has 0 entries'),
        ({'scaling': {'source': 'x', 'scale': [1.0, 2.0], 'shift': [0.0]}}, 'scaling.scale: one number, or one for'),
        ({'scaling': {'source': 'x', 'scale': [-1.0], 'shift': [0.0]}}, 'scaling.scale.0: -1.0 is not allowed'),
        ({'class_names': ['a']}, 'class_names has 1 entries for num_classes=3'),
        ({'autoencoder': 'a/b'}, "autoencoder='a/b' with kind='pixels'"),
        ({'kind': 'moments'}, "autoencoder=None with kind='moments'"),
        ({'kind': 'samples', 'autoencoder': 'a/b'}, "autoencoder_hash=None with kind='samples'"),
    ],
)
def test_manifest_is_strict(manifest: Manifest, tmp_path: Path, changes: dict, said: str):
    content = json.loads(manifest.model_dump_json()) | changes
    (tmp_path / 'manifest.json').write_text(json.dumps(content))
    with pytest.raises(ValueError) as caught:
        Manifest.load(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path / 'manifest.json') in str(caught.value)


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'\xff\xfe', None])
def test_a_manifest_that_is_broken_or_absent_is_named(tmp_path: Path, content: bytes | None):
    if content is not None:
        (tmp_path / 'manifest.json').write_bytes(content)
    with pytest.raises(ValueError, match=r'manifest.json: ' + 'no such file' * (content is None)):
        Manifest.load(tmp_path)
