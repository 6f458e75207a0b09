"""``python -m tread_composer sample`` from its words to its files, in this process and in two.

Further words that it refuses: ``tests/frozen``.
"""

import dataclasses
import fcntl
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from streaming import LocalDataset

from tests.runs import environment, launch
from tests.warm import start_program, wait_until
from tread_composer.autoencoders import to_uint8
from tread_composer.config import restore_config
from tread_composer.weights.exported import write_exported
from tread_composer.weights.trained import load_trained, read_trained

SPARSE = ('--guidance', 'sparse', '--guidance-scale', '2')


@pytest.fixture(scope='module')
def trained(routed):
    return routed.folder


@pytest.fixture
def sample(cli):
    def call(path, out, *words, code=0):
        return cli('sample', path, '--out', out, '--device', 'cpu', '--steps', '3', *words, code=code)

    return call


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted((folder / 'images').iterdir())}


def nearly_equal(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    """A batch of another size may round the other way: by one byte, in few places."""
    assert some.keys() == others.keys() and some
    differences = [np.abs(some[name].astype(int) - others[name].astype(int)) for name in some]
    assert max(difference.max() for difference in differences) <= 1
    assert np.mean(differences) < 1e-3


def record(folder: Path) -> dict:
    return json.loads((folder / 'samples.json').read_text())


def dates(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob('*') if path.is_file()}


def test_the_files_hold_the_images_of_the_model(trained, tmp_path, sample):
    words = ['--count', '35', '--seed', '4', '--format', 'png', 'npz', 'mds', '--sampler', 'sde']
    printed = sample(trained, tmp_path / 'out', *words).out
    # Labels that are not balanced are not called so.
    assert 'no multiple of the 10 classes' in printed and record(tmp_path / 'out')['made_with']['labels'] == 'in turn'
    # Three updates with decay 0.5.
    assert 'ema weights after 3 batches; 12% of the average is still the weights that it began with' in printed
    assert '3 evaluations, 0 of them guided' in printed and 'images/s' in printed
    names = ['grid.png', 'images', 'mds', 'samples.json', 'samples.npz']
    assert sorted(path.name for path in (tmp_path / 'out').iterdir()) == names
    model = load_trained(trained).model
    labels, seeds = [index % 10 for index in range(35)], list(range(4, 39))
    expected = to_uint8(model.decode(model.sample(labels, seeds, sampler='sde', num_steps=3)))[:, 0].numpy()
    found = pictures(tmp_path / 'out')
    assert list(found)[12] == '000012_seed16_label2.png'
    nearly_equal(found, dict(zip(found, expected, strict=True)))
    same = list(found.values())
    with np.load(tmp_path / 'out' / 'samples.npz', allow_pickle=False) as archive:
        assert archive['arr_0'].dtype == np.uint8 and archive['arr_0'].shape == (35, 8, 8, 3)
        assert all(np.array_equal(archive['arr_0'][index, :, :, 2], image) for index, image in enumerate(same))
        assert archive['arr_1'].tolist() == labels
    rows = list(LocalDataset(str(tmp_path / 'out' / 'mds')))
    assert [(row['label'], row['seed']) for row in rows] == list(zip(labels, seeds, strict=True))
    assert all(np.array_equal(np.asarray(row['image']), image) for row, image in zip(rows, same, strict=True))
    assert Image.open(tmp_path / 'out' / 'grid.png').size[1] > 10 * 64


def test_what_stands_beside_the_images_says_how_they_were_made(trained, tmp_path, sample):
    sample(trained, tmp_path / 'out', '--count', '10', '--guidance-scale', '2')
    found = record(tmp_path / 'out')
    made_with = found['made_with']
    assert found['complete'] and found['batch'] == 3 and found['class_names'] == list('0123456789')
    assert made_with['weights_digest'] == load_trained(trained).digest and made_with['weights'] == 'ema'
    assert made_with['sampling']['guidance'] == 'classifier_free'
    assert (made_with['num_samples'], made_with['labels'], made_with['seed']) == (10, 'balanced', 0)
    assert (made_with['autoencoder'], made_with['decode_dtype']) == ('pixels', 'float32')
    grid = {'objective': 'flow_matching', 'sampling_shift': 1.0, 'corrected_at_zero': True}
    assert made_with['time_grid'] == grid
    assert (made_with['weak'], found['run']) == ('none', 'digits_tread')
    assert (found['evaluations'], found['guided_evaluations']) == (6, 6)
    sample(trained, tmp_path / 'plain', '--count', '10')
    assert found['gmacs_per_image'] == pytest.approx(2 * record(tmp_path / 'plain')['gmacs_per_image'])


@pytest.mark.parametrize(
    'words',
    [
        ['--guidance', 'classifier_free', '--guidance-scale', '3', '--guidance-interval', '0.1:0.9'],
        [*SPARSE, '--strong-rate', '0.3', '--weak-rate', '0.7'],
    ],
)
def test_images_do_not_depend_on_the_batch_size_and_do_on_the_label(trained, tmp_path, sample, words):
    for batch_size in ('1', '7', '40'):
        sample(trained, tmp_path / batch_size, '--count', '20', '--batch-size', batch_size, *words)
    alone, seven, forty = (pictures(tmp_path / batch_size) for batch_size in ('1', '7', '40'))
    nearly_equal(alone, seven)
    nearly_equal(alone, forty)
    sample(trained, tmp_path / 'other', '--count', '20', '--classes', *'1234567890', *words)
    pairs = zip(alone.values(), pictures(tmp_path / 'other').values(), strict=True)
    assert all((image != other).any() for image, other in pairs)
    assert record(tmp_path / 'other')['made_with']['labels'] == 'classes'


def test_weights_of_which_nobody_knows_how_long_they_were_trained(trained, tmp_path, sample):
    """As an import leaves them, in the folder of somebody else's run."""
    found = read_trained(trained)
    renamed = restore_config({**found.config.to_dict(), 'run_name': 'imported'}, source='test')
    file = tmp_path / 'model.safetensors'
    write_exported(file, dataclasses.replace(found, batch=0, config=renamed), {}, overwrite=False)
    shutil.copy(trained / 'config.yaml', tmp_path / 'config.yaml')
    assert 'a number of batches that nobody has said' in sample(file, tmp_path / 'out', '--count', '2').out
    assert (record(tmp_path / 'out')['batch'], record(tmp_path / 'out')['run']) == (None, 'imported')


def test_guidance_by_an_early_checkpoint(trained, tmp_path, sample):
    early = next(trained.glob('*ba2*.pt'))
    words = ['--count', '4', '--guidance', 'auto', '--guidance-scale', '2']
    sample(trained, tmp_path / 'auto', *words, '--weak', early)
    sample(trained, tmp_path / 'itself', *words, '--weak', trained)
    sample(trained, tmp_path / 'plain', '--count', '4')
    nearly_equal(pictures(tmp_path / 'itself'), pictures(tmp_path / 'plain'))  # no difference to guide by
    auto, plain = pictures(tmp_path / 'auto'), pictures(tmp_path / 'plain')
    assert any((auto[name] != plain[name]).any() for name in plain)
    assert record(tmp_path / 'auto')['made_with']['weak'] == f'ema {load_trained(early).digest}'


def test_the_same_command_again_does_nothing_and_another_is_refused(trained, tmp_path, sample):
    out = tmp_path / 'out'
    sample(trained, out, '--count', '5')
    before = dates(out)
    assert 'finished already' in sample(trained, out, '--count', '5').out
    message = sample(trained, out, '--count', '5', '--seed', '1', '--guidance-scale', '2', code=2).err
    assert 'seed: saved 0, now 1' in message and "sampling.guidance: saved 'none', now 'classifier_free'" in message
    assert 'weights_digest' in sample(trained, out, '--count', '5', '--weights', 'raw', code=2).err
    assert dates(out) == before
    next((out / 'images').iterdir()).unlink()
    assert 'no longer complete' in sample(trained, out, '--count', '5', code=2).err


def test_killed_at_any_moment_it_goes_on_where_it_stopped(trained, tmp_path, sample):
    words = ['--count', '90', '--batch-size', '16', '--format', 'png', 'npz', '--steps', '20']
    sample(trained, tmp_path / 'whole', *words)
    out = tmp_path / 'out'
    command = ['-m', 'tread_composer', 'sample', trained, '--out', out, '--device', 'cpu', *words]
    for wanted in (1, 3):
        child = start_program(command, tmp_path, environment(), [tmp_path / 'log'])
        wait_until(lambda count=wanted: len(list(out.glob('.samples/part-*.npy'))) >= count, child)
        child.kill()
        child.join()
        assert child.exitcode == -signal.SIGKILL
    (out / 'images' / '.half.png.x').write_bytes(b'half')
    (out / '.samples' / '.part-000005.npy.x').write_bytes(b'half')
    done = sorted(out.glob('.samples/part-*.npy'))
    assert 3 <= len(done) < 6 and not record(out)['complete']
    # The first finished part is known by other bytes: it must be used as it is.
    np.save(done[0], np.full_like(np.load(done[0]), 7))
    assert f'going on: {16 * len(done)} of 90 images are there' in sample(trained, out, *words).out
    assert sorted(path.name for path in out.iterdir()) == ['grid.png', 'images', 'samples.json', 'samples.npz']
    with np.load(out / 'samples.npz') as found, np.load(tmp_path / 'whole' / 'samples.npz') as expected:
        assert (found['arr_0'][:16] == 7).all()
        assert np.array_equal(found['arr_0'][16:], expected['arr_0'][16:])
    nearly_equal(pictures(out), pictures(tmp_path / 'whole'))


def test_two_ranks_draw_the_same_images_as_one(trained, tmp_path, sample):
    words = ['--count', '90', '--batch-size', '16', *SPARSE]
    command = [sys.executable, '-m', 'tread_composer', 'sample', trained, '--out', tmp_path / 'two', '--device', 'cpu']
    done = launch(tmp_path, [str(word) for word in (*command, '--steps', '3', *words)], ranks=2)
    assert done.returncode == 0, done.stderr
    sample(trained, tmp_path / 'one', *words)
    nearly_equal(pictures(tmp_path / 'two'), pictures(tmp_path / 'one'))
    assert not list((tmp_path / 'two').glob('.*'))


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--sampler-settings', 'eta=1'], "'heun' has no settings ['eta']"),
        (['--sampler-settings', 'eta'], 'not of the form key=value'),
        (['--guidance', 'none', '--guidance-scale', '2'], "guidance is 'none'"),
        (['--guidance-scale', '2', '--guided-channels', 'first3'], 'these have 1'),
        (['--decode-dtype', 'bfloat16'], 'nothing to decode'),
    ],
)
def test_wrong_words_are_refused_and_leave_nothing_behind(trained, tmp_path, sample, words, message):
    assert message in sample(trained, tmp_path / 'out', *words, code=2).err
    assert not (tmp_path / 'out').exists()


