"""Spaces of any origin: what is added, what is refused, how a `fit` of their own is called."""

import math

import keras
import keras_tuner
import numpy as np
import pytest

from search.training import training
from search.training.hypermodel import (
    Images,
    Space,
    check_can_be_loaded,
    ends_in_float32,
    trains_itself,
    value_of_fit,
)
from tests import foreign

DIGITS = Images("digits", (8, 8, 1), 3)
PAIRS = Images("pairs", (8, 8, 1), 2)


def dense(num_outputs=3, metrics=("accuracy",), shape=None, activation="softmax"):
    layers = [] if shape is None else [keras.Input(shape)]
    layers += [keras.layers.Flatten(), keras.layers.Dense(num_outputs, activation)]
    model = keras.Sequential(layers)
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=list(metrics))
    return model


def built(make, images=DIGITS):
    return Space(lambda hp: make(), images, 100).build(keras_tuner.HyperParameters())


def test_a_model_without_an_input_gets_the_data_set_s():
    assert built(dense).input_shape == (None, 8, 8, 1)


@pytest.mark.parametrize(
    "metrics",
    [
        (),
        ("acc",),
        ("sparse_categorical_crossentropy",),
        (keras.metrics.SparseCategoricalAccuracy(name="mine"),),
    ],
)
def test_accuracy_is_measured_beside_the_model_s_own_metrics(metrics):
    model = built(lambda: dense(metrics=metrics))
    x, y = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 3
    figures = model.evaluate(x, y, verbose=0, return_dict=True)
    assert {"loss", "accuracy"} <= set(figures)
    assert len(figures) == 2 + len(metrics)


@pytest.mark.parametrize("wrap", [tuple, lambda metrics: {"classes": metrics}])
def test_metrics_may_be_given_in_any_form_that_keras_takes(wrap):
    def make():
        inputs = keras.Input((8, 8, 1))
        last = keras.layers.Dense(3, "softmax", name="classes")
        model = keras.Model(inputs, last(keras.layers.Flatten()(inputs)))
        mine = keras.metrics.SparseTopKCategoricalAccuracy(2, name="mine")
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=wrap([mine]))
        return model

    x, y = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 3
    figures = built(make).evaluate(x, y, verbose=0, return_dict=True)
    assert set(figures) == {"loss", "accuracy", "mine"}


def one_logit(wrap=lambda loss: loss, **options):
    """For two classes: the second where it is above 0."""
    inputs = keras.Input((8, 8, 1))
    last = keras.layers.Dense(1, kernel_initializer="ones", name="logit")
    model = keras.Model(inputs, last(keras.layers.Flatten()(inputs)))
    model.compile("sgd", wrap(keras.losses.BinaryCrossentropy(from_logits=True)), **options)
    return model


@pytest.mark.parametrize(
    "wrap",
    [lambda loss: loss, lambda loss: [loss], lambda loss: {"logit": loss}],
    ids=["alone", "in a list", "by name"],
)
@pytest.mark.parametrize("given", [[], ["accuracy"]])
def test_the_accuracy_of_a_logit_is_the_user_s_own(wrap, given):
    own = keras.metrics.BinaryAccuracy("mine", threshold=0.0)
    model = built(lambda: one_logit(wrap, metrics=[*given, own]), PAIRS)
    x = np.zeros((4, 8, 8, 1), np.float32)
    x[:, 0, 0, 0] = [-1.0, 0.2, 0.4, 3.0]  # two lie between the thresholds, 0 and 0.5
    y = np.array([[0.0], [1.0], [1.0], [1.0]])
    figures = model.evaluate(x, y, verbose=0, return_dict=True)
    assert figures["accuracy"] == figures["mine"] == 1.0


def test_what_else_a_model_was_compiled_with_stays():
    given = {"loss_weights": 2.0, "weighted_metrics": ["mae"], "steps_per_execution": 3}
    model, own = (
        make()
        for make in (
            lambda: built(lambda: one_logit(**given, run_eagerly=True), PAIRS),
            lambda: one_logit(**given),
        )
    )
    x, y = np.ones((2, 8, 8, 1), np.float32) / 64, np.array([[0.0], [1.0]])
    figures, expected = (m.evaluate(x, y, verbose=0, return_dict=True) for m in (model, own))
    assert figures == pytest.approx(expected | {"accuracy": 0.5})
    assert (model.steps_per_execution, model.run_eagerly) == (3, True)


class OwnCompile(keras.Model):
    """Compiled with what Keras does not know, by arguments of its own."""

    def compile(self, optimizer, loss, alpha):
        super().compile(optimizer=optimizer, loss=loss)
        self.alpha = alpha


def test_a_compile_of_its_own_is_called_by_its_space_alone():
    def make():
        inputs = keras.Input((8, 8, 1))
        outputs = keras.layers.Dense(3, "softmax")(keras.layers.Flatten()(inputs))
        model = OwnCompile(inputs, outputs)
        model.compile("sgd", "sparse_categorical_crossentropy", alpha=0.3)
        return model

    model = built(make)
    assert model.alpha == 0.3
    x, y = np.zeros((4, 8, 8, 1), np.uint8), np.arange(4) % 3
    assert set(model.evaluate(x, y, verbose=0, return_dict=True)) == {"loss", "accuracy"}


