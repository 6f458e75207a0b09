"""What a run is refused for before it has written anything, and in which words.

``tests/frozen/refusals.py`` has more: other commands, and files.
"""

import pytest

from tests.runs import YAMLS, refused_here
from tread_composer.config import ConfigError, load_config
from tread_composer.core.errors import UserError

# An override of `base.yaml`, and what the message says of it. Which of them is held to the letter: `tests/frozen`.
REFUSED = r"""
seed="17" -> seed: '17' is not a whole number; write it without quotes
seed=1.0 -> seed: 1.0 is not a whole number
seed=true -> seed: true is not a whole number
compile=yes -> compile: 'yes' is not true or false; write true or false
save_folder=~/runs -> save_folder: '~/runs': nobody replaces ~ here
data.local=~/digits -> data.local: '~/digits': nobody replaces ~ here; write the whole path, or ${oc.env:HOME}/digits
load_weights_only=true -> load_weights_only: true, but there is no load_path
run_name=12 -> run_name: 12 is not text; write it in quotes
run_name="" -> run_name: '' names a folder
label_dropout=.nan -> is not a finite number
latent_scale=[1, x] -> latent_scale.1: 'x' is not a number
global_train_batch_size=null -> global_train_batch_size: null is not a whole number; give it
seed=null -> seed: null is not a whole number; leave the key out for its default
max_duration=null -> max_duration: is missing
max_duration=1dur -> max_duration: '1dur' is no length of a run
eval_interval=200 -> write '200ep' or '200ba'
eval_interval=200batches -> units ep (epochs), ba (batches), sp (samples), dur (a share of the run)
eval_interval=1.5ba -> '1.5ba' is not a time
optimizers=1 -> optimizers: is made from 'optimizer'
algorithm_passes=1 -> algorithm_passes: takes functions, which YAML cannot write
device_train_microbatch_size=0.5 -> device_train_microbatch_size: 0.5 is not a whole number
device_train_microbatch_size=0 -> take one of 1, 2, 4, 8
data=digits -> data: 'digits' is not a mapping with a name and arguments
data={name: latents, local: x, cache_limit: 3gb} -> data.cache_limit: needs data.remote
data={name: "other.package:Data", local: x} -> data.name: cannot be used here
data={name: "pathlib:Path", local: x} -> data.name: 'pathlib:Path' is no data: other packages have none
data.remote=x -> data.remote: belongs to 'latents', not to 'digits'
latent_normalization={name: per_channel, std: 0.0} -> latent_normalization.std: 0.0 is not greater than 0
latent_normalization={name: whitening} -> latent_normalization.name: 'whitening' is unknown.
model=dit -> model: 'dit' is not a mapping
model.preset=DiT-XXL/2 -> model.preset: 'DiT-XXL/2' is not one of 'DiT-S/2',
model.preset=DiT-B/2 -> model.depth: 8: the preset
model.depth=null -> model.depth: is missing
objective={name: ddpm, sigma_data: 0.5} -> objective.sigma_data: belongs to 'edm', not to 'ddpm'
objective={name: ddpm, num_timesteps: 1} -> objective.num_timesteps: 1 is not greater than or equal to 2
objective={name: ddpm, schedule: cosine, beta_end: 0.1} -> belong to schedule 'linear'
objective={name: edm, sigma_min: 9, sigma_max: 3} -> objective: sigma_min=9.0 must be below sigma_max=3.0
objective.time_distribution={name: mode, scale: 1.8} -> objective.time_distribution.scale: 1.8 is not less
objective.time_distribution={name: mode, std: 1.0} -> std: belongs to 'logit_normal', not to 'mode'
objective.time_shift=0.0 -> objective.time_shift: 0.0 is not greater than 0
objective.weighting={name: min_snr, gamma: 0.0} -> objective.weighting.gamma: 0.0 is not greater than 0
objective.weighting={name: p2} -> objective.weighting.name: 'p2' is unknown.
objective.direction_weight=-1.0 -> objective.direction_weight: -1.0 is not greater than or equal to 0
objective.direction_patch=0 -> objective.direction_patch: 0 is not greater than or equal to 1
objective.sigm=1 -> Known here: name,
objective={name: edm, direction_weight: 1.0} -> direction_weight: belongs to 'flow_matching', not to 'edm'
optimizer=null -> optimizer: is missing: without it Composer would silently train with SGD at 0.1
optimizer=adamw -> optimizer: 'adamw' is not a mapping with a name and arguments
optimizer={name: sgd} -> optimizer.lr: is missing
optimizer.betas=[0.9] -> optimizer.betas: [0.9] is not a list of 2 values
optimizer.betas=[] -> optimizer.betas: [] is not a list of 2 values
optimizer.betas=[0.9, 0.9, 0.9] -> optimizer.betas: [0.9, 0.9, 0.9] is not a list of at most 2 values
latent_scale=[] -> latent_scale: [] is not a number or a list of at least 1 value or one of 'auto'
optimizer.lr=-1.0 -> AdamW refuses these arguments: Invalid learning rate
optimizer.differentiable=true -> optimizer.differentiable: true is not one of false
optimizer.params=[1] -> optimizer.params: unknown setting
scheduler={t_warmup: 3ba} -> scheduler.name: is missing; say which scheduler
scheduler={name: constant_with_warmup} -> scheduler.t_warmup: is missing
scheduler={name: multi_step, milestones: [1ep, 2]} -> scheduler.milestones.1: a bare number has no unit
algorithms.gradient_clipping={} -> algorithms.gradient_clipping.clipping_threshold: is missing
algorithms.gradient_clipping={clipping_type: foo, clipping_threshold: 1} -> 'foo' is not one of 'adaptive', 'norm'
algorithms.gated_linear_units={act_fn: relu} -> which YAML cannot write
algorithms.composer_ema={half_life: null, smoothing: 0.9} -> EMA refuses these arguments
algorithms.composer_ema={half_life: 10} -> algorithms.composer_ema.half_life: a bare number has no unit
algorithms.swa={swa_start: soon} -> algorithms.swa.swa_start: 'soon' is not a time
algorithms.low_precision_layer_norm={apply_at: never} -> 'never' is not one of 'init',
algorithms={"a\e[31mb": {}} -> algorithms.a\x1b[31mb: unknown algorithm
algorithms.tread=true -> algorithms.tread: true is not a mapping of arguments
model.name=null -> model.name: null is unknown.
callbacks.grid={name: sample_grid, interval: 1ba} -> is named by its key: callbacks: {sample_grid: {...}}
algorithms.tread=half -> algorithms.tread: 'half' is not a mapping of arguments
algorithms.tread.end_time=0.9durr -> algorithms.tread.end_time: '0.9durr' is not a time
algorithms.tread.token_arguments=rope -> 'rope' is not a list
algorithms.tread={start: 1, routes: [{start: 3}]} -> give either routes or start
algorithms.tread={routes: [{strat: 2}]} -> unknown setting. Did you mean 'start'?
algorithms.tread={routes: [{start: 1, end: 3}, {start: 3, end: 5}]} -> overlap
algorithms.direction_schedule={} -> DirectionSchedule refuses these arguments: give start_time, end_time
callbacks.generate={prompts: [a], interval: 1ba, top_k: 3} -> callbacks.generate.top_k: unknown setting
callbacks.digits_quality.sampler=ddim -> callbacks.digits_quality.sampler: 'ddim' walks the discrete steps
callbacks.digits_quality={num_samples: 5, weights: raw} -> DigitsQuality refuses these arguments
callbacks.speed_monitor.window_size=many -> 'many' is not a whole number
callbacks.speed_monitor.window_sice=1 -> unknown setting. Did you mean 'window_size'?
callbacks.early_stopper={monitor: a, dataloader_label: b, patience: 3} -> a bare number has no unit
callbacks.early_stopper={monitor: a, dataloader_label: b, patience: 0.5dur} -> '0.5dur': Composer counts epochs or
callbacks.load_checkpoint={load_path: nope.pt} -> callbacks.load_checkpoint.load_path: 'nope.pt' does not exist
loggers.mlflow={} -> loggers.mlflow.experiment_name: is missing
loggers.mlflow={experiment_name: 3} -> loggers.mlflow.experiment_name: 3 is not text
parallelism_config={fsdp: {cpu_offload: true}} -> parallelism_config.fsdp.cpu_offload: true: Composer has no CPU offload
parallelism_config={fsdp: {reshard_after_forward: true}} -> is a setting of FSDP2: set FSDP_VERSION=2
parallelism_config={fsdp: {save_planner: x}} -> takes an object, which YAML cannot write
parallelism_config={fsdp: {device_mesh: [2, 2]}} -> is made by Composer; FSDP1 takes data_parallel_replicate_degree
max_duration=0ba -> max_duration: '0ba' has no length
max_duration=-1ba -> max_duration: '-1ba' is not a time
max_duration=1e30ba -> max_duration: '1e30ba' is longer than any run
max_duration=10tok -> max_duration: '10tok' is not a time
max_duration=10iter -> max_duration: '10iter' is not a time
max_duration=10sec -> max_duration: '10sec' is not a time
max_duration="" -> max_duration: '' is not a time
eval_interval=0ba -> eval_interval: '0ba' has no length
eval_interval=2dur -> eval_interval: '2dur' is longer than any run
eval_interval=0.0dur -> eval_interval: '0.0dur' has no length
eval_interval="" -> eval_interval: '' is not a time
save_interval=5tok -> save_interval: '5tok' is not a time
save_interval=0dur -> save_interval: '0dur' has no length
console_log_interval=0ba -> console_log_interval: '0ba' has no length
train_subset_num_batches=0 -> train_subset_num_batches: 0 must be at least 1, or -1 for all
eval_subset_num_batches=-3 -> eval_subset_num_batches: -3 must be at least 1, or -1 for all
scale_schedule_ratio=-1 -> scale_schedule_ratio: -1 is not greater than 0
scale_schedule_ratio=0 -> scale_schedule_ratio: 0 is not greater than 0
scale_schedule_ratio=0.05 -> scale_schedule_ratio: 0.05 times max_duration 10ba leaves nothing to train
scale_schedule_ratio=1e30 -> scale_schedule_ratio: 1e+30 is not less than or equal to 1000
dist_timeout=0 -> dist_timeout: 0 is not greater than 0
dist_timeout=1e300 -> dist_timeout: 1e+300 is not less than or equal to
python_log_level=nosuch -> python_log_level: 'nosuch' is not one of 'DEBUG'
precision_config={a: 1} -> precision_config: is for precision amp_fp8 only
compile_config={nosuch: 1} -> compile_config.nosuch: unknown setting
compile_config={mode: nosuch} -> compile_config.mode: 'nosuch' is not one of 'default'
compile_config={backend: nosuch} -> compile_config.backend: 'nosuch' is none of
device=tpu -> device: 'tpu' is not one of 'cpu', 'gpu', 'mps'
device=mps -> device: 'mps': this is no Mac
seed=4294967296 -> seed: 4294967296 is not less than 4294967296
data.shuffle_seed=4294967296 -> data.shuffle_seed: 4294967296 is not less than
data.num_workers=-1 -> data.num_workers: -1 is not greater than or equal to 0
data.num_workers=100000 -> data.num_workers: 100000 is not less than or equal to 1024
data.num_workers=100000000000000000000000 -> data.num_workers: 100000000000000000000000 is not
data.local=/proc/nosuch -> /proc/nosuch: no file can be made in /proc
data.local="a\0b" -> data.local: 'a\x00b' holds a NUL character
run_name=.. -> run_name: '..' names a folder
run_name=. -> run_name: '.' names a folder
run_name=a/../b -> run_name: 'a/../b' names a folder
run_name=/etc/x -> run_name: '/etc/x' names a folder
run_name="{rank}" -> run_name: '{rank}' names a folder
run_name="it's" -> names a folder: at most 200 letters, digits, spaces
run_name="a\nb" -> run_name: 'a\nb' names a folder
run_name="a\eb" -> run_name: 'a\x1bb' names a folder
run_name=" " -> run_name: ' ' names a folder
run_name="-x" -> run_name: '-x' names a folder
run_name="\u202egnp" -> names a folder
save_folder="{rank}/x" -> save_folder: '{rank}/x' has {rank}, which nobody fills in; known are {run_name}
save_folder="a{b" -> save_folder: 'a{b' has a brace that is no placeholder
save_folder="s3://" -> save_folder: 's3://' names no bucket
save_folder="foo://bar" -> save_folder: 'foo://bar' is at no store that Composer knows: s3://
save_folder="" -> save_folder: '' is empty
load_path="foo://x" -> load_path: 'foo://x' is at no store
model.depth=0 -> model.depth: 0 is not greater than or equal to 1
model.depth=100000000 -> model.depth: 100000000 is not less than or equal to 1024
model.hidden_size=1000000000 -> model.hidden_size: 1000000000 is not less than or equal to 65536
model.mlp_ratio=1e30 -> model.mlp_ratio: 1e+30 is not less than or equal to 1000000
latent_scale=1e300 -> latent_scale: 1e+300 is not
latent_shift=-1e300 -> latent_shift: -1e+300 is not
latent_normalization={name: per_channel, std: 1e300} -> latent_normalization.std: 1e+300 is not less
algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: -1.0} -> clipping_threshold: -1.0 is not
algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: 0.0} -> clipping_threshold: 0.0 is not
algorithms.gradient_clipping={clipping_type: norm, clipping_threshold: .nan} -> clipping_threshold: nan is not
algorithms.stochastic_depth={drop_rate: 3} -> algorithms.stochastic_depth.drop_rate: 3 is not less than or equal to 1
algorithms.tread.end_time="" -> algorithms.tread.end_time: '' is not a time
algorithms.tread.end_time=2dur -> algorithms.tread.end_time: '2dur' is longer than any run
algorithms.tread.always_keep=100000 -> algorithms.tread: always_keep: 100000 tokens cannot stay in a sequence of 16
scheduler={name: step, step_size: 0ba} -> scheduler.step_size: '0ba' has no length
scheduler={name: exponential, gamma: -1} -> scheduler.gamma: -1 is not greater than 0
scheduler={name: polynomial, power: -1} -> scheduler.power: -1 is not greater than 0
optimizer={name: sgd, lr: 0.1, momentum: -1} -> optimizer.momentum: -1 is not greater than or equal to 0
callbacks.speed_monitor.window_size=0 -> callbacks.speed_monitor.window_size: 0 is not greater than or equal to 1
callbacks.speed_monitor.window_size=1000000000000 -> callbacks.speed_monitor.window_size: 1000000000000 is not less
callbacks.activation_monitor={interval: 0ba} -> callbacks.activation_monitor.interval: '0ba' has no length
callbacks.early_stopper={monitor: a, dataloader_label: b, patience: 0ba} -> patience: '0ba' has no length
callbacks.sample_grid={interval: "", weights: raw} -> callbacks.sample_grid.interval: '' is not a time
callbacks.sample_grid={guidance_scale: -5, weights: raw} -> callbacks.sample_grid.guidance_scale: -5 is not greater
callbacks.sample_grid={num_steps: 1000000000000, weights: raw} -> callbacks.sample_grid.num_steps: 1000000000000 is
callbacks.digits_quality={num_samples: 100000000000, weights: raw} -> num_samples: 100000000000 is not less than
loggers.neptune_logger={} -> loggers.neptune_logger: cannot be used here: the package 'neptune' is not installed
optimizer={name: adamw, lr: 1e-3, capturable: true} -> optimizer.capturable: true is for CUDA graphs
loggers.mlflow={experiment_name: ""} -> loggers.mlflow.experiment_name: '' is not a text of at least 1 character
loggers.mlflow={experiment_name: "a\0b"} -> loggers.mlflow.experiment_name: 'a\x00b' holds a NUL character
loggers.mlflow={experiment_name: x, tracking_uri: "sqlite:////proc/x.db"} -> /proc/x.db: no file can be made in /proc
loggers.mlflow={experiment_name: x, tracking_uri: "foo://x"} -> loggers.mlflow: the store foo://x cannot be used
algorithms.power_ema={widths: [0.1, 0.1]} -> each another
algorithms.power_ema={interval: 10min} -> algorithms.power_ema.interval: '10min' is not a time
algorithms.power_ema={settings_digest: x} -> settings_digest
on_nonfinite=rewind -> on_nonfinite: 'rewind' goes back to the run's own last
on_nonfinite=ignore -> on_nonfinite: 'ignore' is not one of 'stop', 'skip'
spike_factor=1.0 -> spike_factor: 1.0 is not greater than 1
model.scan=raster -> model.scan: belongs to 'mamba2_dit', not to 'dit'
objective={name: ddpm} && model.learn_sigma=true && objective.learned_variance=false -> 'ddpm' trains no variance
objective={name: ddpm} && objective.learned_variance=false && model.learn_sigma=true -> learned_variance to true
latent_normalization={} && latent_shift=[0.5] -> latent_shift: [0.5]: latent_normalization decides that
algorithms={composer_ema: {half_life: 10ba}} && parallelism_config={fsdp: {}} -> Composer's EMA fails under FSDP1
data={name: latents, local: x} && callbacks={digits_quality: {weights: raw}} -> measures the ten digits
"""
CASES = [line.split(' -> ') for line in REFUSED.strip().splitlines()]

