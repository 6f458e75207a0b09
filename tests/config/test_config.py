"""What a configuration becomes: objects, defaults, keywords of the Trainer, a schema for editors; files and machine."""

import inspect
import re

import composer
import pytest
import torch
from composer.trainer import _patch_pytorch

from tests.runs import YAMLS
from tread_composer.config import ConfigError, check_files, check_machine, json_schema, load_config, part_names
from tread_composer.config.trainer_settings import BUILT_BY_US, TrainerSettings, fsdp_section
from tread_composer.config.tree import backbone_arguments
from tread_composer.data.manifest import LatentFacts
from tread_composer.objectives import CosMap, FlowMatching, LogitNormal, MinSNR, Mode, Uniform
from tread_composer.routing import Route

FLOW = 'objective={name: flow_matching, time_distribution: '
HSDP = {'data_parallel_replicate_degree': 2, 'data_parallel_shard_degree': 4, 'activation_checkpointing': True}
has_gpu = torch.cuda.is_available()


@pytest.mark.parametrize(
    ('override', 'objective'),
    [
        (FLOW + '{name: uniform}}', FlowMatching(Uniform())),
        (FLOW + '{name: logit_normal, mean: -1.2, std: 1.2}}', FlowMatching(LogitNormal(-1.2, 1.2))),
        (FLOW + '{name: mode, scale: 0.8}}', FlowMatching(Mode(0.8))),
        (FLOW + '{name: mode}}', FlowMatching(Mode(1.29))),
        (FLOW + '{name: cosmap}, time_shift: 3.0}', FlowMatching(CosMap(), time_shift=3.0)),
        ('objective.sampling_shift=0.5', FlowMatching(sampling_shift=0.5)),
        ('objective.weighting={name: min_snr}', FlowMatching(weighting=MinSNR(5.0))),
        ('objective.weighting={name: min_snr, gamma: 2.0}', FlowMatching(weighting=MinSNR(2.0))),
        ('objective={direction_weight: 1, direction_patch: 2}', FlowMatching(direction_weight=1.0, direction_patch=2)),
    ],
)
def test_a_setting_builds_its_class_and_survives_the_resolved_file(base, write, override, objective):
    config = load_config(base, [override])
    assert config.objective.instance == objective
    assert load_config(write('again.yaml', config.to_yaml())) == config


def facts(mean: tuple[float, ...], std: tuple[float, ...]) -> LatentFacts:
    shape = {'channels': len(mean), 'latent_height': 4, 'latent_width': 4, 'num_classes': 0, 'class_names': ()}
    return LatentFacts(mean=mean, std=std, autoencoder=None, **shape)


@pytest.mark.parametrize(
    ('words', 'strength'),
    [(['latent_normalization={std: 0.7}', 'latent_scale=1.0', 'latent_shift=0.0'], 0.7), (['latent_scale=auto'], 1.0)],
)
def test_normalization_becomes_numbers(base, write, words, strength):
    config = load_config(base, words)
    assert load_config(write('again.yaml', config.to_yaml())) == config and config.scaled_by_data
    resolved = config.normalized(facts((-1.25, 4.0), (3.0, 0.5)))
    assert resolved.latent_scale == pytest.approx([strength / 3, strength / 0.5], rel=1e-5)
    assert resolved.latent_shift == [-1.25, 4.0]
    assert 'latent_normalization' not in resolved.to_dict()
    assert load_config(write('resolved.yaml', resolved.to_yaml())).to_dict() == resolved.to_dict()
    assert resolved.normalized(facts((9.0, 9.0), (9.0, 9.0))) is resolved
    # The last bits of statistics differ between machines; the runs must not.
    assert config.normalized(facts((-1.25 * (1 + 1e-12), 4.0), (3.0 * (1 + 1e-12), 0.5))) == resolved


def test_several_routes(base):
    base.write_text(base.read_text().replace('{start: 2, end: -4, selection_rate: 0.5}', '{}'))
    config = load_config(base, ['algorithms.tread={routes: [{start: 1, end: 2}, {start: 3}]}'])
    assert config.algorithms['tread'].build().routes == (Route(1, 2), Route(3, -4))


def test_a_preset_gives_the_sizes_and_the_section_the_rest():
    model = load_config(YAMLS / 'mamba2_dit_b.yaml', ['model.scan=alternate']).model
    sizes = {'patch_size': 2, 'hidden_size': 768, 'depth': 12}
    mixer = {'expand': 2, 'head_size': 64, 'state_size': 64, 'chunk_size': 256, 'kernel': 'torch'}
    assert backbone_arguments(model) == {**sizes, **mixer, 'mlp_ratio': 3.0, 'scan': 'alternate', 'learn_sigma': False}


def test_ddpm_its_channels_its_samplers_and_its_steps(base):
    ddpm = ['objective={name: ddpm}', 'model.learn_sigma=true', 'callbacks.sample_grid.weights=raw']
    for sampler in ('ddpm', 'ddim', 'euler', 'heun'):
        load_config(base, [*ddpm, f'callbacks.sample_grid.sampler={sampler}', 'callbacks.sample_grid.num_steps=1000'])
    plain = load_config(base, ['objective={name: ddpm, learned_variance: false}'])
    assert not plain.model.kwargs['learn_sigma']


