import keras
import numpy as np
import pytest

from search.training import averaging, training
from tests.search.training.test_training import Trial, data, network, plan

NUM_STEPS = 150  # some of them after those that all count


class Steps(keras.callbacks.Callback):
    """The weights after each step, and those that a callback finds at the end of each report."""

    def on_train_begin(self, logs=None):
        self.steps, self.reports = [], []

    def on_train_batch_end(self, batch, logs=None):
        self.steps.append(weights_of(self.model))

    def on_epoch_end(self, epoch, logs=None):
        self.reports.append(self.model.get_weights())


def weights_of(model):
    """Between two steps, too."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()
    return model.get_weights()


def trained(callbacks=(), *, average, momentum=None, **changed):
    model, steps = network(learning_rate=0.5), Steps()
    if momentum is not None:
        model.optimizer.use_ema, model.optimizer.ema_momentum = True, momentum
    if average:
        averaging.average_weights(model)
    fields = {"images_per_report": 500, "num_reports": NUM_STEPS // 50} | changed
    history = training.train(
        model,
        data(),
        plan(**fields),
        validation_data=data(30, seed=1),
        callbacks=[*callbacks, steps],
    )
    return model, history, steps


def averages(steps):
    """After each step: over the last ninth of the steps, then over a hundred, every fourth."""
    average, after = steps[0], []
    for done, weights in enumerate(steps):
        share = max(0.01, 9 / (done + 9)) * (1 if done < 100 else 4)
        if done < 100 or done % 4 == 0:
            average = [a + share * (w - a) for a, w in zip(average, weights, strict=True)]
        after.append(average)
    return after


def assert_close(weights, expected):
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_steps_are_as_without_an_average_and_what_is_seen_is_the_average():
    model, history, seen = trained(average=True)
    _, alone, steps = trained(average=False)
    assert len(steps.steps) == NUM_STEPS
    for each, other in zip(seen.steps, steps.steps, strict=True):
        assert_close(each, other)
    assert history["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    expected = averages(steps.steps)[49::50]
    for weights, average in zip(seen.reports, expected, strict=True):
        assert_close(weights, average)
    assert_close(model.get_weights(), expected[-1])
    # Far enough from the last step's for the comparison to mean something.
    assert np.abs(model.get_weights()[0] - steps.steps[-1][0]).max() > 0.01


def test_validation_measures_the_average():
    _, history, seen = trained(average=True)
    model = network()
    x, y = data(30, seed=1)
    for value, weights in zip(history["val_loss"], seen.reports, strict=True):
        model.set_weights(weights)
        assert model.evaluate(x, y, verbose=0)[0] == pytest.approx(value, rel=1e-4)


def test_the_best_weights_are_the_average_s():
    best = keras.callbacks.EarlyStopping(
        "val_loss", mode="max", patience=9, restore_best_weights=True
    )
    model, history, seen = trained([best], average=True)
    assert best.best_epoch == np.argmax(history["val_loss"]) == 0
    assert_close(model.get_weights(), seen.reports[0])


def test_what_a_callback_sets_is_kept():
    class Zero(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.trainable_variables[0].assign(np.zeros((4, 3)))

    model = network(learning_rate=1e-9)
    averaging.average_weights(model)
    biases = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: seen.append(weights_of(model)[0])
    )
    seen = []
    training.train(model, data(), plan(), validation_data=None, callbacks=[Zero(), biases])
    assert [np.abs(weights).max() > 1e-6 for weights in seen] == [True] * 2 + [False] * 4
    assert np.all(model.get_weights()[0] == 0)


def test_without_validation_too():
    """As a winner's training, which ends with the average."""
    model, steps = network(learning_rate=0.5), Steps()
    averaging.average_weights(model)
    the_plan = plan(images_per_report=30, num_reports=4)
    training.train(model, data(), the_plan, validation_data=None, callbacks=[steps])
    expected = averages(steps.steps)
    for weights, average in zip(steps.reports, expected[2::3], strict=True):
        assert_close(weights, average)
    assert_close(model.get_weights(), expected[-1])


def test_one_that_keeps_an_average_by_itself_is_measured_with_it():
    """With the space's momentum, from the first step on, as Keras does."""
    model, _, seen = trained(average=True, momentum=0.5, num_reports=1)
    average = seen.steps[0]
    for weights in seen.steps:
        average = [(a + w) / 2 for a, w in zip(average, weights, strict=True)]
    assert_close(seen.reports[0], average)
    assert_close(model.get_weights(), average)


def built(optimizer):
    optimizer.build(network().trainable_variables)
    return optimizer


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: built(keras.optimizers.SGD()),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
    ],
)
def test_an_optimizer_that_is_ready_or_wraps_another_is_left_alone(optimizer):
    model, trial = network(), Trial()
    model.compile(optimizer(), model.loss, metrics=["accuracy"])
    averaging.average_weights(model)
    assert not averaging.is_averaged(model)
    if not model.optimizer.built:
        report = training.Report(trial, 20)
        training.train(model, data(), plan(), validation_data=data(), callbacks=[report])
        assert list(trial.reports) == [1, 2, 3]


class OwnStep(keras.Model):
    """Trains with an optimizer of its own; the compiled one is Keras's default, and idle."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = keras.optimizers.SGD(0.1)

    def train_step(self, batch):
        import tensorflow as tf

        x, y = batch
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
        self.own.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        return {"loss": loss}


@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="its train_step is TensorFlow's"
)
def test_an_optimizer_that_is_not_used_has_no_average():
    plain = network()
    model = OwnStep(plain.inputs, plain.outputs)
    model.compile(loss=plain.loss, metrics=["accuracy"])
    averaging.average_weights(model)
    before, (x, y) = model.get_weights(), data()
    training.train(model, (x, y), plan(), validation_data=(x, y), callbacks=[])
    assert np.abs(model.get_weights()[0] - before[0]).max() > 1e-4
    assert np.abs(model.get_weights()[0]).max() > 1e-2


def test_averages_keep_constraints():
    keras.utils.set_random_seed(1)
    inputs = keras.Input((2, 2, 1))
    layer = keras.layers.Dense(3, kernel_constraint="non_neg", activation="softmax")
    model = keras.Model(inputs, layer(keras.layers.Flatten()(inputs)))
    model.compile(
        keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    averaging.average_weights(model)
    training.train(model, data(), plan(), validation_data=None, callbacks=[])
    assert np.min(layer.kernel) == 0


def test_a_callback_of_the_space_s_that_exchanges_them_is_left_out():
    swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
    model, *_ = trained([swap], average=True)
    expected, *_ = trained(average=True)
    assert_close(model.get_weights(), expected.get_weights())


def test_a_saved_model_is_trained_on_by_plain_keras(tmp_path):
    model, *_ = trained(average=True)
    model.evaluate(*data(), verbose=0)  # on JAX frees what the weights were in
    model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    assert_close(loaded.get_weights(), model.get_weights())
    assert loaded.optimizer.use_ema
    loaded.fit(*data(), verbose=0)