# The same of a shipped recipe.
OF_RECIPES = r"""
mamba2_dit_b_tread model.depth=3 -> model.depth: 3: the preset 'Mamba2-DiT-B/2' has decided that
mamba2_dit_b_tread model.preset=null -> model.hidden_size: is missing
mamba2_dit_b_tread model.num_heads=4 -> num_heads: belongs to 'dit' and 'lightning_dit', not to 'mamba2_dit'
mamba2_dit_b_tread model.attention=sdpa -> attention: belongs to 'dit' and 'lightning_dit', not to 'mamba2
mamba2_dit_b_tread model.scan=spiral -> model.scan: 'spiral' is not one of
mamba2_dit_b_tread model.kernel=cuda -> model.kernel: 'cuda' is not one of
mamba2_dit_b_tread algorithms.tread.token_arguments=[] -> token_arguments: [positions]
digits_lightning model={name: lightning_dit, preset: DiT-B/2} -> is not one of 'LightningDiT-B/1'
digits_lightning model.depth=null -> model.depth: is missing; give it, or all sizes by one name
digits_lightning model.preset=LightningDiT-B/1 -> 8: the preset 'LightningDiT-B/1' has decided that
"""


@pytest.mark.parametrize(('overrides', 'part'), CASES, ids=[overrides for overrides, _ in CASES])
def test_refused(overrides, part, base):
    assert part in refused_here(base.parent, 'base.yaml', *overrides.split(' && '))


