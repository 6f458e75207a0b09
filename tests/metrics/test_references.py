import io

import numpy as np
import pytest
import torch
from PIL import Image
from streaming import MDSWriter

from tests.metrics.small import PROTOCOL, Means, as_batch, random_images, write_folder
from tread_composer.core.errors import UserError
from tread_composer.metrics.digits import DigitsFeatures, DigitsImages, real_digits
from tread_composer.metrics.features import open_extractor
from tread_composer.metrics.images import open_images
from tread_composer.metrics.measurement import Measurement
from tread_composer.metrics.measurer import Measurer
from tread_composer.metrics.protocol import differences
from tread_composer.metrics.published import statistics
from tread_composer.metrics.references import open_reference


def all_images(path):
    return torch.cat(list(open_images(path).batches(7)))


def write_mds(folder, images):
    with MDSWriter(out=str(folder), columns={'image': 'png', 'label': 'int'}) as writer:
        for image in images:
            writer.write({'image': Image.fromarray(image), 'label': 0})
    return folder


def test_lossy_images_are_named_and_a_name_moves_no_number(tmp_path):
    images = random_images(2)
    write_folder(tmp_path / 'png', images)
    Image.fromarray(images[0]).save(write_folder(tmp_path / 'jpeg', images[:1]) / 'a.JPG')
    with MDSWriter(out=str(tmp_path / 'mds'), columns={'image': 'jpeg'}) as writer:
        writer.write({'image': Image.fromarray(images[0])})
    said = []
    for name in ('png', 'jpeg', 'mds'):
        measurer = Measurer(Measurement(str(tmp_path / name), features='digits'), torch.device('cpu'))
        said.append(measurer.facts()['reference'])
    assert said == [
        {'name': 'png', 'kind': 'folder'},
        {'name': 'jpeg', 'kind': 'folder', 'lossy': 'JPEG'},
        {'name': 'mds', 'kind': 'mds', 'lossy': 'JPEG'},
    ]
    named = {**PROTOCOL, 'reference': said[1]}
    assert differences(named, {**PROTOCOL, 'reference': {'name': 'jpeg', 'kind': 'folder'}}) == []


def test_every_form_gives_the_same_bytes(tmp_path):
    images = random_images(20)
    forms = [write_folder(tmp_path / 'folder', images), write_mds(tmp_path / 'mds', images)]
    for name, save in (('plain.npz', np.savez), ('packed.npz', np.savez_compressed), ('plain.npy', np.save)):
        save(tmp_path / name, images)
        forms.append(tmp_path / name)
    for form in forms:
        found = open_images(form)
        assert (found.count, found.resolution) == (20, 8)
        assert torch.equal(all_images(form), as_batch(images)), form
        shares = [torch.cat(list(found.batches(4, rank, 3))) for rank in range(3)]
        assert torch.equal(torch.cat(shares), as_batch(images)), form


def test_the_pixels_of_a_data_set_of_ours(digits):
    images = all_images(digits / 'eval')
    expected, _ = real_digits()['eval']
    assert images.shape == (297, 3, 8, 8)
    assert torch.equal(images[:, 2], ((expected[:, 0] + 1) * 127.5).round().to(torch.uint8))
    assert torch.equal(images, torch.cat([*DigitsImages('eval').batches(50)]))
    assert open_images(digits / 'eval').labels() == DigitsImages('eval').labels()


def test_the_digits_are_a_reference_by_name_and_a_folder_that_is_called_so_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert open_reference('digits').hash == DigitsImages('train').hash
    assert len(open_reference('digits').features(DigitsFeatures(), tmp_path / 'cache')) == 1500
    assert not (tmp_path / 'cache').exists()  # no file that could be looked at again
    write_folder(tmp_path / 'digits', random_images(4))
    assert open_reference('digits').hash == DigitsImages('train').hash
    assert open_reference('./digits').count == open_reference(tmp_path / 'digits').count == 4


def test_labels_of_images(tmp_path):
    for name, labels in (('000000_seed3_label7.png', [7]), ('1.png', None)):
        Image.fromarray(random_images(1)[0]).save(tmp_path / name)
        assert open_images(tmp_path).labels() == labels
    for arrays, labels in (({}, None), ({'arr_1': np.array([4, 2])}, [4, 2])):
        path = adm(tmp_path / 'samples.npz', arr_0=random_images(2), **arrays)
        assert open_images(path).labels() == labels
    assert open_images(write_mds(tmp_path / 'mds', random_images(3))).labels() == [0, 0, 0]


def test_a_hash_follows_the_content_and_not_the_place(tmp_path):
    images = random_images(5)
    one, other = (write_folder(tmp_path / name, images) for name in ('a', 'b'))
    (other / 'notes.txt').write_text('not an image')
    (other / '.hidden.png').write_text('not to be seen')
    assert open_images(one).hash == open_images(other).hash
    Image.fromarray(images[0]).save(other / '000003.png')
    assert open_images(one).hash != open_images(other).hash


def test_a_damaged_file_of_the_cache_is_named(tmp_path):
    folder, cache = write_folder(tmp_path / 'a', random_images(4)), tmp_path / 'cache'
    open_reference(folder).features(Means(), cache)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(UserError, match='damaged'):
        open_reference(folder).features(Means(), cache)


