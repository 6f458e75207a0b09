"""``MaskDiT`` through a real ``Trainer``; its network and loss are in ``test_maskdit_loss.py``."""

import math

import pytest
import torch
from composer.loggers import InMemoryLogger
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tests.algorithms.masked import SMALL, edm_model, fit, run
from tests.helpers import Lengths, Recorder, assert_equal_weights, loader, make_trainer, tiny_dit, trainer_of, weights
from tests.runs import YAMLS
from tread_composer.algorithms.maskdit import MaskDiT, MaskedEDM
from tread_composer.builders.model import build_model
from tread_composer.builders.run_data import planned_manifest
from tread_composer.builders.trainer import build_trainer
from tread_composer.config import load_config
from tread_composer.core.batch import UNMASKED_TOKENS
from tread_composer.core.errors import ResumeError, UserError
from tread_composer.objectives import EDM, FlowMatching
from tread_composer.run.plan import make_plan


@pytest.mark.parametrize(
    ('settings', 'ratios'),
    [
        ({}, [0.5] * 6),
        ({'mask_ratio': 0.3}, [0.3] * 6),  # int(16 * 0.7) = 11
        ({'unmask_time': '0.5dur'}, [0.5] * 3 + [0] * 3),
        ({'unmask_time': '1ep'}, [0.5] * 3 + [0] * 3),
        ({'unmask_time': '0dur', 'unmask': 'cosine4'}, [0.5 * math.cos(math.pi * b / 12) ** 4 for b in range(6)]),
        (
            {'unmask_time': '0.5dur', 'unmask': 'cosine2'},
            [0.5] * 3 + [0.5 * math.cos(math.pi * b / 6) ** 2 for b in range(3)],
        ),
    ],
)
def test_what_is_logged_and_what_the_encoder_sees(settings, ratios):
    logger, model = InMemoryLogger(), edm_model()
    trainer = make_trainer(model, [MaskDiT(**SMALL, **settings)], loggers=[logger])
    first, last = model.denoiser.blocks[0], model.denoiser.blocks[5]
    encoder, decoder = Lengths([first, last]), Lengths([model.denoiser.final_layer.blocks[0]])
    trainer.fit()
    kept = [int(16 * (1 - ratio)) for ratio in ratios]
    assert encoder.seen == [count for count in kept for _ in range(2)] and decoder.seen == [16] * 6
    assert [value for _, value in logger.data['maskdit/mask_ratio']] == pytest.approx(ratios)
    assert [value for _, value in logger.data['maskdit/kept_tokens']] == kept
    total, dsm = ([float(v) for _, v in logger.data[f'loss/train/{name}']] for name in ('total', 'dsm'))
    mae = [float(v) for _, v in logger.data['loss/train/mae']]
    masked = [batch for batch, count in enumerate(kept) if count < 16]
    assert len(mae) == len(masked)
    for batch, value in zip(masked, mae, strict=True):
        assert total[batch] == pytest.approx(dsm[batch] + 0.1 * value)


def test_ratio_zero_is_the_plain_encoder_decoder_bit_for_bit():
    zero = run(MaskDiT(0.0, **SMALL))
    model = edm_model()
    masked = MaskDiT(**SMALL)
    masked.prepare(model, seed=17)
    model.objective = EDM()
    plain = run(model=model)  # a Trainer that knows nothing of MaskDiT
    assert zero[0] == plain[0] and len(zero[0]) == 6
    assert_equal_weights(zero[1], plain[1])
    assert run(MaskDiT(0.5, **SMALL))[0] != zero[0]


class Masks(Recorder):
    def before_train_batch(self, state, logger):
        super().before_train_batch(state, logger)
        self.batches[-1]['kept'] = state.batch[UNMASKED_TOKENS].tolist()


def test_draws_do_not_depend_on_the_microbatch_size_and_noise_is_that_of_the_dense_run():
    results = []
    for size in (8, 4, 2):
        recorder = Masks()
        make_trainer(edm_model(), [MaskDiT(**SMALL)], [recorder], device_train_microbatch_size=size).fit()
        results.append(recorder)
    for other in results[1:]:
        assert other.batches == results[0].batches
        assert [float.fromhex(x) for x in other.losses] == pytest.approx(
            [float.fromhex(x) for x in results[0].losses], rel=1e-5
        )
    rows = [tuple(row) for batch in results[0].batches for row in batch.pop('kept')]
    assert len(set(rows)) == len(rows) == 48 and all(list(row) == sorted(row) and len(row) == 8 for row in rows)
    assert results[0].batches == run()[2]  # a dense run of the same seed


def test_losses_do_not_depend_on_activation_checkpointing():
    model = edm_model()
    for index, block in enumerate(model.denoiser.blocks):
        model.denoiser.blocks[index] = checkpoint_wrapper(block)
    assert run(MaskDiT(**SMALL), model=model)[0] == run(MaskDiT(**SMALL))[0]


