"""A judge for CIFAR-10 and Tiny-ImageNet where Inception's weights are not at hand: a small convolutional classifier.

    python benchmarks/image_classifier.py data/cifar10 --out runs/convergence/cifar10/classifier.safetensors

It is trained on the training images of a data set of pixels and tried on its evaluation split; both are in the protocol
of what is measured with it. Distances in its features are no FID and compare with nothing measured otherwise. The
environment variable IMAGE_CLASSIFIER names the file for ``ClassifierFeatures``.

Legend: B images, R their side in pixels, K classes, D = 256 features.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tread_composer.core.process import prepare_process

prepare_process()  # before torch is loaded, and MLflow

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional

from tread_composer.core.errors import UserError
from tread_composer.io.files import file_hash
from tread_composer.io.progress import Progress, to_stderr
from tread_composer.io.tensors import write_tensors
from tread_composer.metrics.features import FeatureSet
from tread_composer.metrics.images import ImageSet, open_images
from tread_composer.metrics.metric import Comparison, Figure, Quantity

__all__ = ['Classifier', 'ClassifierFeatures', 'Recognised', 'train_classifier']

_SIDE = 32  # larger images are averaged down to it
_WIDTHS = (32, 64, 128, 256)
_BATCH = 128
_RECOGNISED = Quantity('recognised', 'higher', 'share of the samples')


class Classifier(nn.Module):
    """Four convolutions with batch norm, each but the first halving the side; the mean over places; a linear layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, (before, width) in enumerate(zip((3, *_WIDTHS), _WIDTHS, strict=False)):
            convolution = nn.Conv2d(before, width, 3, stride=1 if number == 0 else 2, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(_WIDTHS[-1], num_classes)

    def forward(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``[B, D]`` and logits ``[B, K]`` of uint8 images."""
        x_B3RR = images_B3RR.float() / 127.5 - 1
        if x_B3RR.shape[-1] > _SIDE:
            x_B3RR = functional.adaptive_avg_pool2d(x_B3RR, _SIDE)
        features_BD = self.layers(x_B3RR).mean((2, 3))
        return features_BD, self.head(features_BD)


class ClassifierFeatures:
    """The mean over places of the last convolution, and the classes, for ``--features`` and the callback evaluation."""

    name = 'image_classifier'
    resolution = None
    num_logits = 10  # that it has some is asked before it is opened; the file says how many

    def __init__(self, device: str | torch.device = 'cpu') -> None:
        path = Path(os.environ.get('IMAGE_CLASSIFIER', ''))
        if not path.is_file():
            raise UserError(f'IMAGE_CLASSIFIER: {str(path)!r} is no file; benchmarks/image_classifier.py makes one')
        with safe_open(path, 'pt') as file:
            self._facts = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.num_logits = int(self._facts['num_classes'])
        self._network, self._device = Classifier(self.num_logits), torch.device(device)
        self._network.load_state_dict(tensors)
        self._network.to(device).eval()
        self._hash = file_hash(path)

    def identity(self) -> dict[str, str]:
        """See ``Extractor``."""
        version = '{accuracy} of {images} held-out images recognised'.format(**self._facts)
        return {'name': self.name, 'weights_hash': self._hash, 'version': version}

    @torch.inference_mode()
    def __call__(self, images_B3RR: Tensor) -> tuple[Tensor, Tensor]:
        """See ``Extractor``."""
        return self._network(images_B3RR.to(self._device))


class Recognised:
    """Share of the images in which the classifier sees the class that they were drawn for."""

    name = 'recognised'
    quantities = (_RECOGNISED,)
    needs_logits = True
    needs_labels = True
    compares_with = 'nothing'

    def measure(self, samples: FeatureSet, reference: Comparison, device: torch.device) -> list[Figure]:
        """See ``Metric``."""
        if samples.logits_NK is None or samples.labels_N is None:
            raise UserError('metrics: recognised needs the label of each image, and not all of them have one')
        return [Figure(_RECOGNISED, float((samples.logits_NK.argmax(1) == samples.labels_N).double().mean()))]


def train_classifier(data: Path, out: Path, epochs: int = 8, seed: int = 0) -> None:
    """Train on ``data/train``, try on ``data/val`` and write the weights with the accuracy.

    Args:
        data: Folder of a data set of pixels.
        out: Safetensors file.
        epochs: Passes over the training images, half of them mirrored.
        seed: Of the weights, the order and the mirrors.

    Raises:
        UserError: The data are no pixels, or have no labels.
    """
    splits = {split: _tensors(open_images(data / split)) for split in ('train', 'val')}
    images_N3RR, labels_N = splits['train']
    num_classes = int(labels_N.max()) + 1
    torch.manual_seed(seed)
    network, draw = Classifier(num_classes), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=5e-2)
    steps = epochs * (len(labels_N) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    progress = Progress('classifier', steps, 'batches', log=to_stderr)
    for _ in range(epochs):
        order = torch.randperm(len(labels_N), generator=draw)[: steps // epochs * _BATCH]
        for chosen in order.split(_BATCH):
            images_B3RR, mirrored_B = images_N3RR[chosen], torch.rand(len(chosen), generator=draw) < 0.5
            images_B3RR[mirrored_B] = images_B3RR[mirrored_B].flip(3)
            loss = functional.cross_entropy(network(images_B3RR)[1], labels_N[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.add(1)
    accuracy = _accuracy(network.eval(), *splits['val'])
    facts: dict[str, Any] = {'num_classes': num_classes, 'accuracy': f'{accuracy:.1%}', 'images': len(splits['val'][1])}
    write_tensors(out, network.state_dict(), {name: str(value) for name, value in facts.items()})
    to_stderr(f'{out}: recognises {accuracy:.1%} of {len(splits["val"][1]):,} images of val')


def _tensors(images: ImageSet) -> tuple[Tensor, Tensor]:
    labels = images.labels()
    if labels is None:
        raise UserError(f'{images.path}: has no labels, and a classifier needs them')
    return torch.cat([*images.batches(1024)]), torch.tensor(labels)


@torch.inference_mode()
def _accuracy(network: nn.Module, images_N3RR: Tensor, labels_N: Tensor) -> float:
    logits_NK = torch.cat([network(batch)[1] for batch in images_N3RR.split(1024)])
    return float((logits_NK.argmax(1) == labels_N).double().mean())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('data', type=Path)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--epochs', type=int, default=8)
    parser.add_argument('--seed', type=int, default=0)
    options = parser.parse_args()
    try:
        train_classifier(options.data, options.out, options.epochs, options.seed)
    except UserError as error:
        sys.exit(str(error))
