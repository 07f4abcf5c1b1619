"""What a training does on a GPU alone, done on this machine's CPU, on the backend that Keras has.

.ci/run does it on JAX, too.
"""

import keras
import numpy as np
import pytest

from search.training import averaging, backend, training
from tests.search.training.test_training import Diary, data, plan


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(backend, "visible_gpus", lambda: 1)


def network():
    """With what has a state beside its weights: dropout, normalisation, a schedule, momentum."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((2, 2, 1), dtype="uint8"),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(4, 2, activation="relu", padding="same"),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.CosineDecay(0.05, 12)
    optimizer = keras.optimizers.SGD(schedule, momentum=0.9)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def train(callbacks=(), num_validated=20, *, average=False):
    model, whole = network(), plan(batch_size=5)
    if average:
        averaging.average_weights(model)
    rows = backend.Rows(data()[0], np.arange(59, -1, -1))
    history = training.train(
        model,
        (rows, data()[1][::-1].copy()),
        whole,
        validation_data=data(num_images=num_validated, seed=1),
        callbacks=callbacks,
    )
    return model, history


class Batches(keras.callbacks.Callback):
    def __init__(self):
        super().__init__()
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(batch)


@pytest.mark.parametrize("average", [pytest.param(False, marks=pytest.mark.slow), True])
def test_several_steps_at_once_come_to_the_same(average, monkeypatch):
    monkeypatch.setattr(backend, "VALIDATION_BATCH", 6)  # seven batches, and four steps at once
    one_by_one, expected = train(num_validated=40, average=average)
    monkeypatch.setattr(backend, "visible_gpus", lambda: 1)
    diary = Diary()
    model, history = train([diary], num_validated=40, average=average)
    assert model.steps_per_execution == 4  # of a report
    assert int(model.optimizer.iterations) == 12
    assert (len(diary.epochs), diary.ends) == (3, 1)
    assert history == {name: pytest.approx(values, rel=1e-4) for name, values in expected.items()}
    for weights, others in zip(model.get_weights(), one_by_one.get_weights(), strict=True):
        np.testing.assert_allclose(weights, others, rtol=1e-3, atol=1e-5)


def test_a_callback_that_asks_is_told_of_each_step(on_gpu):
    batches, seen = Batches(), []
    train([batches])
    assert batches.seen == [0, 1, 2, 3] * 3
    train(
        [keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: seen.append(batch))]
    )
    assert seen == batches.seen


def test_one_that_asks_whether_the_loss_is_a_number_need_not_be(on_gpu):
    """All winners have it."""
    model, _ = train([keras.callbacks.TerminateOnNaN()])
    assert model.steps_per_execution == 4


def test_a_model_that_is_run_eagerly_is_run_step_by_step(on_gpu):
    model = network()
    model.compile("sgd", "mse", run_eagerly=True)
    assert backend.steps_at_once(model, (), 8) == 1
    order = np.arange(60, dtype=np.int32)
    with backend.feeding(model, *data(), order, 10):
        assert model.train_function is None


def test_a_model_that_was_trained_before_is_trained_whole(on_gpu):
    """What Keras made for single steps would make one of four."""
    model, (x, y) = network(), data()
    model.fit(x, y, batch_size=5, validation_data=(x, y), verbose=0)
    before = int(model.optimizer.iterations)
    training.train(model, (x, y), plan(batch_size=5), validation_data=(x, y), callbacks=[])
    assert int(model.optimizer.iterations) == before + 12


@pytest.mark.parametrize(("steps_per_report", "at_once"), [(200, 50), (97, 1), (66, 33), (7, 7)])
def test_no_call_goes_beyond_a_report(on_gpu, steps_per_report, at_once):
    assert backend.steps_at_once(network(), (), steps_per_report) == at_once


def test_what_a_model_was_compiled_with_stays(on_gpu):
    model = network()
    model.compile("sgd", "mse", steps_per_execution=6)
    assert backend.steps_at_once(model, (), 8) == 2


def test_a_model_is_left_as_it_was(on_gpu):
    """It is measured, trained on and saved afterwards, by Keras's own functions."""
    model, _ = train()
    x, y = data()
    model.fit(x, y, batch_size=10, verbose=0)
    assert int(model.optimizer.iterations) == 12 + 6


jax_only = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX only")


def fed(model, x):
    """Shapes of what `fit` reads."""
    order = np.arange(60, dtype=np.int32)
    with backend.feeding(model, x, data()[1], order, 10) as batches:
        return [tuple(part.shape for part in batch) for batch in batches]


FROM_THE_HOST = [((10, 2, 2, 1), (10,))] * 6


@jax_only
def test_images_lie_on_the_device_where_there_is_room(on_gpu, monkeypatch):
    x, _ = data()
    assert fed(network(), x) == [((1, 10),)] * 6
    assert fed(network(), x.astype(np.float16)) == FROM_THE_HOST  # activations may be large
    monkeypatch.setattr(backend, "_OF_THE_GPU", -1.0)
    assert fed(network(), x) == FROM_THE_HOST


@jax_only
def test_a_model_that_can_t_be_compiled_is_fed_from_the_host(on_gpu):
    class AsksPython(keras.Model):
        def train_step(self, state, data):
            assert float(data[0][0, 0, 0, 0]) >= 0
            return super().train_step(state, data)

    plain = network()
    model = AsksPython(plain.inputs, plain.outputs)
    model.compile("sgd", "sparse_categorical_crossentropy")
    assert fed(model, data()[0]) == FROM_THE_HOST
