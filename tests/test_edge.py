"""Composer at the edge: the parts that hold the methods work without it, streaming and MLflow installed."""

import subprocess
import sys

from tests.runs import environment

_SCRIPT = """
import importlib, importlib.abc, pkgutil, sys

ABSENT = ('composer', 'streaming', 'mlflow')

class NotInstalled(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] in ABSENT:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, NotInstalled())
for name in ABSENT:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f'{name} can be imported')

import tread_composer
for part in ('core', 'routing', 'models', 'objectives', 'samplers', 'autoencoders', 'metrics'):
    package = importlib.import_module(f'tread_composer.{part}')
    for module in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
        importlib.import_module(module.name)

import torch
from tread_composer.autoencoders import Pixels
from tread_composer.metrics.published import frechet_distance, statistics
from tread_composer.models import DiT
from tread_composer.objectives import FlowMatching
from tread_composer.routing import Route, apply_tread
from tread_composer.samplers import Equation, euler

torch.manual_seed(0)
sizes = {'latent_size': 8, 'in_channels': 1, 'num_classes': 10, 'patch_size': 2}
model = DiT(**sizes, hidden_size=16, depth=8, num_heads=2)
with torch.no_grad():  # gates start at zero, which would leave the blocks without gradients
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
seen = []
for block in model.blocks:
    block.register_forward_pre_hook(lambda block, args: seen.append(args[0].shape[1]))
apply_tread(model, Route(start=2, end=-4, selection_rate=0.5))

objective = FlowMatching()
latents, noise, labels = torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.arange(4)
objective(model.train(), latents, labels, noise, torch.rand(4))['loss'].mean().backward()
assert seen == [16, 16, 8, 8, 8, 16, 16, 16], seen
assert all(parameter.grad is not None for parameter in model.blocks.parameters())

seen.clear()
with torch.no_grad():
    equation = Equation(objective, model.eval(), labels)
    samples = euler(equation, objective.prior(noise), objective.sampling_times(2), lambda step: noise)
assert samples.shape == latents.shape and samples.isfinite().all() and set(seen) == {16}

images = Pixels().decode(samples.float())
assert images.shape == latents.shape
features = torch.randn(256, 3, dtype=torch.float64)
real = statistics(features)
assert frechet_distance(real, real) < 1e-6
distance = frechet_distance(real, statistics(features + 2))  # equal covariances: 3 * 2**2 of the means
assert abs(distance - 12) < 1e-6, distance
print('works')
"""


def test_the_methods_work_where_composer_streaming_and_mlflow_are_not_installed(tmp_path):
    words = [sys.executable, '-c', _SCRIPT]
    done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, 'works\n'), done.stderr
