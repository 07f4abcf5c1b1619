import ast
import importlib
from pathlib import Path

import keras
import keras_tuner
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.utils import shuffle

from spaces.cnn import CNN
from studies import baselines, cnn, mlp, quickstart, resnet, vgg16, vgg16_sizes
from studies.study import Study

KNOWN = [
    pytest.param(file.study, point, id=f"{file.study.name}-{number}")
    for file in (cnn, mlp, quickstart, resnet, vgg16, vgg16_sizes)
    for number, point in enumerate(file.study.known_points)
]


def test_a_path_is_kept_as_text():
    study = Study(name="mine", space=CNN, dataset=Path("a.npz"), weights=Path("b.h5"))
    assert (study.dataset, study.weights) == ("a.npz", "b.h5")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": ""}, r"name is 1 to 64 .*Received: name=''"),
        ({"name": "../up"}, r"name is 1 to 64 .*Received: name='../up'"),
        ({"name": ".hidden"}, r"without a leading dot. Received: name='.hidden'"),
        ({"name": "x" * 65}, r"name is 1 to 64"),
        ({"space": None}, r"either a space or an objective. Received: space=None, objective=None"),
        ({"objective": max}, r"either a space or an objective. .*objective=<built-in"),
        ({"sampler": "grid"}, r"sampler is one of \('tpe', .*Received: 'grid'"),
        ({"pruner": "hyperband"}, r"pruner is one of \('asha', .*Received: 'hyperband'"),
        ({"trials": 0}, r"trials is a whole number of at least 1. Received: 0"),
        ({"images_per_report": 12.8}, r"images_per_report is a whole number .*Received: 12.8"),
        ({"batch_size": -1}, r"batch_size is a whole number of at least 1. Received: -1"),
        ({"first_rung": 0}, r"first_rung is a whole number of at least 1. Received: 0"),
        ({"average_weights": 1}, "average_weights is True or False. Received: 1"),
        ({"reduction_factor": 1}, r"reduction_factor is a whole number of at least 2.*: 1"),
        ({"reduction_factor": 2.5}, r"reduction_factor is a whole number.*Received: 2.5"),
        ({"known_points": ({"units": 8})}, r"known_points is a tuple of .*Received: {'units': 8}"),
        ({"known_points": ("units",)}, r"known_points is a tuple of .*Received: \('units',\)"),
        ({"dataset": 5}, r"dataset is a name or a path. Received: 5"),
        ({"weights": b"x.h5"}, r"weights is a name or a path. Received: b'x.h5'"),
        ({"epochs": "5"}, r"^epochs is a number above 0. Received: '5'"),
        ({"max_flops": 0.5}, r"max_flops is a whole number of at least 1. Received: 0.5"),
        ({"max_memory": 0}, r"max_memory is a whole number of at least 1. Received: 0"),
        ({"compare": True}, r"compares has a space and known_points. .*known_points=\(\)"),
        ({"published": ({},)}, r"an entry for each of the known_points. Received: 1 for 0"),
        (
            {"known_points": ({},), "published": ({"accuracy": 0.9},)},
            r"published names a part's figure, such as train_loss.* Received: 'accuracy'",
        ),
        (
            {"known_points": ({}, {}), "published": ({"test_f1": 0.9}, {"validation_loss": 0.1})},
            r"names a part's figure.* Received: 'validation_loss'",
        ),
        (
            {"known_points": ({},), "published": ({"test_": 0.9},)},
            r"names a part's figure.* Received: 'test_'",
        ),
        ({"epochs": 0}, r"^epochs is a number above 0. Received: 0"),
        ({"epochs": float("nan")}, r"^epochs is a number above 0. Received: nan"),
        ({"final_epochs": float("inf")}, r"final_epochs is a number above 0. Received: inf"),
    ],
)
def test_a_field_outside_its_rule_is_refused_with_its_value(fields, message):
    with pytest.raises(ValueError, match=message):
        Study(**({"name": "mine", "space": CNN} | fields))


@pytest.mark.parametrize("fields", [{"epochs": 0.5}, {"final_epochs": None}, {"name": "a-b_c.1"}])
def test_what_the_rules_allow(fields):
    study = Study(**({"name": "mine", "space": CNN} | fields))
    assert getattr(study, *fields) == next(iter(fields.values()))


@pytest.mark.parametrize("file", [baselines, cnn, mlp, quickstart, resnet, vgg16, vgg16_sizes])
def test_a_study_file_says_what_it_asks(file):
    with open(file.__file__) as source:
        docstring = ast.get_docstring(ast.parse(source.read()))
    for heading in ("Goal:", "Scientific:", "Nuisance:", "Fixed:"):
        assert f"\n{heading}\n" in docstring
    assert file.__name__ == f"studies.{file.study.name}"


@pytest.mark.parametrize("file", [cnn, mlp, quickstart, resnet, vgg16, vgg16_sizes])
def test_reports_end_with_a_whole_batch(file):
    assert all(file.study.images_per_report % size == 0 for size in file.study.space.batch_sizes)


@pytest.mark.parametrize(("study", "known"), KNOWN)
def test_known_points_lie_in_their_space(study, known):
    hp = keras_tuner.HyperParameters()
    hp.values = dict(known)
    weights = {"weights": "none"} if study.weights else {}
    study.space((28, 28, 1), 10, 54_000, **weights).build(hp)
    ranges = {parameter.name: parameter for parameter in hp.space}
    for name, value in known.items():
        parameter = ranges[name]
        assert hp.is_active(parameter)
        if isinstance(parameter, keras_tuner.engine.hyperparameters.Choice):
            assert value in parameter.values
        if hasattr(parameter, "min_value"):
            assert parameter.min_value <= value <= parameter.max_value


@pytest.mark.parametrize("gpus", [[], ["gpu:0"]])
def test_the_sizes_of_vgg16_are_the_same_with_and_without_a_gpu(gpus, monkeypatch):
    """A study that began on one machine goes on, and its winners are trained, on another."""
    monkeypatch.setattr(keras.distribution, "list_devices", lambda kind=None: gpus)
    importlib.reload(vgg16)
    importlib.reload(vgg16_sizes)
    assert vgg16.study.space.input_sizes == (32,)
    assert vgg16_sizes.study.space.input_sizes == (32, 48, 64)


@pytest.mark.slow
def test_the_quickstart_reads_digits():
    images, labels = shuffle(*load_digits(return_X_y=True), random_state=0)
    images = (images.reshape(-1, 8, 8, 1) / 16 * 255).astype("uint8")
    labels = np.eye(10, dtype="float32")[labels]
    keras.utils.set_random_seed(1)
    study = quickstart.study
    space = study.space((8, 8, 1), 10, int(1_100 * study.epochs))
    hp = keras_tuner.HyperParameters()
    model = space.build(hp)
    batch_size, epochs = hp.get("batch_size"), int(study.epochs)
    model.fit(images[:1_100], labels[:1_100], batch_size=batch_size, epochs=epochs, verbose=0)
    _, accuracy = model.evaluate(images[1_100:], labels[1_100:], verbose=0)
    assert accuracy > 0.96
