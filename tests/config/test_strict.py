"""What the typed tree refuses, and in which words."""

import inspect

import composer
import pytest
import torch

from tread_composer.config import check_files, check_machine, json_schema, load_config, part_names
from tread_composer.config.errors import ConfigError
from tread_composer.config.trainer_settings import BUILT_BY_US, TrainerSettings


@pytest.mark.parametrize(
    ('override', 'meant'),
    [
        ('sed=1', 'seed'),
        ('max_durations=1ep', 'max_duration'),
        ('model.dept=1', 'depth'),
        ('data.locals=x', 'local'),
        ('objective.time_distribution.meen=1', 'mean'),
        ('algorithms.tread.selction_rate=0.5', 'selection_rate'),
        ('algorithms.tread={routes: [{strat: 2}]}', 'start'),
        ('callbacks.speed_monitor.window_sice=1', 'window_size'),
        ('callbacks.speedmonitor={}', 'speed_monitor'),
        ('loggers.wandb={}', 'wandb_logger'),
        ('optimizer.weight_decoy=1', 'weight_decay'),
        ('optimizer.name=adamW', 'adamw'),
        ('parallelism_config={fsdp: {shardingstrategy: X}}', 'sharding_strategy'),
    ],
)
def test_misspelt(override, meant, message):
    text = message(override)
    assert text.startswith('command line: ')
    assert f"Did you mean '{meant}'?\nKnown here: " in text
    known = text.split('Known here: ')[1]
    assert meant in known.split(', ') or known == 'python -m tread_composer schema'  # where there are very many


def test_message_form(message):
    expected = (
        "command line: algorithms.tread.selction_rate: unknown setting. Did you mean 'selection_rate'?\n"
        'Known here: start, end, selection_rate, '
    )
    assert message('algorithms.tread.selction_rate=0.5').startswith(expected)


@pytest.mark.parametrize(
    ('override', 'part'),
    [
        ('seed="17"', "seed: '17' is not a whole number; write it without quotes"),
        ('seed=1.0', 'seed: 1.0 is not a whole number'),
        ('seed=true', 'seed: true is not a whole number'),
        ('seed=-1', 'seed: -1 is not greater than or equal to 0'),
        ('compile=yes', "compile: 'yes' is not true or false; write true or false"),
        ('run_name=12', 'run_name: 12 is not text; write it in quotes'),
        ('label_dropout=1.5', 'label_dropout: 1.5 is not less than 1'),
        ('label_dropout=.nan', 'is not a finite number'),
        ('latent_scale=[1, x]', "latent_scale.1: 'x' is not a number"),
        ('latent_scale=-1', 'latent_scale: -1.0 must be positive'),
        ('model=dit', "model: 'dit' is not a mapping"),
        ('model.preset=DiT-XXL/2', "model.preset: 'DiT-XXL/2' is not one of 'DiT-S/2', "),
        ('model.preset=DiT-B/2', 'model.depth: 8: the preset'),
        ('model.depth=null', 'model.depth: is missing'),
        ('model.hidden_size=30', 'model.hidden_size: 30 does not divide among 4 heads'),
        ('model.learn_sigma=true', "model.learn_sigma: true adds output channels for a variance, which objective 'fl"),
        ('objective={name: ddpm}', 'model.learn_sigma: false, but objective ddpm with learned_variance: true'),
        ('objective={name: ddmp}', "objective.name: 'ddmp' is unknown."),
        ('objective={name: ddpm, sigma_data: 0.5}', "objective.sigma_data: belongs to 'edm', not to 'ddpm'"),
        ('objective={name: ddpm, num_timesteps: 1}', 'objective.num_timesteps: 1 is not greater than or equal to 2'),
        ('objective={name: ddpm, schedule: cosine, beta_end: 0.1}', "belong to schedule 'linear'"),
        ('callbacks.sample_grid.sampler=ddpm', "callbacks.sample_grid.sampler: 'ddpm' walks the discrete steps"),
        ('callbacks.digits_quality.sampler=ddim', "callbacks.digits_quality.sampler: 'ddim' walks the discrete steps"),
        ('callbacks.sample_grid.sampler=hoin', "callbacks.sample_grid.sampler: 'hoin' is none of"),
        ('objective={sigma_data: 0.5}', "objective.sigma_data: belongs to 'edm', not to 'flow_matching'"),
        ('objective={name: edm, sigma_min: 9, sigma_max: 3}', 'objective: sigma_min=9.0 must be below sigma_max=3.0'),
        ('data={name: latents, local: x, cache_limit: 3gb}', 'data.cache_limit: needs data.remote'),
        ('optimizer=null', 'optimizer: is missing: without it Composer would silently train with SGD at 0.1'),
        ('optimizer=adamw', "optimizer: 'adamw' is not a mapping with a name and arguments"),
        ('max_duration=null', 'max_duration: is missing'),
        (
            'max_duration=10',
            "max_duration: a bare number has no unit (Composer would read epochs); write '10ep' or '10ba'",
        ),
        ('max_duration=1dur', 'max_duration: '),
        ('save_interval=1', "write '1ep' or '1ba'"),
        ('eval_interval=200', "write '200ep' or '200ba'"),
        ('eval_interval=200batches', "units 'iter', 'ep', 'ba', 'sp', 'tok', 'dur', 'sec'"),
        ('eval_interval=1.5ba', "'1.5ba' is not a time"),
        ('precision=bf16', "precision: 'bf16' is not one of 'fp32', 'amp_fp16', 'amp_bf16', 'amp_fp8'"),
        ('optimizers=1', "optimizers: is made from 'optimizer'"),
        ('algorithm_passes=1', 'algorithm_passes: takes functions, which YAML cannot write'),
        ('autoresume=true', 'autoresume: true needs save_folder'),
        ('device_train_microbatch_size=0.5', 'device_train_microbatch_size: 0.5 is not a whole number'),
        ('device_train_microbatch_size=0', 'take one of 1, 2, 4, 8'),
        (
            'device_train_microbatch_size=3',
            '3 does not divide the 8 samples of one rank (8 / 1); take one of 1, 2, 4, 8',
        ),
    ],
)
def test_refused(override, part, message):
    assert part in message(override)