class WithoutGraph(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(3, "softmax")

    def call(self, x):
        return self.dense(keras.ops.reshape(x, (-1, 64)))


def without_graph():
    model = WithoutGraph()
    model.compile("sgd", "sparse_categorical_crossentropy")
    return model


def uncompiled():
    return keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)])


@pytest.mark.parametrize(
    ("make", "images", "rule"),
    [
        (uncompiled, DIGITS, "returns a compiled Keras model"),
        (lambda: "a model", DIGITS, "returns a compiled Keras model. Received: 'a model'"),
        (without_graph, DIGITS, "is functional or Sequential: .* Received: <WithoutGraph"),
        (lambda: dense(10), DIGITS, r"ends in 3 numbers.*output_shape=\(None, 10\)"),
        (lambda: dense(1), DIGITS, "ends in 3 numbers"),
        (lambda: dense(3), PAIRS, "ends in 2 or 1 numbers"),
        (lambda: dense(shape=(28, 28, 1)), DIGITS, r"takes images of shape \(8, 8, 1\)"),
    ],
)
def test_a_model_that_cannot_work_is_refused(make, images, rule):
    with pytest.raises(ValueError, match=rule):
        built(make, images)


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_two_classes_may_end_in_one_number_or_two(num_outputs):
    assert built(lambda: dense(num_outputs), PAIRS).output_shape == (None, num_outputs)


def test_a_class_gets_what_it_takes():
    class Some(keras_tuner.HyperModel):
        def __init__(self, classes, total_images):
            super().__init__()
            self.given = classes, total_images

        def build(self, hp):
            return dense(self.given[0])

    space = Space(Some, DIGITS, 100)
    assert space._space.given == (3, 100)
    assert space.build(keras_tuner.HyperParameters()).output_shape == (None, 3)


class Double(keras.layers.Layer):
    def call(self, x):
        return 2 * x


@pytest.mark.parametrize(
    "layer", [Double(name="not_registered", trainable=False), keras.layers.Lambda(lambda x: 2 * x)]
)
def test_what_could_not_be_loaded_is_found_before_the_first_trial(layer):
    model = keras.Sequential([keras.Input((8, 8, 1)), layer, keras.layers.Flatten()])
    if isinstance(layer, Double):  # as a class of the user's notebook, which no other process has
        Double.__module__, Double.__name__ = "gone", "Gone"
    with pytest.raises(
        ValueError, match=r"the model can be saved but not loaded again.*register_keras"
    ):
        check_can_be_loaded(model)


def doubled(x):
    return 2 * x


@keras.saving.register_keras_serializable("tests")
def registered(x):
    return 2 * x


@pytest.mark.parametrize(
    "given",
    [{"activation": doubled}, {"activation": lambda x: 2 * x}, {"kernel_initializer": doubled}],
)
def test_a_function_of_the_user_s_in_a_layer_of_keras_s_is_looked_for(given):
    def make(**given):
        layers = [keras.Input((8, 8, 1)), keras.layers.Flatten()]
        return keras.Sequential([*layers, keras.layers.Dense(3, **given)])

    check_can_be_loaded(make(**dict.fromkeys(given, registered) if "activation" in given else {}))
    if "kernel_initializer" in given:
        given = {"kernel_initializer": lambda shape, dtype=None: keras.ops.zeros(shape, dtype)}
    with pytest.raises(ValueError, match=r"the model can be saved but not loaded again"):
        check_can_be_loaded(make(**given))


def test_an_ordinary_model_can_be_loaded():
    check_can_be_loaded(built(dense))