def test_defaults(base):
    config = load_config(base)
    assert (config.seed, config.autoresume, config.save_overwrite, config.compile) == (17, False, False, False)
    assert (config.eval_interval, config.scheduler.name) == ('1ep', 'constant')
    assert load_config(base, ['save_folder=runs/x']).autoresume is True
    assert load_config(base, ['save_folder=runs/x', 'autoresume=false']).autoresume is False


def test_every_keyword_of_the_trainer_is_a_setting_or_has_a_reason(base):
    keywords = set(inspect.signature(composer.Trainer).parameters)
    assert keywords == (set(TrainerSettings.model_fields) | set(BUILT_BY_US)) & keywords
    assert not set(TrainerSettings.model_fields) & set(BUILT_BY_US)
    arguments = load_config(base).trainer_arguments()
    assert set(arguments) <= keywords
    assert (arguments['max_duration'], arguments['run_name']) == ('10ba', 'small')
    # Sharding, replicas and recomputing reach Composer as they were written.
    words = ', '.join(f'{name}: {str(value).lower()}' for name, value in HSDP.items())
    config = load_config(base, [f'parallelism_config={{fsdp: {{{words}}}}}'], world_size=8)
    assert config.trainer_arguments()['parallelism_config'] == {'fsdp': HSDP}


def test_fsdp2_has_settings_of_its_own():
    second, first = fsdp_section('2'), fsdp_section('1')
    assert second(activation_checkpointing=True, state_dict_type='full').reshard_after_forward is True
    assert 'replicas of shards (HSDP) are a setting of FSDP1' in second.refused['data_parallel_replicate_degree']
    assert 'is a setting of FSDP1' in second.refused['sharding_strategy']
    assert not set(second.refused) & set(second.model_fields) and not set(first.refused) & set(first.model_fields)


def test_auto_microbatch_is_refused_where_composer_has_no_search(base, message):
    able = hasattr(_patch_pytorch, 'unshard_with_sync')
    overrides = ['parallelism_config={fsdp: {}}', 'device_train_microbatch_size=auto']
    try:
        load_config(base, overrides)
        text = ''
    except ConfigError as error:
        text = str(error)
    assert has_gpu or 'this machine has no GPU' in text
    rule = f'device_train_microbatch_size: .*torch 2.6 to 2.7.0 only, and this is torch {re.escape(torch.__version__)}'
    assert (re.search(rule, text) is None) == able
    if not able:  # what would happen without the rule
        with pytest.raises(NameError, match='unshard_with_sync'):
            _patch_pytorch.patch_unshard_for_automicrobatching()


def test_check_files(base, tmp_path):
    folder = tmp_path / 'latents'
    config = load_config(base, [f'data={{name: latents, local: {folder}}}'])
    for split in ('train', 'val'):
        (folder / split).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r'holds no index\.json'):
        check_files(config)
    for split in ('train', 'val'):
        (folder / split / 'index.json').write_text('{}')
    check_files(config)
    check_files(load_config(base))


@pytest.mark.parametrize(
    ('overrides', 'fault'),
    [
        (['precision=fp32', 'device=cpu'], None),
        (['precision=amp_bf16', 'device=gpu'], None if has_gpu else 'no CUDA device'),
        (['parallelism_config={fsdp: {}}', 'device=cpu'], 'FSDP1 needs a GPU in Composer; on the CPU set FSDP'),
        (['parallelism_config={fsdp: {}}', 'device=gpu'], None if has_gpu else 'no CUDA device'),
    ],
)
def test_check_machine(overrides, fault):
    config = load_config(YAMLS / 'digits.yaml', overrides)
    if fault is None:
        check_machine(config)
        return
    with pytest.raises(ConfigError, match=re.escape(fault)):
        check_machine(config)


def test_json_schema_knows_components_keywords_and_the_parts_of_an_objective():
    properties = json_schema()['properties']
    tread = properties['algorithms']['properties']['tread']['anyOf'][0]
    assert set(tread['properties']) >= {'start', 'end', 'selection_rate', 'routes'}
    assert tread['additionalProperties'] is False
    assert {'extends', 'max_duration', 'model'} <= set(properties)
    # Parts of other packages: what their arguments are is not looked up for an editor.
    assert properties['optimizer']['oneOf'][-1]['properties']['name']['pattern'] == ':'
    assert properties['algorithms']['additionalProperties']['required'] == ['name']

    def options(section: dict) -> dict:
        return {each.get('properties', {}).get('name', {}).get('const'): each for each in section['oneOf']}

    assert {'adamw', None} <= options(properties['optimizer']).keys()
    assert {'digits', 'latents'} <= options(properties['data']).keys()
    flow = options(properties['objective'])['flow_matching']['properties']
    for key in ('time_distribution', 'weighting'):
        assert options(flow[key]).keys() == {*part_names(key), None}, key
    normal = options(flow['time_distribution'])['logit_normal']
    assert {'mean', 'std'} <= set(normal['properties']) and normal['additionalProperties'] is False
