"""``Tread`` on other people's models through a real ``Trainer``, with batches that are theirs."""

import pytest
import torch
from composer import ComposerModel
from composer.loggers import InMemoryLogger
from composer.models import HuggingFaceModel
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from tests.helpers import assert_equal_weights, trainer_of, weights
from tests.routing.foreign import CASES, noise
from tests.routing.test_foreign import Counts
from tread_composer.algorithms.tread import Tread

SAMPLES = 8


class Denoiser(ComposerModel):
    """Diffusers' DiT on a batch that is a dict with keys of its own."""

    def __init__(self):
        super().__init__()
        self.transformer = CASES['diffusers_dit'].build()

    def forward(self, batch):
        names = ('hidden_states', 'timestep', 'class_labels')
        return self.transformer(**{name: batch[name] for name in names}, return_dict=False)[0]

    def loss(self, outputs, batch):
        return (outputs - batch['target']).square().mean()


def denoising(index):
    images = {'hidden_states': noise(3, 8, 8, seed=index), 'target': noise(3, 8, 8, seed=index + 50)}
    return {**images, 'timestep': torch.tensor(index), 'class_labels': torch.tensor(index % 10)}


def classifier_of_text():
    sizes = {'hidden_size': 16, 'num_hidden_layers': 4, 'num_attention_heads': 2, 'intermediate_size': 32}
    dropout = {'hidden_dropout_prob': 0.0, 'attention_probs_dropout_prob': 0.0, 'classifier_dropout': 0.0}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=5, **sizes, **dropout))
    return HuggingFaceModel(model)


def text(index):
    mask = (torch.arange(16) < 16 - index).long()  # another padding for each sample
    ids = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(index))
    return {'input_ids': ids, 'attention_mask': mask, 'labels': torch.tensor(index % 5)}


TRAINED = {
    'diffusers_dit': (Denoiser, denoising, 'transformer'),
    'hf_bert': (classifier_of_text, text, 'model.bert'),
}


def train(name, microbatch=4, algorithms=None):
    make, sample, path = TRAINED[name]
    torch.manual_seed(0)
    model, logger = make(), InMemoryLogger()
    trainer = trainer_of(
        model,
        DataLoader([sample(index) for index in range(SAMPLES)], batch_size=4),
        [Tread(1, -2, 0.5, **CASES[name].settings)] if algorithms is None else algorithms,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        loggers=[logger],
        max_duration='2ba',
        device_train_microbatch_size=microbatch,
        seed=7,
    )
    counts = Counts(model.get_submodule(path), CASES[name])
    trainer.fit()
    return trainer, counts.seen, logger


@pytest.mark.parametrize('name', TRAINED)
def test_two_batches_with_the_route_and_an_uneven_microbatch(name):
    trainer, seen, logger = train(name)
    case, depth = CASES[name], 4
    kept = case.tokens - (case.tokens - case.settings.get('always_keep', 0)) // 2
    forward = [case.tokens] + [kept] * (depth - 2) + [case.tokens]
    assert seen == forward * 2
    assert [value for _, value in logger.data['tread/kept_tokens']] == [kept, kept]
    dense, seen, _ = train(name, algorithms=[])
    assert seen == [case.tokens] * depth * 2
    assert list(weights(trainer)) == list(weights(dense))
    assert any(not torch.equal(a, b) for a, b in zip(weights(trainer).values(), weights(dense).values(), strict=True))
    if name != 'diffusers_dit':  # its labels are dropped by the global generator, once for each microbatch
        other, seen, _ = train(name, microbatch=3)
        assert seen == forward * 4
        for (key, one), two in zip(weights(trainer).items(), weights(other).values(), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6, msg=key)


def test_the_check_of_the_blocks_changes_nothing_in_training():
    settings = {**CASES['hf_bert'].settings, 'ordered': True}
    checked, _, _ = train('hf_bert')
    unchecked, _, _ = train('hf_bert', algorithms=[Tread(1, -2, 0.5, **settings)])
    assert_equal_weights(weights(checked), weights(unchecked))
