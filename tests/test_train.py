"""The main door: ``composer train.py x.yaml``, as a user runs it, on one and two ranks."""

import json

import pytest
import torch
import yaml

from tests.runs import (
    SMALL,
    YAMLS,
    assert_same_training,
    checkpoint,
    command,
    environment,
    history,
    launch,
    launch_here,
    refused_here,
    tracked,
    train,
)
from tests.warm import start_program, wait_until
from tread_composer.data.digits import prepare_digits

YAML = YAMLS / 'digits_tread.yaml'
TREAD_WIDE = 'algorithms.tread={start: 1, end: -2, selection_rate: 0.5}'


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """Uninterrupted runs of 14 batches, by number of ranks, the second by the launcher; an epoch ends after 11."""
    folders = {ranks: tmp_path_factory.mktemp(f'whole{ranks}') for ranks in (1, 2)}
    train(folders[1], 'digits_tread.yaml', TREAD_WIDE)
    done = launch(folders[2], command(YAML, *SMALL, TREAD_WIDE, launcher=2))
    assert done.returncode == 0, done.stdout + done.stderr
    return folders


def test_a_run_leaves_what_it_should(whole):
    folder = whole[1] / 'runs'
    names = {'digits_tread', 'mlflow.db', '.mlflow.db.lock', 'mlflow_artifacts'}
    assert {path.name for path in folder.iterdir()} == names
    assert {path.name for path in whole[1].iterdir()} == {'data', 'runs'}
    saved = yaml.safe_load((folder / 'digits_tread' / 'config.yaml').read_text())
    assert saved['algorithms']['tread']['end'] == -2 and saved['model']['hidden_size'] == 16
    environment = json.loads((folder / 'digits_tread' / 'environment.json').read_text())
    assert 'torch' in json.dumps(environment)
    run = tracked(whole[1])
    assert run.info.status == 'FINISHED'
    assert run.data.params['algorithms.tread.selection_rate'] == '0.5' and run.data.params['optimizer.lr'] == '0.001'
    assert run.data.metrics['tread/kept_tokens'] == 8 and run.data.metrics['tread/selection_rate'] == 0.5
    assert sorted(history(whole[1])) == list(range(14))


def test_what_only_the_constructor_of_a_callback_refuses_is_said_in_words(tmp_path):
    prepare_digits(tmp_path / 'data' / 'digits')
    stopper = 'callbacks.early_stopper={monitor: loss, dataloader_label: eval, comp: most}'
    message = refused_here(tmp_path, YAML, *SMALL, 'loggers=null', stopper)
    assert 'callbacks.early_stopper: EarlyStopper refuses these arguments: Unrecognized comp string' in message


def test_a_run_that_was_killed_and_stopped_equals_the_uninterrupted_one_to_the_bit(whole, tmp_path):
    words = command(YAML, *SMALL, TREAD_WIDE, 'save_interval=1ba')
    process = start_program(words[1:], tmp_path, environment(), [tmp_path / 'log'])
    assert wait_until((tmp_path / 'runs' / 'digits_tread' / 'latest-rank0.pt').exists, process)
    process.kill()
    process.join()
    wait_until(lambda: tracked(tmp_path).info.status != 'RUNNING')  # until the watcher has imported MLflow
    assert tracked(tmp_path).info.status == 'FAILED'
    for until in (11, 14):  # from where it was killed; from the end of an epoch
        done = train(tmp_path, 'digits_tread.yaml', TREAD_WIDE, 'save_interval=1ba', f'max_duration={until}ba')
    assert tracked(tmp_path).info.status == 'FINISHED' and 'mlflow ui' in done.stdout
    assert history(tmp_path) == history(whole[1])
    assert_same_training(checkpoint(tmp_path, 'digits_tread'), checkpoint(whole[1], 'digits_tread'))


def test_two_ranks_go_on_as_the_uninterrupted_run_to_the_bit(whole, tmp_path):
    for until in (11, 14):  # from the end of an epoch; from its middle: ``test_ranks_meet.py``
        words = (TREAD_WIDE, f'save_interval={until}ba', f'max_duration={until}ba')
        train(tmp_path, 'digits_tread.yaml', *words, ranks=2)
    assert history(tmp_path) == history(whole[2])
    assert_same_training(checkpoint(tmp_path, 'digits_tread'), checkpoint(whole[2], 'digits_tread'))


def test_two_ranks_train_as_one(whole):
    """Draws are keyed by sample, so the same global batches give the same losses to rounding."""
    one, two = history(whole[1]), history(whole[2])
    assert list(two.values()) == pytest.approx(list(one.values()), rel=1e-4)


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_back(whole, tmp_path):
    overrides = (TREAD_WIDE, 'save_interval=5ba')
    for ranks, until in ((2, 5), (1, 10), (2, 14)):
        train(tmp_path, 'digits_tread.yaml', *overrides, f'max_duration={until}ba', ranks=ranks)
    assert list(history(tmp_path).values()) == pytest.approx(list(history(whole[1]).values()), rel=1e-4)
    average = dict(checkpoint(tmp_path, 'digits_tread')['algorithms'])['EMA']['average']
    expected = dict(checkpoint(whole[1], 'digits_tread')['algorithms'])['EMA']['average']
    for name, value in expected.items():
        assert average[name].numpy() == pytest.approx(value.numpy(), abs=2e-4), name


