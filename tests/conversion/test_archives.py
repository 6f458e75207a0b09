"""Tars and zips that are unsafe, damaged or not what they should be."""

import io
import random
import stat
import tarfile
import zipfile
from typing import Any

import pytest

from tests.conversion import layouts
from tests.conversion.layouts import CLASSES, tar_bytes, write_tar, write_zip
from tread_composer.conversion.squares import UnreadableImage


def _member(name: str, **facts: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as archive:
        info = tarfile.TarInfo(name)
        for key, value in facts.items():
            setattr(info, key, value)
        archive.addfile(info)
    return stream.getvalue().rstrip(b'\0').ljust(512, b'\0')


PATH, LINK = 'is no plain relative path', 'is a link, a device or a sparse file'


@pytest.mark.parametrize(
    ('member', 'message'),
    [
        (_member('../a.jpg'), rf"'\.\./a\.jpg' {PATH}"),
        (_member('b/../../a.jpg'), PATH),
        (_member('/etc/a.jpg'), PATH),
        (_member('..\\a.jpg'), PATH),
        (_member('../a', type=tarfile.DIRTYPE), PATH),
        (_member('a.jpg', type=tarfile.SYMTYPE, linkname='/etc/passwd'), rf"'a\.jpg' {LINK}"),
        (_member('a.jpg', type=tarfile.LNKTYPE, linkname='b.jpg'), LINK),
        (_member('a.jpg', type=tarfile.BLKTYPE), LINK),
        (_member('a.jpg', type=tarfile.GNUTYPE_SPARSE), LINK),
    ],
    ids=lambda value: value if isinstance(value, str) else 'member',
)
def test_unsafe_members_of_tars_are_refused(member, message, tmp_path, opened):
    good = {'a_1.jpg': b'x' * 700, 'a_1.cls': b'0'}
    files = {
        'wds.tar': member + tar_bytes(good),
        'train.tar': tar_bytes({'n1.tar': tar_bytes({'n1_1.JPEG': b'x'}), 'n2.tar': member + tar_bytes({})}),
    }
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
        assert str(tmp_path / file) in opened.refuses(message, tmp_path / file)
    assert not (tmp_path.parent / 'a.jpg').exists()


def _zip_member(name: str, mode: int = 0) -> dict[str, Any]:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return {'zinfo_or_arcname': info, 'data': b'x'}


@pytest.mark.parametrize(
    ('member', 'message'),
    [
        (_zip_member('../a.jpg'), PATH),
        (_zip_member('n1/../../a.jpg'), PATH),
        (_zip_member('/a.jpg'), PATH),
        (_zip_member('n1\\a.jpg'), PATH),
        (_zip_member('../x/'), PATH),
        (_zip_member('n1/link.jpg', stat.S_IFLNK | 0o777), r"'n1/link\.jpg' is a link"),
        ({**_zip_member('n1/b.jpg'), 'compress_type': zipfile.ZIP_BZIP2}, 'compressed by another method'),
    ],
)
def test_unsafe_members_of_zips_are_refused(member, message, tmp_path, opened):
    with zipfile.ZipFile(tmp_path / 'in.zip', 'w') as archive:
        archive.writestr('n1/a.jpg', b'x')
        archive.writestr(**member)
    assert 'in.zip: member' in opened.refuses(message, tmp_path / 'in.zip')


def test_damaged_zips(tmp_path, splits, opened):
    path = write_zip(tmp_path / 'in.zip', splits['train'], compression=zipfile.ZIP_DEFLATED)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo('n02105855/n02105855_2933.JPEG')
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 255
    path.write_bytes(content)
    source = opened(path)['train']
    for position, name in enumerate(source.names):  # one damaged member is no harm to the others
        if name == info.filename:
            with pytest.raises(UnreadableImage, match='damaged in the archive'):
                source.read(position)
        else:
            assert source.read(position) == splits['train'][name]
    path.write_bytes(content[:-100])
    opened.refuses(r'not a zip that can be read.*copied completely', path)
    position = content.index(b'PK\1\2') + 8
    content[position] |= 1
    path.write_bytes(content)
    opened.refuses('encrypted', path)


def test_foreign_names_in_zips(tmp_path, opened):
    source = opened(write_zip(tmp_path / 'in.zip', {'größe/數.jpg': b'x'}))['train']
    assert list(source.names) == ['größe/數.jpg'] and source.read(0) == b'x'


def test_damaged_tars_are_refused_wherever_the_damage_is(tmp_path, opened):
    """``tarfile`` alone takes damage after the first member for the end of the archive."""
    whole = tar_bytes(
        {f'k{i}.{kind}': b'0' * (1 if kind == 'cls' else 700) for i in range(3) for kind in ('jpg', 'cls')}
    )
    path = tmp_path / 'in.tar'
    path.write_bytes(whole)
    assert len(opened(path)['train']) == 3
    header = 2 * 2560 - 1024  # of the fourth member, k1.cls
    assert whole[header:].startswith(b'k1.cls')
    cases = [
        ('ends within', whole[: header - 600]),
        ('not a tar, cut off', whole[: header - 100]),  # within the padding
        ('no end at byte 4,096: .* cut off', whole[:header]),
        ('no end at byte 4,096: .* cut off', whole[: header + 200]),
        ('no header and no end at byte 4,096', whole[:header] + b'rubbish' + whole[header + 7 :]),
        ('several tars were joined', whole + whole),
        ('not a tar', b'this is a text' * 100),
        ('not a tar, cut off', b''),
    ]
    for message, content in cases:
        path.write_bytes(content)
        opened.refuses(message, path)
    inner = {'n1.tar': tar_bytes({'a.JPEG': b'x'}), 'n2.tar': whole[: header - 600]}
    opened.refuses(r'train\.tar: n2\.tar: ends within', write_tar(tmp_path / 'train.tar', inner))


@pytest.mark.parametrize('layout', [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_tars(layout, tmp_path, opened):
    long, foreign = 'n' * 90 + '/' + 'k' * 190 + '.jpg', 'größe 数.jpg'
    files = {long: b'long', foreign: b'foreign', 'a.jpg': b'a'}
    path = write_tar(tmp_path / f'{layout}.tar', files, layout)
    source = opened(path)['train']
    assert list(source.names) == ['a.jpg', 'größe 数.jpg', 'k' * 190 + '.jpg']
    assert [source.read(position) for position in range(3)] == [b'a', b'foreign', b'long']


# ----- the official tars


def test_official_tars_without_ground_truth_are_refused_and_the_three_forms_named(tmp_path, splits, opened):
    root = layouts.write_ilsvrc(tmp_path, splits)
    for path in (root, root / 'ILSVRC2012_img_val.tar'):
        opened.refuses(r'(?s)devkit_t12\.tar\.gz.*LOC_val_solution\.csv.*two columns', path)
    (root / 'ILSVRC2012_img_val.tar').rename(root / 'val.tar')  # under any name
    opened.refuses('--ground-truth', root)
    truth = layouts.write_ground_truths(root / 'truth', splits['val'])['devkit']
    assert list(opened(root / 'val.tar', ground_truth=truth)['val'].names) == sorted(splits['val'])


def test_ground_truth_that_does_not_fit_is_refused(tmp_path, splits, opened):
    root = layouts.write_ilsvrc(tmp_path / 'in', splits)
    truths = layouts.write_ground_truths(tmp_path / 'truth', splits['val'])
    good = truths['synsets'].read_text().splitlines(keepends=True)
    path = tmp_path / 'truth.txt'
    more, numbers = (
        'ILSVRC2012_val_00000007.JPEG n01440764\n',
        [f'{line.split()[0]} {n}\n' for n, line in enumerate(good)],
    )
    for lines, message in (
        (good[:-1], r'truth\.txt: has no label for: ILSVRC2012_val_00000006 \(1 in all\)'),
        ([*good, more], r'labels images that are missing: ILSVRC2012_val_00000007 \(1 in all\)'),
        ([*good, good[0]], r'line 7: ILSVRC2012_val_\d+ occurs more than once'),
        ([line.replace(CLASSES[1], CLASSES[0]) for line in good], 'train has 1 classes that val lacks: n02105855'),
        ([line.replace(CLASSES[1], 'n09') for line in good], 'lacks: n02105855'),
        (['one\n'], r"line 1: 'one' is not two columns"),
        (numbers, 'numbers of 6 classes, such as 0, for 3 classes'),
    ):
        path.write_text(''.join(lines))
        opened.refuses(message, root, ground_truth=path)
    alone = 'numbers of 3 classes, such as 0, for 0 classes of training images'
    opened.refuses(alone, root / 'ILSVRC2012_img_val.tar', ground_truth=truths['numbers'])
    meta = truths['devkit folder'] / 'data/meta.mat'
    meta.write_bytes(b'rubbish')
    opened.refuses(r'meta\.mat or .* is damaged', root, ground_truth=truths['devkit folder'])
    meta.unlink()
    opened.refuses('are not both in it', root, ground_truth=truths['devkit folder'])
    truths['devkit'].write_bytes(truths['devkit'].read_bytes()[:-50])
    opened.refuses('cannot be read', root, ground_truth=truths['devkit'])
    meta.write_bytes(random.Random(0).randbytes(2**17))
    with tarfile.open(truths['devkit'], 'w:gz') as archive:
        archive.add(meta, 'meta.mat')
    whole = truths['devkit'].read_bytes()
    truths['devkit'].write_bytes(whole[:40000] + b'\xff' * 40000 + whole[80000:])
    opened.refuses('cannot be read', root, ground_truth=truths['devkit'])


def test_train_tars_that_are_not_one_tar_a_class_are_refused(tmp_path, opened):
    inner = tar_bytes({'a.JPEG': b'x'})
    for files, message in (
        ({'n1.tar': inner, 'b.JPEG': b'x'}, r'holds b\.JPEG, where each member should be the one tar of a class'),
        ({'n1.tar': inner, 'x/n1.tar': inner}, r'holds n1\.tar, where'),
        ({'n1.tar': inner, 'n2.tar': tar_bytes({})}, '1 class folders hold no image: train/n2'),
        ({'n1.tar': tar_bytes({'n2/a.JPEG': b'x'})}, r"unknown depths, such as 'train/n1/n2/a\.JPEG'"),
        ({'n1.tar': tar_bytes({'a.JPEG': b'x', 'n1/a.JPEG': b'x'})}, 'different or unknown depths'),
    ):
        opened.refuses(message, write_tar(tmp_path / 'train.tar', files))
    for name in CLASSES:
        write_tar(tmp_path / f'unpacked/{name}.tar', {'a.JPEG': b'x'})
    opened.refuses('or those of one class, whose labels would be lost', tmp_path / 'unpacked')