def test_a_model_without_routes_cannot_be_guided_by_them(trained, tmp_path, sample):
    shutil.copytree(trained, tmp_path / 'dense', symlinks=True)
    config = (tmp_path / 'dense' / 'config.yaml').read_text().splitlines()
    start = config.index('  tread:')
    end = next(index for index in range(start + 1, len(config)) if not config[index].startswith('    '))
    (tmp_path / 'dense' / 'config.yaml').write_text('\n'.join([*config[:start], *config[end:]]) + '\n')
    refused = sample(tmp_path / 'dense', tmp_path / 'out', *SPARSE, '--count', '2', code=2).err
    assert 'was trained without routes' in refused


def test_a_folder_of_somebody_else_or_in_use_is_left_alone(trained, tmp_path, sample):
    out = tmp_path / 'out'
    out.mkdir()
    (out / 'thesis.tex').write_text('mine')
    assert 'holds thesis.tex' in sample(trained, out, code=2).err
    assert [path.name for path in out.iterdir()] == ['thesis.tex']
    (out / 'thesis.tex').unlink()
    with open(out / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        lock.write('host a, process 7')
        lock.flush()
        assert 'written by another process (host a, process 7)' in sample(trained, out, code=2).err
    sample(trained, out, '--count', '2')


def test_a_diverged_model_is_named_and_no_image_of_it_is_kept(trained, tmp_path, sample):
    words = ['--guidance-scale', '1e38', '--sampler', 'euler', '--count', '3']
    assert 'the model or the sampler has diverged' in sample(trained, tmp_path / 'out', *words, code=2).err
    assert not list((tmp_path / 'out').rglob('*.png'))


def test_the_times_of_sampling_can_be_shifted_and_the_record_says_so(trained, tmp_path, sample):
    """LightningDiT and FasterDiT shift them without training for it; which times: ``test_import_checkpoints.py``."""
    for name, words in (('shifted', ['objective.sampling_shift=3.0']), ('plain', [])):
        sample(trained, tmp_path / name, '--sampler', 'euler', '--count', '4', *words)
    assert record(tmp_path / 'shifted')['made_with']['time_grid']['sampling_shift'] == 3.0
    shifted, plain = pictures(tmp_path / 'shifted'), pictures(tmp_path / 'plain')
    assert any(not np.array_equal(image, shifted[name]) for name, image in plain.items())
