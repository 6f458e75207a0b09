"""Text to tree: inheritance, overrides, interpolation, and who wrote what."""

import json
import os

import pytest

from tread_composer.config import load_config
from tread_composer.config.document import dump_yaml, read_document
from tread_composer.config.errors import ConfigError


def test_child_is_laid_over_its_bases(base, write, tmp_path):
    write('middle.yaml', 'extends: base.yaml\noptimizer: {lr: 0.5}\nseed: 3\n')
    leaf = write('leaf.yaml', 'extends: middle.yaml\nseed: 4\nalgorithms: {tread: null}\n')
    config = load_config(leaf)
    assert (config.seed, config.optimizer.name, config.optimizer.kwargs) == (4, 'adamw', {'lr': 0.5})
    assert config.algorithms == {}
    assert list(config.callbacks) == ['speed_monitor']
    (tmp_path / 'inner').mkdir()  # a base is found beside the file
    assert load_config(write('inner/child.yaml', 'extends: ../base.yaml\nseed: 5\n')).seed == 5


def test_another_name_starts_the_section_afresh(base, write):
    child = write('child.yaml', 'extends: base.yaml\noptimizer: {name: sgd, lr: 0.1}\nobjective: {name: edm}\n')
    config = load_config(child, ['optimizer={name: adam, lr: 2e-3}'])
    assert config.optimizer.kwargs == {'lr': 2e-3}
    assert config.objective.instance.sigma_data == 0.5
    config = load_config(base, ['optimizer.name=sgd', 'optimizer.lr=0.5'])
    assert config.to_dict()['optimizer'] == {'name': 'sgd', 'lr': 0.5}
    with pytest.raises(ConfigError, match=r'optimizer\.lr: is missing'):
        load_config(base, ['optimizer.name=sgd'])
    assert load_config(base, ['optimizer.name=adamw']) == load_config(base)


def test_a_longer_circle_of_bases_is_refused(write, message):
    write('a.yaml', 'extends: b.yaml\n')
    assert 'goes round in circles' in message(path=write('b.yaml', 'extends: a.yaml\n'))


def test_null_with_nothing_to_remove_is_refused(write, message):
    child = write('child.yaml', 'extends: base.yaml\ncallbacks: {lr_monitor: }\n')
    assert 'child.yaml: callbacks.lr_monitor: null removes an inherited entry' in message(path=child)


def test_messages_name_the_file_of_the_value(base, write, message):
    base.write_text(base.read_text() + 'sed: 1\nlabel_dropout: high\n')
    child = write('child.yaml', 'extends: base.yaml\nmodel: {depht: 3}\n')
    lines = message('optimizer.lrr=1', path=child).splitlines()
    starts = [line.split(': ')[:2] for line in lines if not line.startswith('Known')]
    assert starts == [
        ['base.yaml', 'label_dropout'],
        ['child.yaml', 'model.depht'],
        ['command line', 'optimizer.lrr'],
        ['base.yaml', 'sed'],
    ]


def test_override_forms(base):
    for text, expected in {'1e-4': 1e-4, '1.0e-4': 1e-4, '.5': 0.5, '1': 1.0}.items():
        lr = load_config(base, [f'optimizer.lr={text}']).optimizer.kwargs['lr']
        assert lr == expected and type(lr) is float
    overrides = [
        'save_folder=runs/${run_name}', 'optimizer.betas=[0.8, 0.9]', 'callbacks.lr_monitor={}',
        'algorithms.tread=null', 'latent_scale=[1, 2.5]', 'latent_scale.1=3',
    ]  # fmt: skip
    config = load_config(base, overrides)
    assert config.save_folder == 'runs/small'
    assert config.optimizer.kwargs['betas'] == [0.8, 0.9]
    assert set(config.callbacks) == {'speed_monitor', 'lr_monitor'}
    assert config.algorithms == {}
    assert config.latent_scale == [1.0, 3.0]


@pytest.mark.parametrize(
    ('override', 'part'),
    [
        ('--seed=3', 'is not of the form key=value'),
        ('seed=', 'has no value; write seed=null'),
        ('seed.deep=3', "seed is 17, which holds no 'deep'"),
        ('optimizer.betas.7=3', "is a list of 2; '7' is not a position"),
        ('optimizer.betas.²=3', "is a list of 2; '²' is not a position"),  # a digit for Python, and no number
        ('data={local', 'the value is not YAML'),
        ('extends=other.yaml', 'can only be written in a file'),
        ('seed=&a [*a]', 'contains itself'),
        ('seed=' + '[' * 5000, 'nested hundreds of levels deep'),
    ],
)
def test_wrong_overrides(base, override, part, message):
    base.write_text(base.read_text() + 'seed: 17\n')
    text = message('optimizer.betas=[0.1, 0.2]', override)
    assert text.startswith(f'command line: {override}: ')
    assert part in text


# Each line holds the one above ten times: ten thousand million values in 300 bytes.
_BOMB = 'a0: &a0 [x]\n' + ''.join(
    f'a{level}: &a{level} [{", ".join([f"*a{level - 1}"] * 10)}]\n' for level in range(1, 11)
)


