"""Files made by somebody who wants his code to run: none runs, whatever command reads them, and each is refused."""

import builtins
import io
import json
import os
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.runs import export
from tests.weights.short_runs import Trap, again, batch_of, folder_of, refused, sharded
from tread_composer.algorithms.power_ema.snapshots import read_header
from tread_composer.autoencoders import open_autoencoder
from tread_composer.core.errors import UserError
from tread_composer.io.checkpoint_reader import check_harmless, restricted_loading
from tread_composer.io.checkpoints import DIGESTS, file_digests, write_digests

FUNCTIONS = {
    'os.mkdir': lambda marker: Trap(marker),
    'exec': lambda marker: Trap(marker, builtins.exec, (f'import os; os.mkdir({str(marker)!r})',)),
    'eval': lambda marker: Trap(marker, builtins.eval, (f'__import__("os").mkdir({str(marker)!r})',)),
    'Popen': lambda marker: Trap(marker, subprocess.Popen, (['mkdir', str(marker)],)),
    'a pickle within': lambda marker: Trap(marker, pickle.loads, (pickle.dumps(Trap(marker)),)),
}
PLACES = {
    'root': (),
    'rng': ('rng',),
    'state': ('state',),
    'weights': ('state', 'model'),
    'optimizer': ('state', 'optimizers', 'AdamW'),
    'callbacks': ('state', 'callbacks'),
    'clock': ('state', 'timestamp', 'Timestamp'),
    'data': ('state', 'dataset_state'),
    'algorithms': ('state', 'algorithms'),
    'schedulers': ('state', 'schedulers'),
}


@pytest.fixture
def marker(tmp_path_factory):
    """What each hostile file would make; it must never be there."""
    path = tmp_path_factory.mktemp('marker') / 'ran'
    yield path
    assert not path.exists(), 'code of a file has run'


def newest(root):
    return folder_of(root) / batch_of(12)


def with_trap(root, place, trap):
    """The content of the newest checkpoint with a trap somewhere in it."""
    content = torch.load(newest(root), weights_only=False)
    part = content
    for key in place:
        part = part[key]
    if isinstance(part, list):
        part.append(trap)
    else:
        part['trap'] = trap
    return content


def dotted(module, marker):
    """Calls ``os.mkdir`` by an attribute of a module that is allowed in part: protocol 4 resolves dots."""
    names = b''.join(b'\x8c' + bytes([len(text)]) + text.encode() for text in (module, 'os.mkdir'))
    return b'\x80\x04' + names + b'\x93' + pickle.dumps((str(marker),), 2)[2:-1] + b'R.'


def archive(content):
    """A file of ``torch.save`` whose pickle is these bytes."""
    stream = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(stream)
    writer.write_record('data.pkl', content, len(content))
    writer.write_record('byteorder', b'little', 6)
    writer.write_end_of_file()
    return stream.getvalue()