def adm(path, **arrays):
    np.savez(path, **arrays)
    return path


def test_an_adm_file_gives_its_statistics_and_its_images(tmp_path):
    images = random_images(6)
    path = adm(tmp_path / 'ref.npz', arr_0=images, mu=np.arange(6.0), sigma=np.eye(6), mu_s=np.ones(9))
    reference = open_reference(path)
    assert (reference.kind, reference.count) == ('adm', 6)
    found = reference.features(Means(), tmp_path / 'cache')
    assert (reference.published['mu'] == np.arange(6.0)).all()
    own = statistics(found.features_ND)['mu']
    assert not np.allclose(own, np.arange(6.0))
    alone = open_reference(adm(tmp_path / 'alone.npz', mu=np.zeros(4), sigma=np.eye(4)))
    assert alone.count == 0
    assert alone.hash != reference.hash
    with pytest.raises(UserError, match='statistics alone'):
        alone.features(Means(), tmp_path / 'cache')


def test_spatial_statistics_are_those_of_the_file_and_spatial_features_are_kept(tmp_path):
    class Places(Means):
        spatial = True

        def __call__(self, images):
            features, logits = super().__call__(images)
            return features, logits, features[:, :2] * 3

    images = random_images(6)
    path = adm(
        tmp_path / 'ref.npz', arr_0=images, mu=np.zeros(6), sigma=np.eye(6), mu_s=np.ones(9), sigma_s=np.eye(9) * 2
    )
    published = open_reference(path).published_spatial
    assert (published['mu'] == 1).all() and (published['sigma'] == np.eye(9) * 2).all()
    folder = write_folder(tmp_path / 'a', images)
    for _ in range(2):  # computed, then of the cache
        found = open_reference(folder).features(Places(), tmp_path / 'cache')
        assert torch.equal(found.spatial_NS, found.features_ND[:, :2] * 3)
    assert open_reference(folder).features(Means(), tmp_path / 'cache').spatial_NS is None
    assert len(list((tmp_path / 'cache').iterdir())) == 2
    without = open_reference(adm(tmp_path / 's.npz', mu=np.zeros(6), sigma=np.eye(6)))
    with pytest.raises(UserError, match='not mu_s and sigma_s, which sfid compares with'):
        without.check(open_extractor('digits'), 8, spatial=True)


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(UserError, match='take images of 8 pixels, not 16'):
        open_reference(write_folder(tmp_path / 'b', random_images(4, 16))).check(DigitsFeatures(), 16)
    statistics_alone = open_reference(adm(tmp_path / 's.npz', mu=np.zeros(4), sigma=np.eye(4)))
    with pytest.raises(UserError, match="of Inception, and the features are 'digits'"):
        statistics_alone.check(DigitsFeatures(), 8)


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'mu': np.zeros(4), 'sigma': np.eye(3)}, r'\[D\] and \[D, D\]'),
        ({'mu': np.full(2, np.nan), 'sigma': np.eye(2)}, 'not finite'),
        ({'mu': np.array([print], object), 'sigma': np.eye(1)}, 'cannot be read'),
        ({'images': np.zeros((2, 8, 8, 3), np.uint8)}, "no array 'arr_0'"),
        ({'arr_0': np.zeros((2, 8, 8, 3))}, 'images are uint8'),
        ({'arr_0': np.zeros((2, 8, 9, 3), np.uint8)}, 'must be square'),
        ({'arr_0': np.zeros((0, 8, 8, 3), np.uint8)}, 'holds no images'),
    ],
)
def test_a_wrong_npz_is_refused(tmp_path, arrays, message):
    with pytest.raises(UserError, match=message):
        open_reference(adm(tmp_path / 'wrong.npz', **arrays))


def test_a_wrong_npy_is_refused(tmp_path):
    for array in (np.zeros((2, 8, 8, 3)), np.array([print], object)):
        np.save(tmp_path / 'a.npy', array)
        with pytest.raises(UserError, match='images are uint8'):
            open_images(tmp_path / 'a.npy')
    np.save(tmp_path / 'grey.npy', random_images(3)[..., :1])
    assert torch.equal(all_images(tmp_path / 'grey.npy'), as_batch(random_images(3)[..., :1].repeat(3, 3)))


def test_wrong_images_are_refused_by_name(tmp_path):
    folder = write_folder(tmp_path / 'a', random_images(3))
    Image.fromarray(random_images(1, 9)[0]).save(folder / 'large.png')
    with pytest.raises(UserError, match=r'large.png: 9 x 9 pixels, where 000000.png has 8 x 8'):
        all_images(folder)
    (folder / 'large.png').write_bytes((folder / '000000.png').read_bytes()[:60])
    with pytest.raises(UserError, match=r'large.png: is no image'):
        all_images(folder)
    content = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(content, 'PNG')
    (folder / 'large.png').write_bytes(content.getvalue())
    with pytest.raises(UserError, match='more than 8 bits'):
        all_images(folder)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='holds no images'):
        open_images(tmp_path / 'empty')
    with pytest.raises(UserError, match='no such file'):
        open_images(tmp_path / 'nowhere')