def test_evaluation_and_sampling_mask_nothing():
    trainer, _ = fit(MaskDiT(**SMALL), eval_dataloader=loader(shuffle=False), eval_interval='2ba')
    assert trainer.state.eval_metrics['eval']['loss'].compute() > 0
    model = trainer.state.model
    log = Lengths([model.denoiser.blocks[0], model.denoiser.final_layer.blocks[1]])
    assert model.sample([0, 3], [1, 2], num_steps=2).isfinite().all()
    assert log.seen == [16, 16] * 3


def test_graphs_stay_few_while_the_ratio_falls():
    def losses(**settings):
        masking = MaskDiT(unmask_time='0dur', unmask='cosine4', **SMALL)
        return [float.fromhex(x) for x in run(masking, model=edm_model(depth=2), max_duration='8ba', **settings)[0]]

    torch._dynamo.reset()
    counter = CompileCounter()  # fullgraph turns any break into an error
    compiled = losses(compile_config={'backend': counter, 'fullgraph': True})
    assert counter.frame_count == 2  # the first length, then any length
    assert compiled == pytest.approx(losses(), rel=1e-5)


def test_the_optimizer_takes_the_decoder_in_place_of_the_head():
    model = edm_model()
    trainer = make_trainer(model, [MaskDiT(**SMALL)])
    (group,) = trainer.state.optimizers[0].param_groups
    trained = {id(p) for p in group['params']}
    assert trained == {id(p) for p in model.parameters()} - {id(model.denoiser.final_layer.positions)}
    assert len(group['params']) == len(trained)
    before = weights(trainer)
    trainer.fit()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}
    assert {'denoiser.final_layer.mask_token', 'denoiser.final_layer.bridge.linear.weight'} <= changed
    assert 'denoiser.final_layer.positions' not in changed


def test_keys_of_the_encoder_are_those_of_dit():
    model = edm_model()
    MaskDiT(**SMALL).prepare(model)
    ours, plain = model.denoiser.state_dict(), tiny_dit().state_dict()
    assert [k for k in ours if 'final_layer' not in k] == [k for k in plain if 'final_layer' not in k]
    parts = {key.split('.')[1] for key in ours if key.startswith('final_layer')}
    assert parts == {'bridge', 'mask_token', 'positions', 'blocks', 'head'}


def trainer_with(optimizer_groups, model):
    optimizer = torch.optim.AdamW(optimizer_groups(model), lr=1e-2)
    return trainer_of(model, None, [MaskDiT(**SMALL)], optimizers=optimizer, max_duration='1ba')


def by_dimension(model):
    parameters = list(model.parameters())
    return [{'params': [p for p in parameters if (p.dim() > 1) == wide]} for wide in (True, False)]


def test_parameter_groups():
    with pytest.raises(UserError, match=r'same parameter group.* Call MaskDiT\(\.\.\.\)\.prepare\(model\) first'):
        trainer_with(by_dimension, edm_model())
    model = edm_model()
    MaskDiT(**SMALL).prepare(model, seed=0)
    trainer_with(by_dimension, model)
    with pytest.raises(UserError, match='does not train the head'):
        trainer_with(lambda model: model.denoiser.blocks.parameters(), edm_model())


def foreign_model():
    model = edm_model()
    model.denoiser = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ('make', 'settings', 'message'),
    [
        (foreign_model, {}, r'the encoder must be a tread_composer\.models\.DiT .*here is a Linear'),
        (lambda: edm_model(FlowMatching()), {}, "objective edm alone .* objective.name is 'flow_matching'"),
        (edm_model, {'decoder_num_heads': 3}, 'decoder_hidden_size: 8 must divide'),
        (edm_model, {'decoder_depth': 0}, 'decoder_depth: 0 must be at least 1'),
        (edm_model, {'mask_ratio': 0.99}, 'leaves none to the encoder'),
    ],
)
def test_a_model_that_does_not_fit_is_refused_by_the_trainer(make, settings, message):
    with pytest.raises(UserError, match=f'algorithms.maskdit: .*{message}'):
        make_trainer(make(), [MaskDiT(**{**SMALL, **settings})])


def test_checkpoints_of_other_settings_are_refused_in_words_and_their_weights_may_be_tuned(tmp_path):
    fit(MaskDiT(**SMALL), save_folder=str(tmp_path), max_duration='1ba', save_interval='1ba')
    path = str(tmp_path / 'latest-rank0.pt')
    with pytest.raises(ResumeError, match=r'mask_ratio: saved 0\.5, now 0\.25'):
        make_trainer(edm_model(), [MaskDiT(0.25, **SMALL)], load_path=path)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\).*denoiser\.final_layer\.mask_token'):
        make_trainer(edm_model(), [], load_path=path, load_weights_only=True)
    tuned = make_trainer(edm_model(), [MaskDiT(0.0, **SMALL)], load_path=path, load_weights_only=True)
    assert_equal_weights(weights(tuned), torch.load(path, weights_only=False)['state']['model'])


