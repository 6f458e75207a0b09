"""Every algorithm of ours and what it is tried beside: how each is built, what becomes of a pair; and runs of them.

``test_contract.py`` puts all of them through the same promises. A new algorithm of ours is one more entry of ``OURS``.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import composer.algorithms as theirs
import torch
from composer import Evaluator, Trainer
from composer.core import Algorithm, Precision
from composer.models import ComposerClassifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tests.helpers import Recorder, loader, make_trainer, tiny_dit, trainer_of
from tread_composer.algorithms.direction_schedule import DirectionSchedule
from tread_composer.algorithms.ema import EMA
from tread_composer.algorithms.maskdit import MaskDiT
from tread_composer.algorithms.power_ema import PowerEMA
from tread_composer.algorithms.tread import Route, Tread
from tread_composer.latent_diffusion import LatentDiffusion
from tread_composer.objectives import EDM, FlowMatching

NUM_TOKENS, DEPTH = 16, 4
BATCHES, PER_EPOCH = 6, 4


@dataclass(frozen=True)
class Entry:
    """An algorithm on trial."""

    make: Callable[[], Algorithm]
    yaml: str  # the same as an entry under `algorithms:`
    objective: str = ''  # the only one that it works with; any if empty
    names: tuple[type, ...] = ()  # what its `repr` names
    tokens: tuple[int, ...] = (NUM_TOKENS,) * DEPTH  # what each block sees while training
    dense_from: int | None = None  # the batch from which on that is all tokens
    observes: bool = False  # it changes nothing of training: the losses are those of the run without it
    required_on_load: bool = False
    gone: str = ''  # how a checkpoint made with it is refused to a run without it; empty if that may go on
    new: str = ''  # how a checkpoint made without it is refused to a run with it; empty if that may go on
    refused: str = ''  # why it stands beside none of ours, in a Trainer written by hand
    unsaved: str = ''  # why no run with it may save
    unresumed: str = ''  # why no run with it may be resumed
    unfit: str = ''  # why the loader of YAML files refuses it in a run as `digits.yaml` has it
    remedy: str = ''  # what to change so that it does not; none if empty


SMALL_DECODER = {'decoder_depth': 1, 'decoder_hidden_size': 8, 'decoder_num_heads': 2}

OURS: dict[str, Entry] = {
    'tread': Entry(
        lambda: Tread(1, -2, 0.5),
        'tread: {start: 1, end: -2, selection_rate: 0.5}',
        names=(Tread, Route),
        tokens=(16, 8, 8, 16),
        new='was trained without Tread up to 2',
    ),
    'tread, two routes': Entry(
        lambda: Tread(routes=[Route(0, 0, 0.25), Route(2, 2, 0.75)], end_time='5ba'),
        'tread: {routes: [{start: 0, end: 0, selection_rate: 0.25}, {start: 2, end: 2, selection_rate: 0.75}]}',
        names=(Tread, Route),
        tokens=(12, 16, 4, 16),
        dense_from=5,
        new='was trained without Tread up to 2',
    ),
    'maskdit': Entry(
        lambda: MaskDiT(0.5, unmask_time='5ba', **SMALL_DECODER),
        'maskdit: {mask_ratio: 0.5}',
        objective='edm',
        names=(MaskDiT,),
        tokens=(8, 8, 8, 8),
        dense_from=5,
        required_on_load=True,
        # Composer looks for the head's moments: a KeyError of torch 2.7, words of torch's own in later releases.
        gone=r'denoiser\.final_layer\.',
        new=r'mask_token is missing\): they were trained without MaskDiT',
    ),
    'direction_schedule': Entry(
        lambda: DirectionSchedule(start_time='1ba', end_time='0.5dur'),
        'direction_schedule: {end_time: 0.5dur}',
        objective='direction',
        names=(DirectionSchedule,),
        new='was trained without DirectionSchedule up to 2',
    ),
    'ema': Entry(lambda: EMA(0.7, '2ba'), 'ema: {decay: 0.7, update_interval: 2ba}', names=(EMA,), observes=True),
    'power_ema': Entry(
        lambda: PowerEMA((0.1, 0.2), '2ba'),
        'power_ema: {widths: [0.1, 0.2], interval: 2ba}',
        names=(PowerEMA,),
        observes=True,
        new='was trained without PowerEMA up to 2',
    ),
}


class LowPrecisionNorms(theirs.LowPrecisionLayerNorm):
    """The surgery of ``LowPrecisionLayerNorm``, which Composer leaves out in float32, the CPU's only precision."""

    def apply(self, event, state, logger):
        theirs.low_precision_layernorm.apply_low_precision_layernorm(
            state.model, optimizers=state.optimizers, precision=Precision.AMP_BF16
        )
        norms = [part for part in state.model.modules() if isinstance(part, nn.LayerNorm)]
        assert norms and {type(norm).__name__ for norm in norms} == {'LPLayerNorm'}