def test_a_winner_can_be_loaded_without_its_loss():
    def own(y, predicted):
        return keras.losses.sparse_categorical_crossentropy(y, predicted)

    model = keras.Sequential([keras.Input((8, 8, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3, activation=registered))
    model.compile("sgd", own)
    check_can_be_loaded(model)


def test_a_model_that_ends_in_bfloat16_is_noticed():
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        assert not ends_in_float32(built(dense))
    finally:
        keras.config.set_dtype_policy("float32")
    assert ends_in_float32(built(dense))


@pytest.mark.parametrize(
    ("space", "own"),
    [
        (foreign.dense, False),
        (foreign.Deep, False),
        (foreign.Deep(), False),
        (foreign.Shuffled, True),
        (foreign.Shuffled(), True),
        (keras_tuner.applications.HyperXception, False),
    ],
)
def test_which_spaces_train_themselves(space, own):
    assert trains_itself(space) is own


def history(**curves):
    made = keras.callbacks.History()
    made.history = curves
    return made


@pytest.mark.parametrize(
    ("returned", "reported", "value"),
    [
        (0.5, [0.9], 0.5),
        (np.float32(0.5), [], 0.5),
        ({"val_accuracy": 0.7, "val_loss": 2.0}, [], 0.7),
        ({"score": 0.6}, [0.9], 0.6),
        ({"val_accuracy": [0.2, 0.8, 0.4], "loss": [1.0]}, [], 0.8),  # a History's own
        (history(val_accuracy=[0.2, 0.8, 0.4]), [], 0.8),
        (history(loss=[1.0]), [0.3, 0.1], 0.3),
        (history(loss=[1.0]), [], None),  # to be measured
        (None, [0.2, 0.3], 0.3),
        (None, [], None),
    ],
)
def test_the_value_of_a_fit(returned, reported, value):
    found = value_of_fit(returned, reported)
    assert found is value is None or found == pytest.approx(value)


@pytest.mark.parametrize(
    ("returned", "rule"),
    [
        ({"loss": 1.0, "accuracy": 0.5}, r"key 'val_accuracy', or one key.*\['accuracy', 'loss'\]"),
        ({}, "key 'val_accuracy', or one key"),
        ("good", "returns a number to maximise.*Received: 'good'"),
        ([1.0, 2.0], "returns a number to maximise"),
        ({"val_accuracy": "good"}, "returns a number to maximise.*Received: 'good'"),
    ],
)
def test_a_fit_that_returns_something_else_is_refused(returned, rule):
    with pytest.raises(ValueError, match=rule):
        value_of_fit(returned, [])


def test_a_fit_of_its_own_is_called_as_kerastuner_calls_it():
    calls = []

    class Own(keras_tuner.HyperModel):
        def build(self, hp):
            return dense()

        def fit(self, hp, model, *args, **kwargs):
            calls.append((args, kwargs))
            return 0.25

        def callbacks(self, hp):
            return ["of the space"]

    space = Space(Own, DIGITS, 100)
    x, y = np.zeros((4, 8, 8, 1)), np.zeros(4)
    returned = space.fit(
        None, dense(), (x, y), validation_data=(x, y), epochs=3, callbacks=["of the product"]
    )
    ((args, kwargs),) = calls
    assert returned == 0.25
    assert args[0] is x
    assert args[1] is y
    assert kwargs["epochs"] == 3
    assert kwargs["callbacks"] == ["of the space", "of the product"]
    assert kwargs["validation_data"] == (x, y)


def test_callbacks_that_a_space_keeps_are_converted_once_each_time():
    class Keeping(keras_tuner.HyperModel):
        stopping = keras.callbacks.EarlyStopping("loss", patience=2)

        def callbacks(self, hp):
            return [self.stopping]

    space = Space(Keeping, DIGITS, 100)
    for _ in range(2):
        (callback,) = space.callbacks(None)
        training.count_in_reports(callback, 3.0, has_validation=True)
        assert callback.patience == 6
    assert Keeping.stopping.patience == 2


def test_callbacks_may_be_none_at_some_points():
    class Sometimes(keras_tuner.HyperModel):
        def callbacks(self, hp):
            if hp:
                return [keras.callbacks.TerminateOnNaN()]

    assert Space(Sometimes, DIGITS, 100).callbacks(None) == []


def test_a_fit_that_tunes_epochs_is_not_given_any():
    class Own(keras_tuner.HyperModel):
        def build(self, hp):
            return dense()

        def fit(self, hp, model, *args, **kwargs):
            return model.fit(*args, epochs=2, **kwargs)

    x, y = np.zeros((4, 8, 8, 1)), np.zeros(4)
    space = Space(Own, DIGITS, 100)
    model = space.build(None)
    made = space.fit(None, model, (x, y), validation_data=(x, y), epochs=5, callbacks=[])
    assert len(made.history["val_accuracy"]) == 2
    keras.config.enable_interactive_logging()


class FromWeights:
    def __init__(self, input_shape, weights="imagenet"):
        FromWeights.weights = weights

    def build(self, hp):
        return dense(shape=(8, 8, 1))


class SometimesFromWeights(FromWeights):
    def is_pretrained(self, hp):
        return hp.Boolean("pretrained")

    def epochs(self, hp):
        return 7


@pytest.mark.parametrize(
    ("space", "weights", "got", "pretrained", "epochs"),
    [
        (FromWeights, None, "imagenet", False, math.inf),
        (FromWeights, "none", "none", True, math.inf),
        (SometimesFromWeights, "w.h5", "w.h5", False, 7),
    ],
)
def test_weights_and_epochs_of_a_space_that_knows_of_them(space, weights, got, pretrained, epochs):
    made = Space(space, DIGITS, 100, weights)
    assert FromWeights.weights == got
    assert made.is_pretrained(keras_tuner.HyperParameters()) is pretrained
    assert made.epochs(keras_tuner.HyperParameters()) == epochs


def test_a_space_without_weights_begins_from_none():
    made = Space(lambda hp: dense(shape=(8, 8, 1)), DIGITS, 100, "none")
    assert made.is_pretrained(keras_tuner.HyperParameters()) is False
    assert made.epochs(keras_tuner.HyperParameters()) == math.inf


def test_what_is_done_before_saving_is_the_space_s_own():
    class Marked(FromWeights):
        def before_saving(self, model):
            model.name = "marked"

    model = dense(shape=(8, 8, 1))
    Space(Marked, DIGITS, 100).before_saving(model)
    assert model.name == "marked"