def test_a_second_trainer_takes_the_decoder_that_is_there():
    model = edm_model()
    fit(MaskDiT(**SMALL), model=model, max_duration='1ba')
    fit(MaskDiT(**SMALL, mae_weight=0.5), model=model, max_duration='1ba')
    assert isinstance(model.objective, MaskedEDM) and model.objective.mae_weight == 0.5
    log = Lengths([model.denoiser.blocks[0]])
    fit(model=model, max_duration='1ba')  # without MaskDiT nothing is masked
    assert log.seen == [16]
    with pytest.raises(UserError, match='has a decoder already, of other sizes'):
        make_trainer(model, [MaskDiT(**{**SMALL, 'decoder_depth': 1})])


# methods.md section 6: GMACs in training and ideal step ratio; the published size is 730M parameters.
@pytest.mark.parametrize(('size', 'gmacs', 'ratio'), [(32, 65.4, 1.81), (64, 280.2, 1.87)])
def test_the_plan_has_the_published_cost(size, gmacs, ratio):
    plan = make_plan(load_config(YAMLS / 'dit_xl_maskdit.yaml', [f'data.latent_size={size}']), 1)
    assert plan['gmacs_routed'] == pytest.approx(gmacs, rel=1e-2)
    assert plan['ideal_step_ratio'] == pytest.approx(ratio, abs=0.005)
    assert plan['tokens_per_block'] == [(size // 2) ** 2 // 2] * 28
    assert plan['sampling']['gmacs'] == pytest.approx(1.06 * plan['gmacs_dense'], rel=1e-2)
    positions = (size // 2) ** 2 * (1152 + 512)
    assert plan['sampling']['parameters'] == plan['parameters'] + positions - 512  # without the mask token
    assert plan['parameters'] == pytest.approx(730e6, rel=1e-3)


def test_tuning_recipe_differs_as_published():
    stages = [load_config(YAMLS / f'dit_xl_maskdit{name}.yaml') for name in ('', '_tuning')]
    assert [stage.algorithms['maskdit'].kwargs['mask_ratio'] for stage in stages] == [0.5, 0.0]
    assert [stage.optimizer.kwargs['lr'] for stage in stages] == [1e-4, 5e-5]
    assert [stage.global_train_batch_size for stage in stages] == [1024, 512]
    assert stages[1].load_path == f'{stages[0].save_folder}/latest-rank0.pt' and stages[1].load_weights_only


def test_the_digits_recipe_and_its_tuning_stage_train_and_sample(tmp_path, monkeypatch):
    small = [
        'model={name: dit, patch_size: 2, hidden_size: 16, depth: 2, num_heads: 2}', 'loggers.mlflow=null',
        'callbacks.digits_quality=null', 'callbacks.sample_grid.samples_per_class=1',
        'callbacks.sample_grid.num_steps=2', 'max_duration=2ba', 'eval_interval=2ba', 'save_interval=2ba',
        'scheduler={name: constant}', 'progress_bar=false', 'algorithms.maskdit.decoder_hidden_size=8',
    ]  # fmt: skip
    configs = [load_config(YAMLS / f'digits_maskdit{name}.yaml', small) for name in ('', '_tuning')]
    monkeypatch.chdir(tmp_path)
    starts = []
    for config in configs:
        trainer = build_trainer(config)
        starts.append(weights(trainer))
        trainer.fit()
        assert (tmp_path / config.save_folder / 'samples' / 'latest.png').exists()
        trainer.close()
    path = tmp_path / configs[0].save_folder / 'latest-rank0.pt'
    assert_equal_weights(starts[1], torch.load(path, weights_only=False)['state']['model'])
    without = ['algorithms.maskdit=null', 'load_weights_only={}', f'load_path={path}']
    for only, message in (('false', r'algorithms\.maskdit: saved .*mask_ratio.*, now absent'), ('true', 'do not fit')):
        words = [*small, 'run_name=dense', *(word.format(only) for word in without)]
        with pytest.raises(UserError, match=message):
            build_trainer(load_config(YAMLS / 'digits_maskdit.yaml', words))
    rebuilt = build_model(configs[1], planned_manifest(configs[1]))
    rebuilt.load_state_dict(trainer.state.model.state_dict())
    assert torch.equal(rebuilt.sample([1], [0], num_steps=2), trainer.state.model.sample([1], [0], num_steps=2))