THEIRS: dict[str, Entry] = {
    'composer_ema': Entry(lambda: theirs.EMA(half_life='2ba'), 'composer_ema: {half_life: 2ba}'),
    'composer_ema by epochs': Entry(
        lambda: theirs.EMA(half_life='1ep'),
        'composer_ema: {half_life: 1ep}',
        unsaved='leaves its average in the model',
        unfit='leaves its average in the model',
        remedy='save_folder=null',
    ),
    'gradient_clipping': Entry(
        lambda: theirs.GradientClipping('norm', 0.05),
        'gradient_clipping: {clipping_type: norm, clipping_threshold: 0.05}',
    ),
    'gradient_clipping, adaptive': Entry(
        lambda: theirs.GradientClipping('adaptive', 0.01),
        'gradient_clipping: {clipping_type: adaptive, clipping_threshold: 0.01}',
        unfit='would stay zero',
    ),
    'low_precision_layer_norm': Entry(
        theirs.LowPrecisionLayerNorm,
        'low_precision_layer_norm: {}',
        unfit="does nothing in precision 'fp32'",
        remedy='precision=amp_bf16',
    ),
    'low_precision_layer_norm, surgery': Entry(LowPrecisionNorms, ''),
    'sam': Entry(
        lambda: theirs.SAM(rho=0.1),
        'sam: {rho: 0.1}',
        unresumed='hold nothing of the optimizer that SAM',
        unfit='hold nothing of the optimizer that SAM',
        remedy='autoresume=false',
    ),
    'layer_freezing': Entry(
        lambda: theirs.LayerFreezing(0.0, 0.7),
        'layer_freezing: {freeze_start: 0.0, freeze_level: 0.7}',
        unsaved='looks for the moments of weights',
        unfit='looks for the moments of weights',
        remedy='save_folder=null',
    ),
    'stochastic_depth': Entry(
        lambda: theirs.StochasticDepth('ResNetBottleneck'),
        'stochastic_depth: {target_layer_name: ResNetBottleneck}',
        refused="torchvision's ResNet alone",
    ),
    'progressive_resizing': Entry(
        lambda: theirs.ProgressiveResizing(input_key='raw_latents', target_key='labels'),
        'progressive_resizing: {input_key: raw_latents, target_key: labels}',
        refused='interpolates the latents',
    ),
}

ALL = OURS | THEIRS
PAIRS = [(name,) for name in OURS] + [
    pair
    for pair in itertools.chain(itertools.combinations(OURS, 2), itertools.product(OURS, THEIRS))
    if pair != ('tread', 'tread, two routes')  # one class: a YAML has one `tread`
]
_NOT_TOGETHER = {
    frozenset({'tread', 'maskdit'}): 'both take tokens out of the same blocks',
    frozenset({'tread, two routes', 'maskdit'}): 'both take tokens out of the same blocks',
    frozenset({'maskdit', 'direction_schedule'}): 'has none; take flow_matching',
    frozenset({'maskdit', 'gradient_clipping, adaptive'}): 'would stay zero',
    frozenset({'ema', 'composer_ema'}): "Composer's EMA exchanges the weights",
    frozenset({'ema', 'composer_ema by epochs'}): "Composer's EMA exchanges the weights",
}


def refusal(pair: tuple[str, ...]) -> str:
    """How a run with these two is refused from the start, anywhere; empty if it is not."""
    return _NOT_TOGETHER.get(frozenset(pair), '') or ''.join(ALL[name].refused for name in pair)


def built(pair: tuple[str, ...]) -> list[Algorithm]:
    return [ALL[name].make() for name in pair]


def objective(pair: tuple[str, ...]) -> str:
    """The one that the first of them asks for that asks for any."""
    return next((ALL[name].objective for name in pair if ALL[name].objective), 'flow_matching')


