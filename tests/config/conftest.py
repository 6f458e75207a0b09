import pytest

from tread_composer.config import ConfigError, load_config

BASE = """\
run_name: small
max_duration: 10ba
global_train_batch_size: 8
global_eval_batch_size: 8
data: {name: digits, local: data/digits}
autoencoder: {name: pixels}
model: {name: dit, patch_size: 2, hidden_size: 32, depth: 8, num_heads: 4}
objective: {name: flow_matching, time_distribution: {name: logit_normal}}
optimizer: {name: adamw, lr: 1e-3}
algorithms:
  tread: {start: 2, end: -4, selection_rate: 0.5}
callbacks:
  speed_monitor: {window_size: 5}
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / 'base.yaml'
    path.write_text(BASE)
    return path


@pytest.fixture
def write(tmp_path):
    def write_file(name, text):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write_file


@pytest.fixture
def message(base):
    """The text of the error that loading raises, with the folder taken out."""

    def message_of(*overrides, path=base, world_size=1):
        with pytest.raises(ConfigError) as caught:
            load_config(path, overrides, world_size=world_size)
        return str(caught.value).replace(f'{base.parent}/', '')

    return message_of
