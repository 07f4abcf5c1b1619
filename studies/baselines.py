"""What do the published Fashion-MNIST models reach, trained as they were published?

Goal:
    Training, validation and test figures of each, beside the published ones; nothing is searched.
Scientific:
    The twelve models.
Nuisance:
    None is tuned: each is as published, and the seed varies.
Fixed:
    50 000 images to train on and 10 000 to watch, batches of 128, Adam at 1e-3 unless a schedule is
    published, padding "valid" where nothing else is said, pixels from 0 to 1, no augmentation, one
    measurement of the test set for each seed.

Where a publication is silent, which all are on batch size and most on epochs and early stopping's
patience, the choice is:

overfit-cnn         no number of epochs is published; a training accuracy of 92.46 % comes early.
regularised-cnn     dropout rates 0.25 after convolutions, 0.5 after the dense layer, which are
                    published for dropout-cnn. The optional augmentation is off.
dropout-cnn         early stopping, as regularised-cnn has it: no number of epochs is published.
basic-cnn           "a few convolutional and dense layers": two convolutions (32 and 64 filters),
                    each with max pooling, and a dense layer of 128.
advanced-cnn        "more convolutional layers, batch normalisation, dropout": 2 blocks of two
                    convolutions (32, 64), dropout 0.25 and 0.5, a dense layer of 128.
optimum-cnn         "as advanced, tuned; learning-rate schedule": a cosine, dropout 0.1 and 0.3.
mlp                 "two hidden dense layers": of 128.
shallow-cnn         "two convolutions, one dropout": as basic-cnn, with dropout 0.5 before the end.
deep-cnn            "three convolutional blocks": of one convolution each (32, 64, 128 filters) with
                    padding "same": else the third pooling would leave one position.
plateau-cnn         "dropout, batch normalisation, reduction on plateau": as batchnorm-cnn, with it.
batchnorm-cnn       "several convolutions, each with batch normalisation, max pooling and dropout":
                    three, as in deep-cnn, dropout 0.25 and 0.5.
vgg16-transfer      in studies/vgg16.py.

"Up to 50 epochs" and "early stopping" mean here: until validation loss has not fallen for 3 epochs,
and the weights of the best are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import keras
import keras_tuner

from spaces import optimizers
from spaces.cnn import CNN
from spaces.image import ImageSpace
from spaces.mlp import MLP
from spaces.vgg16 import VGG16
from studies import cnn, mlp, vgg16
from studies.study import Study

PATIENCE = 3  # epochs
MOST_EPOCHS = 50


@dataclass(frozen=True)
class Baseline:
    """One published model."""

    space: type[ImageSpace]
    point: Mapping[str, Any]
    epochs: int = MOST_EPOCHS
    stops_early: bool = True
    published: Mapping[str, float] = field(default_factory=dict)


BASELINES = {
    "overfit-cnn": Baseline(
        CNN,
        cnn.OVERFIT_CNN,
        epochs=8,
        stops_early=False,
        published={
            "train_accuracy": 0.9246,
            "train_loss": 0.1967,
            "val_accuracy": 0.8854,
            "val_loss": 0.3538,
        },
    ),
    "regularised-cnn": Baseline(
        CNN,
        cnn.REGULARISED_CNN,
        published={
            "train_accuracy": 0.8697,
            "train_loss": 0.3559,
            "val_accuracy": 0.8902,
            "val_loss": 0.2923,
        },
    ),
    "dropout-cnn": Baseline(
        CNN,
        cnn.DROPOUT_CNN,
        published={
            "test_accuracy": 0.9139,
            "test_recall": 0.9139,
            "test_precision": 0.9153,
            "test_f1": 0.9143,
            "test_roc_auc": 0.9948,
        },
    ),
    "basic-cnn": Baseline(
        CNN, cnn.BASIC_CNN, epochs=10, stops_early=False, published={"test_accuracy": 0.9120}
    ),
    "advanced-cnn": Baseline(
        CNN, cnn.ADVANCED_CNN, epochs=10, stops_early=False, published={"test_accuracy": 0.8986}
    ),
    "optimum-cnn": Baseline(
        CNN, cnn.OPTIMUM_CNN, epochs=10, stops_early=False, published={"test_accuracy": 0.9031}
    ),
    "mlp": Baseline(MLP, mlp.PUBLISHED_MLP),
    "shallow-cnn": Baseline(CNN, cnn.SHALLOW_CNN),
    "deep-cnn": Baseline(CNN, cnn.DEEP_CNN),
    "plateau-cnn": Baseline(CNN, cnn.PLATEAU_CNN),
    "batchnorm-cnn": Baseline(CNN, cnn.BATCHNORM_CNN, published={"test_accuracy": 0.9207}),
    "vgg16-transfer": Baseline(VGG16, vgg16.VGG16_TRANSFER, published={"test_accuracy": 0.9204}),
}


class Baselines(keras_tuner.HyperModel):
    """The published models, by name.

    Args:
        as of `ImageSpace`; weights as of `VGG16`.
    """

    def __init__(
        self, input_shape: tuple[int, int, int], num_classes: int, total_images: int, weights: str
    ) -> None:
        super().__init__()
        self._data = input_shape, num_classes, total_images
        self._weights = weights

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        baseline = _chosen(hp)
        return self._space(baseline).build(_hyperparameters(baseline))

    def callbacks(self, hp: keras_tuner.HyperParameters) -> list[keras.callbacks.Callback]:
        baseline = _chosen(hp)
        callbacks = self._space(baseline).callbacks(_hyperparameters(baseline))
        if baseline.stops_early:
            callbacks.append(
                keras.callbacks.EarlyStopping(
                    "val_loss", patience=PATIENCE, restore_best_weights=True
                )
            )
        return callbacks

    def epochs(self, hp: keras_tuner.HyperParameters) -> float:
        return _chosen(hp).epochs

    def is_pretrained(self, hp: keras_tuner.HyperParameters) -> bool:
        return issubclass(_chosen(hp).space, VGG16)

    def before_saving(self, model: keras.Model) -> None:
        optimizers.make_plain(model)

    def _space(self, baseline: Baseline) -> ImageSpace:
        if issubclass(baseline.space, VGG16):
            return baseline.space(*self._data, weights=self._weights)
        return baseline.space(*self._data)


def _chosen(hp: keras_tuner.HyperParameters) -> Baseline:
    return BASELINES[hp.Choice("model", list(BASELINES))]


def _hyperparameters(baseline: Baseline) -> keras_tuner.HyperParameters:
    """The baseline's point; the rest are the space's defaults."""
    hp = keras_tuner.HyperParameters()
    hp.values = dict(baseline.point)
    return hp


study = Study(
    name="baselines",
    space=Baselines,
    epochs=MOST_EPOCHS,
    images_per_report=50_000,
    average_weights=False,  # as they were published
    known_points=tuple({"model": name} for name in BASELINES),
    published=tuple(baseline.published for baseline in BASELINES.values()),
    compare=True,
    weights="imagenet",
)