@pytest.mark.parametrize('line', OF_RECIPES.strip().splitlines())
def test_refused_of_a_recipe(line):
    words, part = line.split(' -> ')
    recipe, override = words.split(' ', 1)
    with pytest.raises(ConfigError) as caught:
        load_config(YAMLS / f'{recipe}.yaml', [override])
    assert part in str(caught.value)


@pytest.mark.parametrize('value', ['017', '"1.5"', '""', '"~"', '"true"'])
def test_quotes_are_not_blamed_where_their_removal_would_not_help(message, value):
    assert message(f'seed={value}').endswith('is not a whole number')


def test_all_problems_are_told_in_a_stable_order(message):
    overrides = ['seed=x', 'optimizer.lr=y', 'algorithms.tread.start=z']
    lines = message(*overrides).splitlines()
    assert [line.split(': ')[1] for line in lines] == ['algorithms.tread.start', 'optimizer.lr', 'seed']
    assert message(*reversed(overrides)).splitlines() == lines


@pytest.mark.parametrize(
    ('settings', 'ranks', 'part'),
    [
        ('data_parallel_replicate_degree: 2, data_parallel_shard_degree: 1', 2, '2: nothing would be sharded'),
        ('data_parallel_replicate_degree: 3', 8, '3 replicas of some shards do not make up 8 ranks'),
        ('data_parallel_shard_degree: 4', 8, '1 replicas of 4 shards do not make up 8 ranks'),
    ],
)
def test_degrees_of_sharding_must_make_up_the_ranks(message, settings, ranks, part):
    assert part in message(f'parallelism_config={{fsdp: {{{settings}}}}}', world_size=ranks)


def test_batches_divide_among_the_ranks(base, message, monkeypatch):
    assert load_config(base, world_size=4).global_train_batch_size == 8
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert 'among 3 ranks' in message(world_size=None)
    monkeypatch.setenv('WORLD_SIZE', 'many')
    with pytest.raises(UserError, match="WORLD_SIZE='many' in the environment is no whole number of 1 or more"):
        load_config(base)