DDPM = 'objective={name: ddpm}'


def test_learned_variance_and_its_channels_come_together_or_not_at_all(base, message):
    assert load_config(base, [DDPM, 'model.learn_sigma=true']).objective.name == 'ddpm'
    assert not load_config(base, [DDPM, 'objective.learned_variance=false']).model.kwargs['learn_sigma']
    text = message(DDPM, 'model.learn_sigma=true', 'objective.learned_variance=false')
    assert 'learned_variance: false does not train; set it to false, or objective.learned_variance to true' in text


def test_samplers_and_steps_that_fit_the_objective(base, message):
    ddpm = [DDPM, 'model.learn_sigma=true', 'callbacks.sample_grid.weights=raw']
    for sampler in ('ddpm', 'ddim', 'euler', 'heun'):
        load_config(base, [*ddpm, f'callbacks.sample_grid.sampler={sampler}', 'callbacks.sample_grid.num_steps=1000'])
    text = message(*ddpm, 'callbacks.sample_grid.num_steps=1001')
    assert 'callbacks.sample_grid.num_steps: 1001 steps, but the objective has 1000 timesteps; take at most' in text


def test_auto_microbatch_needs_a_gpu(base, message):
    if torch.cuda.is_available():
        assert load_config(base, ['device_train_microbatch_size=auto']).device_train_microbatch_size == 'auto'
    else:
        assert 'this machine has no GPU' in message('device_train_microbatch_size=auto')


def test_all_problems_are_told_in_a_stable_order(message):
    overrides = ['seed=x', 'optimizer.lr=y', 'algorithms.tread.start=z']
    lines = message(*overrides).splitlines()
    assert [line.split(': ')[1] for line in lines] == ['algorithms.tread.start', 'optimizer.lr', 'seed']
    assert message(*reversed(overrides)).splitlines() == lines


def test_batches_divide_among_the_ranks(base, message, monkeypatch):
    text = message(world_size=3)
    assert 'global_train_batch_size: 8 does not divide among 3 ranks; take a multiple, such as 9' in text
    assert 'global_eval_batch_size: 8 does not divide' in text
    assert load_config(base, world_size=4).global_train_batch_size == 8
    monkeypatch.setenv('WORLD_SIZE', '3')
    assert 'among 3 ranks' in message(world_size=None)


def test_defaults(base):
    config = load_config(base)
    assert (config.seed, config.autoresume, config.save_overwrite, config.compile) == (17, False, False, False)
    assert config.eval_interval == '1ep'
    assert config.scheduler.name == 'constant'
    assert load_config(base, ['save_folder=runs/x']).autoresume is True
    assert load_config(base, ['save_folder=runs/x', 'autoresume=false']).autoresume is False