@pytest.mark.parametrize(
    ('text', 'part'),
    [
        ('seed: 1\nseed: 2\n', "line 2, column 1: the key 'seed' is written twice"),
        ('model: {depth: 1, depth: 2}\n', "the key 'depth' is written twice"),
        ('1: 2\n', 'the key 1 is not text'),
        ('a: &a {b: *a}\n', 'contains itself'),
        ('seed: &a [*a]\n', 'contains itself'),
        (_BOMB, 'stand for more than 100,000 values'),
        ('a: ' + '[' * 5000 + ']' * 5000, 'nested hundreds of levels deep'),
        ('a: ' + '{a: ' * 5000 + '}' * 5000, 'nested hundreds of levels deep'),
        ('#' * 2**21, 'not a regular file of at most 1,048,576 bytes'),
        ('a: {b: ${c}}\n', 'in quotes'),
    ],
)
def test_broken_files(text, part, write, message):
    text = message(path=write('broken.yaml', text))
    assert text.startswith('broken.yaml: ')
    assert part in text
    assert 'Traceback' not in text


def test_interpolation(base, write, message, monkeypatch):
    monkeypatch.setenv('TREAD_TEST_SEED', '7')
    monkeypatch.delenv('TREAD_TEST_NONE', raising=False)
    overrides = ['seed=${oc.decode:${oc.env:TREAD_TEST_SEED}}', 'run_name=${oc.env:TREAD_TEST_NONE,dflt}']
    config = load_config(base, overrides)
    assert (config.seed, config.run_name) == (7, 'dflt')
    assert "'7' is not a whole number; write it without quotes" in message('seed=${oc.env:TREAD_TEST_SEED}')
    assert "command line: run_name: '${sed}'" in message('run_name=${sed}')
    assert "'TREAD_TEST_NONE' not found; set it" in message('run_name=${oc.env:TREAD_TEST_NONE}')
    assert 'is not an interpolation' in message('run_name=${')
    assert 'command line: run_name' in message('run_name=???')


def test_awkward_text_is_read_back_as_text(write):
    texts = ['1e-4', 'yes', '12', 'null', '1:30', 'x${y}', 1e-5, '', '1_000']
    tree = dict(zip('abcdefghi', texts, strict=True))
    assert read_document(write('dump.yaml', dump_yaml(tree))).data == tree
    document = read_document(write('plain.yaml', 'a: on\nb: 1:30\nc: 010\nd: 2024-01-01\n'))  # numbers in YAML 1.1
    assert document.data == {'a': 'on', 'b': '1:30', 'c': '010', 'd': '2024-01-01'}
    document = read_document(write('anchors.yaml', 'a: &a {b: [1, 2]}\nc: *a\n'))
    assert document.data == {'a': {'b': [1, 2]}, 'c': {'b': [1, 2]}}


def test_file_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / 'pipe')  # reading it would wait for a writer that never comes
    for path in (tmp_path, tmp_path / 'pipe', '/dev/zero'):
        with pytest.raises(ConfigError, match='not a regular file'):
            read_document(path)


def test_what_a_logger_takes_from_the_environment_is_shown_nowhere(base, message, monkeypatch):
    monkeypatch.setenv('TREAD_TEST_TOKEN', 'very-secret')
    monkeypatch.setenv('TREAD_TEST_NAME', 'small')
    words = [
        'loggers.mlflow={experiment_name: x, tracking_uri: "https://me:${oc.env:TREAD_TEST_TOKEN}@host",'
        ' tags: {a: "${oc.env:TREAD_TEST_TOKEN}", b: "https://me:literal-secret@host"}}',
        'run_name=${oc.env:TREAD_TEST_NAME}',
    ]
    config = load_config(base, words)
    assert config.loggers['mlflow'].kwargs['tracking_uri'] == 'https://me:very-secret@host'  # what the run uses
    for text in (config.to_yaml(), json.dumps(config.to_dict())):
        assert 'very-secret' not in text and 'literal-secret' not in text
    assert config.to_dict()['run_name'] == 'small'  # it names the folder
    base.with_name('config.yaml').write_text(config.to_yaml())
    again = load_config(base.with_name('config.yaml'))
    assert again.loggers['mlflow'].kwargs['tags']['a'] == 'very-secret'
    assert again.to_yaml() == config.to_yaml()
    monkeypatch.setenv('TREAD_TEST_TAGS', '{a: very-secret-too}')  # masked whole
    tags = load_config(base, ['loggers.mlflow={experiment_name: x, tags: "${oc.decode:${oc.env:TREAD_TEST_TAGS}}"}'])
    assert tags.loggers['mlflow'].kwargs['tags'] == {'a': 'very-secret-too'}
    assert tags.to_dict()['loggers']['mlflow']['tags'] == '***' and 'very-secret-too' not in tags.to_yaml()
    refused = message('loggers.mlflow={experiment_name: x, log_system_metrics: "${oc.env:TREAD_TEST_TOKEN}"}')
    assert "log_system_metrics: '***' is not true or false" in refused
    monkeypatch.delenv('TREAD_TEST_TOKEN')
    elsewhere = load_config(base.with_name('config.yaml'))  # whoever samples needs no token
    assert elsewhere.loggers['mlflow'].kwargs['tags']['a'] == '***'