def test_two_ranks_under_fsdp2_draw_samples_and_save_what_one_rank_goes_on_with(tmp_path, monkeypatch):
    monkeypatch.setenv('FSDP_VERSION', '2')
    sharded = 'parallelism_config={fsdp: {state_dict_type: full, activation_checkpointing: true}}'
    grid = 'callbacks.sample_grid={interval: 5ba, num_steps: 2}'
    words = (*(word for word in SMALL if 'sample_grid' not in word), TREAD_WIDE, sharded, grid)
    until = ('save_interval=5ba', 'max_duration=5ba')
    done = launch(tmp_path, command(YAML, *words, *until), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / 'runs' / 'digits_tread' / 'samples').glob('*.png'))
    average = dict(checkpoint(tmp_path, 'digits_tread')['algorithms'])['EMA']['average']
    until = ('save_interval=6ba', 'max_duration=6ba')
    done = launch_here(tmp_path, YAML, *SMALL, TREAD_WIDE, *until)
    assert done.returncode == 0 and 'batches 5 to 6' in done.stdout, done.stdout + done.stderr
    state = checkpoint(tmp_path, 'digits_tread')
    for name, value in dict(state['algorithms'])['EMA']['average'].items():
        expected = 0.99 * average[name] + 0.01 * state['model'][name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)
        assert value.shape == state['model'][name].shape


def test_the_same_command_again_trains_no_more_and_changes_nothing(whole):
    before = checkpoint(whole[1], 'digits_tread')
    done = train(whole[1], 'digits_tread.yaml', TREAD_WIDE)
    assert 'was trained to 14ba before' in done.stdout
    assert_same_training(checkpoint(whole[1], 'digits_tread'), before)
    assert tracked(whole[1]).info.status == 'FINISHED'


def test_another_configuration_under_the_same_name_is_refused(whole):
    changed = ('algorithms.tread.end=-3', 'optimizer.lr=2e-3')
    message = refused_here(whole[1], YAML, *SMALL, TREAD_WIDE, *changed)
    assert 'algorithms.tread.end: saved -2, now -3' in message and 'optimizer.lr: saved 0.001, now 0.002' in message
    assert 'run_name=' in message
    assert 'algorithms.tread: saved {' in refused_here(whole[1], YAML, *SMALL, 'algorithms.tread=null')


def test_a_dense_run_does_not_continue_a_routed_checkpoint(whole, tmp_path):
    path = whole[1] / 'runs' / 'digits_tread' / 'latest-rank0.pt'
    done = launch_here(tmp_path, YAMLS / 'digits.yaml', *SMALL, f'load_path={path}', 'autoresume=false')
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'algorithms.tread: saved {' in done.stderr and 'load_weights_only=true' in done.stderr
    assert 'Traceback' not in done.stdout + done.stderr


def test_what_only_the_model_can_tell_is_refused_before_the_first_batch(tmp_path):
    """What the configuration can tell: see ``config/test_refusals.py``."""
    for override, message in {
        'algorithms.tread.blocks=nowhere': "algorithms.tread: blocks: the model has no module 'nowhere'",
        'callbacks.sample_grid={classes: [3, 99]}': 'callbacks.sample_grid.classes: [99] are not classes of the model',
    }.items():
        done = launch_here(tmp_path, YAML, *SMALL, override)
        assert done.returncode == 2 and done.stderr.count(message) == 1, done.stderr
        assert 'Traceback' not in done.stderr and 'batch 1/' not in done.stderr
        assert not list(tmp_path.glob('runs/digits_tread/*.pt'))


def test_with_two_ranks_the_message_appears_once_in_the_launchers_output(tmp_path):
    wrong = command(YAML, 'global_train_batch_size=129', launcher=2), command(YAML, '--what')
    for done in (launch(tmp_path, wrong[0]), launch(tmp_path, wrong[1], ranks=2)):  # the second as the launcher does
        output = done.stdout + done.stderr
        messages = ('129 does not divide among 2 ranks', 'unrecognized arguments: --what')
        assert done.returncode == 2 and 'Traceback' not in output, output
        assert sum(output.count(message) for message in messages) == 1, output
        assert list(tmp_path.iterdir()) == []


def test_a_run_that_saved_nothing_does_not_block_its_correction(tmp_path):
    folder = tmp_path / 'runs' / 'digits_tread'
    words = (*SMALL, 'max_duration=1ba')
    assert launch_here(tmp_path, YAML, *words).returncode == 0
    message = refused_here(tmp_path, YAML, *words, 'optimizer.lr=2e-3')
    assert 'optimizer.lr: saved 0.001, now 0.002' in message
    for path in folder.glob('*.pt'):
        path.unlink()
    assert launch_here(tmp_path, YAML, *words, 'optimizer.lr=2e-3').returncode == 0
    assert yaml.safe_load((folder / 'config.yaml').read_text())['optimizer']['lr'] == 0.002


def test_composers_average_is_not_resumed_on_another_number_of_ranks(tmp_path):
    average = (*SMALL, 'algorithms.ema=null', 'algorithms.composer_ema={half_life: 10ba}', 'save_interval=3ba')
    assert launch_here(tmp_path, YAMLS / 'digits.yaml', *average, 'max_duration=3ba').returncode == 0
    done = launch(tmp_path, command(YAMLS / 'digits.yaml', *average), ranks=2)
    assert done.returncode == 2, done.stdout + done.stderr
    assert 'ranks: saved 1, now 2' in done.stderr