def legacy(content):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def tarred(content):
    """The oldest format of torch."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as tar:
        for name in ('storages', 'tensors', 'pickle'):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return stream.getvalue()


FORMATS = {
    'before zip archives': lambda marker: legacy({'state': {'model': {}, 'trap': Trap(marker)}}),
    'a bare pickle': lambda marker: pickle.dumps({'state': {'model': {}, 'trap': Trap(marker)}}),
    'a bare pickle in words': lambda marker: f"cos\nmkdir\n(S'{marker}'\ntR.".encode(),
    'an instance': lambda marker: f"(S'{marker}'\nios\nmkdir\n.".encode(),
    'a tar': lambda marker: tarred(pickle.dumps(Trap(marker))),
    'a dotted name': lambda marker: archive(dotted('torch.serialization', marker)),
    'an archive of words': lambda marker: archive(f"cos\nmkdir\n(S'{marker}'\ntR.".encode()),
}


@pytest.mark.parametrize('place', PLACES)
def test_train_reads_its_own_checkpoint_without_running_it(copy, marker, place):
    torch.save(with_trap(copy, PLACES[place], Trap(marker)), newest(copy))
    message = refused(copy, 'max_duration=15ba')
    assert batch_of(12) in message and 'could run code' in message


@pytest.mark.parametrize('function', FUNCTIONS)
def test_train_loads_no_function_of_any_module(whole, copy, marker, function):
    torch.save(with_trap(copy, ('state',), FUNCTIONS[function](marker)), copy / 'hostile.pt')
    message = refused(copy, 'load_path=hostile.pt', 'run_name=another')
    assert message.startswith('load_path: hostile.pt') and 'could run code' in message


@pytest.mark.parametrize('name', FORMATS)
def test_no_format_of_torch_runs_code(copy, marker, name, cli):
    file, out = copy / 'hostile.pt', copy / 'out.safetensors'
    file.write_bytes(FORMATS[name](marker))
    assert 'hostile.pt' in refused(copy, 'load_path=hostile.pt', 'run_name=another')
    assert 'hostile.pt' in cli.refusal('import', file, '--layout', 'dit', '--out', out)
    assert not out.exists()
    with pytest.raises(UserError, match=r'hostile.pt'):
        _ = open_autoencoder(str(file)).network


def test_train_refuses_what_was_put_into_its_folder_and_what_composer_alone_finds(copy, marker):
    latest, content = folder_of(copy) / 'latest-rank0.pt', with_trap(copy, ('state',), Trap(marker))
    later = folder_of(copy) / batch_of(99)
    torch.save(content, later)
    assert 'could run code' in refused(copy, 'max_duration=15ba')
    later.unlink()
    latest.unlink()
    torch.save(content, latest)
    assert 'could run code' in refused(copy, 'max_duration=15ba')
    # A name with a placeholder is not looked at beforehand, an archive would be unpacked.
    torch.save(content, copy / 'hostile0.pt')
    done = again(copy, 'load_path=hostile{rank}.pt', 'run_name=another')
    assert done.returncode == 2 and 'could run code' in done.stderr, done.stderr
    (copy / 'hostile.tar').write_bytes(tarred(b''))
    assert 'archives are not unpacked' in refused(copy, 'load_path=hostile.tar', 'run_name=another')


METADATA = {
    'a function': lambda marker: pickle.dumps(Trap(marker)),
    'a dotted name': lambda marker: dotted('torch.distributed.checkpoint.filesystem', marker),
    'a function of torch': lambda marker: f"ctorch.hub\nload\n(S'{marker}'\ntR.".encode(),
}


@pytest.mark.parametrize('name', METADATA)
def test_the_description_of_a_sharded_checkpoint_runs_no_code(copy, marker, name):
    for folder, words in (
        (copy / 'sharded', ['load_path=sharded', 'run_name=another']),
        (folder_of(copy) / 'ep1-ba99', []),
    ):
        (sharded(folder) / '.metadata').write_bytes(METADATA[name](marker))
        write_digests(folder, file_digests(folder, [path.name for path in folder.iterdir() if path.name != DIGESTS]))
        message = refused(copy, 'max_duration=100ba', *words)
        assert '.metadata: refused' in message and 'could run code' in message, message


def test_the_parts_of_a_sharded_checkpoint_run_no_code(tmp_path, marker):
    folder = sharded(tmp_path / 'sharded', Trap(marker))
    check_harmless(folder)  # its description is
    content = {'weight': torch.ones(3), 'other': ''}
    with pytest.raises(UserError, match='could run code'), restricted_loading():
        dcp.load(content, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    with restricted_loading():
        dcp.load(content, storage_reader=dcp.FileSystemReader(sharded(tmp_path / 'whole')), no_dist=True)
    assert content['weight'].sum() == 0 and content['other'] == 'text'


def test_what_a_user_has_allowed_stays_allowed():
    torch.serialization.add_safe_globals([np.ndarray, Trap])
    try:
        with restricted_loading():
            assert {np.ndarray, Trap, np.dtype} <= set(torch.serialization.get_safe_globals())
        assert {np.ndarray, Trap} <= set(torch.serialization.get_safe_globals())
        assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    finally:
        torch.serialization.clear_safe_globals()


@pytest.fixture(scope='module')
def exported(whole, tmp_path_factory):
    out = tmp_path_factory.mktemp('exported') / 'model.safetensors'
    export(folder_of(whole), out)
    with safe_open(out, framework='pt') as file:
        return load_file(out), file.metadata()


@pytest.mark.parametrize('name', ['subprocess:Popen', 'os:mkdir'])
@pytest.mark.parametrize(
    'place', ['scheduler', 'objective', 'objective.time_distribution', 'model', 'optimizer', 'autoencoder']
)
def test_a_configuration_in_a_file_calls_nothing_but_parts(exported, copy, marker, place, name, cli):
    """One that names a class or function which would make the marker."""
    (tensors, metadata), run, file = exported, folder_of(copy), copy / 'hostile.safetensors'
    part = {'name': name, **({'args': ['mkdir', str(marker)]} if 'Popen' in name else {'path': str(marker)})}
    section, _, key = place.partition('.')
    tree = json.loads(metadata['config'])
    tree[section] = {**tree[section], key: part} if key else part
    save_file(tensors, file, metadata={**metadata, 'config': json.dumps(tree)})
    (run / 'config.yaml').write_text(yaml.safe_dump(tree))
    for path in (file, run):
        error = cli.refusal('export', path, '--out', copy / 'out.safetensors')
        assert f'{name!r} is no ' in error and 'Traceback' not in error


@pytest.mark.parametrize('text', ['!!python/object/apply:os.mkdir [{!r}]', '!!python/name:os.mkdir {!r}'])
def test_a_configuration_is_plain_yaml(copy, marker, text, cli):
    (folder_of(copy) / 'config.yaml').write_text('seed: ' + text.format(str(marker)))
    assert 'config.yaml' in cli.refusal('export', folder_of(copy), '--out', copy / 'out.safetensors')
    assert 'config.yaml' in refused(copy)


def test_a_checkpoint_is_read_without_running_it_by_the_other_commands(copy, marker, cli):
    torch.save(with_trap(copy, ('state',), Trap(marker)), newest(copy))
    for path in (folder_of(copy), newest(copy)):
        for words in (['export', path, '--out', copy / 'x.safetensors'], ['sample', path, '--out', copy / 'x']):
            assert 'could run code' in cli.refusal(*words)


def test_a_pickle_under_the_name_of_safetensors_is_none(tmp_path, marker, cli):
    path = tmp_path / 'hostile.safetensors'
    path.write_bytes(pickle.dumps(Trap(marker)))
    assert 'hostile.safetensors' in cli.refusal('export', path, '--out', tmp_path / 'out.safetensors')
    with pytest.raises(UserError, match=r'hostile.safetensors'):
        read_header(path)


@pytest.mark.parametrize('array', ['arr_0', 'mu'])
def test_an_npz_of_objects_is_no_reference(tmp_path, marker, array, cli):
    objects = np.array([Trap(marker)], dtype=object)
    np.savez(tmp_path / 'hostile.npz', **{array: objects, 'sigma': objects})
    path = tmp_path / 'hostile.npz'
    assert 'hostile.npz' in cli.refusal('evaluate', path, '--reference', path, '--features', 'digits')