def test_every_keyword_of_the_trainer_is_a_setting_or_has_a_reason(base):
    keywords = set(inspect.signature(composer.Trainer).parameters)
    assert keywords == (set(TrainerSettings.model_fields) | set(BUILT_BY_US)) & keywords
    assert not set(TrainerSettings.model_fields) & set(BUILT_BY_US)
    arguments = load_config(base).trainer_arguments()
    assert set(arguments) <= keywords
    assert arguments['max_duration'] == '10ba'
    assert arguments['run_name'] == 'small'


def test_check_files(base, tmp_path):
    folder = tmp_path / 'latents'
    config = load_config(base, [f'data={{name: latents, local: {folder}}}'])
    with pytest.raises(ConfigError) as caught:
        check_files(config, 'base.yaml')
    lines = str(caught.value).splitlines()
    assert [f'{folder}/{split}' in line for split, line in zip(('train', 'val'), lines, strict=True)] == [True, True]
    assert lines[0].startswith(f'base.yaml: data.local: {str(folder)!r}: ') and 'does not exist' in lines[0]
    assert 'data.eval_split=null' in lines[1]
    for split in ('train', 'val'):
        (folder / split).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'holds no index\.json'):
        check_files(config)
    for split in ('train', 'val'):
        (folder / split / 'index.json').write_text('{}')
    check_files(config)
    check_files(load_config(base))


def test_check_machine(base):
    with pytest.raises(ConfigError, match="precision: 'amp_bf16' needs a GPU"):
        check_machine(load_config(base, ['precision=amp_bf16', 'device=cpu']))
    check_machine(load_config(base, ['precision=fp32', 'device=cpu']))
    on_gpu = load_config(base, ['precision=amp_bf16', 'device=gpu'])
    if torch.cuda.is_available():
        check_machine(on_gpu)
    else:
        with pytest.raises(ConfigError, match='no CUDA device'):
            check_machine(on_gpu)


def test_json_schema_knows_components_and_keywords():
    schema = json_schema()
    tread = schema['properties']['algorithms']['properties']['tread']['anyOf'][0]
    assert set(tread['properties']) >= {'start', 'end', 'selection_rate', 'routes'}
    assert tread['additionalProperties'] is False
    assert {'extends', 'max_duration', 'model'} <= set(schema['properties'])
    names = [one['properties']['name'].get('const') for one in schema['properties']['optimizer']['oneOf']]
    assert 'adamw' in names
    # Parts of other packages: what their arguments are is not looked up for an editor.
    assert schema['properties']['optimizer']['oneOf'][-1]['properties']['name']['pattern'] == ':'
    assert schema['properties']['algorithms']['additionalProperties']['required'] == ['name']


def test_json_schema_knows_the_parts_of_an_objective():
    schema = json_schema()
    sections = schema['properties']['objective']['oneOf']
    (flow,) = [one for one in sections if one['properties']['name'].get('const') == 'flow_matching']
    for key in ('time_distribution', 'weighting'):
        options = flow['properties'][key]['oneOf']
        names = [one['properties']['name'].get('const') for one in options if 'properties' in one]
        assert names == [*part_names(key), None], key
    (normal,) = [
        one
        for one in flow['properties']['time_distribution']['oneOf']
        if one.get('properties', {}).get('name', {}).get('const') == 'logit_normal'
    ]
    assert {'mean', 'std'} <= set(normal['properties']) and normal['additionalProperties'] is False


def test_composers_average_is_refused_where_it_is_wrong(base):
    with pytest.raises(ConfigError, match=r'algorithms\.composer_ema: .*take algorithms\.ema'):
        load_config(base, ['algorithms={composer_ema: {half_life: 10ba}}', 'parallelism_config={fsdp: {}}'])
    load_config(base, ['algorithms={composer_ema: {half_life: 10ba}}'])


def test_the_digits_measure_needs_the_digits(base):
    latents = 'data={name: latents, local: somewhere}'
    with pytest.raises(ConfigError, match=r'callbacks\.digits_quality: measures the ten digits'):
        load_config(base, [latents, 'callbacks={digits_quality: {weights: raw}}'])


def test_another_name_on_the_command_line_starts_the_section_afresh(base):
    config = load_config(base, ['optimizer.name=sgd', 'optimizer.lr=0.5'])
    assert config.to_dict()['optimizer'] == {'name': 'sgd', 'lr': 0.5}
    with pytest.raises(ConfigError, match=r'optimizer\.lr: is missing'):
        load_config(base, ['optimizer.name=sgd'])
    same = load_config(base, [f'optimizer.name={load_config(base).optimizer.name}'])
    assert same == load_config(base)