def model(kind: str = 'flow_matching') -> LatentDiffusion:
    """16 tokens, 4 blocks, 8 wide."""
    kinds = {
        'flow_matching': FlowMatching(),
        'direction': FlowMatching(direction_weight=1.0, direction_patch=2),
        'edm': EDM(),
    }
    denoiser = tiny_dit(depth=DEPTH, hidden_size=8)
    return LatentDiffusion(denoiser, kinds[kind], latent_shape=(1, 8, 8), num_classes=10)


class Patches(nn.Module):
    """Somebody else's network: images of any size, no positions, nothing declared."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True) for _ in range(DEPTH)
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = self.embed(x_BCHW).flatten(2).mT
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def classifier() -> ComposerClassifier:
    """Its batches are tuples of images and labels."""
    return ComposerClassifier(Patches(), num_classes=10)


class Seen:
    """Tokens that each block gets, by forward hooks: one row for each pass, training and evaluation apart."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        self.training: list[list[int]] = []
        self.evaluation: list[list[int]] = []
        for index in range(len(blocks)):
            blocks[index].register_forward_pre_hook(lambda block, args, k=index: self._note(block, args[0], k))

    def _note(self, block: nn.Module, x: torch.Tensor, index: int) -> None:
        rows = self.training if block.training else self.evaluation
        if index == 0:
            rows.append([])
        rows[-1].append(x.shape[1])


@dataclass
class Run:
    """What a training run shows."""

    trainer: Trainer
    recorder: Recorder
    seen: Seen
    before: dict[str, torch.Tensor]
    metrics: dict[str, Any] = field(default_factory=dict)


def prepared(algorithms, kind='flow_matching', folder=None, **keywords) -> Run:
    """A Trainer of six batches, four to an epoch; saves every two batches where it has a folder."""
    saving = {} if folder is None else {'save_folder': str(folder), 'save_interval': '2ba'}
    here, recorder = model(kind), Recorder()
    seen = Seen(here.denoiser.blocks)
    evaluator = Evaluator(label='eval', dataloader=loader(8, shuffle=False))
    trainer = make_trainer(
        here,
        algorithms,
        callbacks=[recorder],
        data=lambda: loader(4 * PER_EPOCH, 4),
        eval_dataloader=evaluator,
        **{'max_duration': f'{BATCHES}ba', 'eval_interval': '3ba', **saving, **keywords},
    )
    return Run(trainer, recorder, seen, {name: value.clone() for name, value in here.state_dict().items()})


def train(algorithms, kind='flow_matching', folder=None, **keywords) -> Run:
    run = prepared(algorithms, kind, folder, **keywords)
    run.trainer.fit()
    run.metrics = {name: one.compute().item() for name, one in run.trainer.state.eval_metrics['eval'].items()}
    return run


def foreign(*algorithms, **keywords) -> Trainer:
    """A classifier of 16 images, four to a batch."""
    generator = torch.Generator().manual_seed(5)
    data = [(torch.randn(1, 8, 8, generator=generator), k % 10) for k in range(16)]
    evaluated = DataLoader(data, batch_size=8)
    settings = {'max_duration': f'{BATCHES}ba', 'seed': 3, 'eval_dataloader': evaluated, **keywords}
    return trainer_of(classifier(), DataLoader(data, batch_size=4, shuffle=True), algorithms, **settings)


def same(one: Any, other: Any, path: str = '') -> list[str]:
    """Where two trees differ in any bit. ``repr`` of Composer's algorithms may hold an address: not compared."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [row for key in one if key != 'repr' for row in same(one[key], other[key], f'{path}.{key}')]
    if isinstance(one, (list, tuple)):
        return [row for k, pair in enumerate(zip(one, other, strict=True)) for row in same(*pair, f'{path}.{k}')]
    return [] if (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other) else [path]


def saved(folder, batch=BATCHES) -> dict[str, Any]:
    """Weights, optimizer and algorithms of a checkpoint."""
    (path,) = folder.glob(f'ep*-ba{batch}-rank0.pt')
    state = torch.load(path, weights_only=False)['state']
    state['algorithms'] = dict(state['algorithms'])  # in the order of the list
    return {key: state[key] for key in ('model', 'optimizers', 'algorithms')}


def expected_tokens(pair) -> list[list[int]]:
    """What the blocks see in each forward pass of the run."""
    rows = []
    for batch in range(BATCHES):
        found = [e.tokens if e.dense_from is None or batch < e.dense_from else (16,) * 4 for e in map(ALL.get, pair)]
        rows += [[min(counts) for counts in zip(*found, strict=True)]] * (2 if 'sam' in pair else 1)
    return rows
