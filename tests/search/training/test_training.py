import gc
import math
import weakref

import keras
import numpy as np
import pytest

from search.training import backend, training
from search.training.training import Plan, Report

NUM_IMAGES = 60


def plan(**changed):
    fields = {"num_images": 60, "images_per_report": 20, "num_reports": 3, "batch_size": 10}
    return Plan(**(fields | {"seed": 1} | changed))


def data(num_images=NUM_IMAGES, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 3, num_images).astype(np.uint8)
    x = rng.integers(0, 100, (num_images, 2, 2, 1)).astype(np.uint8)
    x[:, 0, 0, 0] = y * 100  # so that it can be learnt
    return x, y


def network(loss="sparse_categorical_crossentropy", learning_rate=0.05):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((2, 2, 1)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Flatten(),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.SGD(learning_rate), loss, metrics=["accuracy"])
    return model


class Trial:
    """Keeps what is reported and says to stop at a step."""

    def __init__(self, prune_at=None):
        self.reports = {}
        self.metrics = []
        self.progress = []
        self._prune_at = prune_at

    def report(self, value, step, metrics=None, **progress):
        self.reports[step] = value
        self.metrics.append(metrics)
        self.progress.append(progress)

    def should_prune(self):
        return max(self.reports) == self._prune_at


class Diary(keras.callbacks.Callback):
    """Notes what a callback of the user's is told, and the weights it finds."""

    def __init__(self):
        super().__init__()
        self.ends = 0
        self.epochs = []
        self.rates = []

    def on_epoch_end(self, epoch, logs=None):
        self.epochs.append(sorted(logs))
        self.rates.append(float(self.model.optimizer.learning_rate))

    def on_train_end(self, logs=None):
        self.ends += 1


# The order of the images


@pytest.mark.parametrize(
    ("changed", "steps", "reports_per_epoch"),
    [
        ({}, 2, 3.0),
        ({"images_per_report": 24}, 2, 3.0),  # whole batches only
        ({"images_per_report": 26}, 3, 2.0),  # as many as come nearest
        ({"batch_size": 64}, 1, 60 / 64),  # at least one
        ({"images_per_report": 120, "batch_size": 30}, 4, 0.5),
        # Half a batch is no reason to report after half the images.
        ({"images_per_report": 500, "batch_size": 64, "num_images": 5_120}, 8, 10.0),
        ({"images_per_report": 500, "batch_size": 128, "num_images": 5_120}, 4, 10.0),
        ({"images_per_report": 500, "batch_size": 256, "num_images": 5_120}, 2, 10.0),
    ],
)
def test_steps_and_reports_of_a_plan(changed, steps, reports_per_epoch):
    assert plan(**changed).steps_per_report == steps
    assert plan(**changed).reports_per_epoch == reports_per_epoch


@pytest.mark.parametrize(
    ("num_reports", "num_images", "length"), [(9, 60, 180), (1, 60, 20), (7, 37, 140), (1, 20, 20)]
)
def test_every_epoch_sees_every_image_once(num_reports, num_images, length):
    order = plan(num_reports=num_reports, num_images=num_images).order()
    assert (order.dtype, len(order)) == (np.int32, length)
    for start in range(0, length, num_images):
        epoch = order[start : start + num_images]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_images))
    assert len(set(order[:num_images])) == min(length, num_images)


def test_epochs_and_seeds_differ():
    order = plan(num_reports=6).order()
    assert order[:60].tolist() != order[60:].tolist()
    assert order.tolist() != plan(num_reports=6, seed=2).order().tolist()


def test_no_two_epochs_of_neighbouring_seeds_are_the_same():
    # (seed, epoch) and not seed + epoch.
    assert plan(num_reports=6).order()[60:].tolist() != plan(seed=2).order().tolist()


def test_of_a_model_that_was_trained_nothing_stays():
    """Where its step's graph did, a worker grew by 6 MB and more with every trial."""
    graphs = []
    for _ in range(2):
        model = network()
        training.train(model, data(), plan(), validation_data=data(), callbacks=[])
        gone = [weakref.ref(model), weakref.ref(model.train_function)]
        del model
        backend.release()
        assert [one() for one in gone] == [None, None]
        graphs.append(sum(type(thing).__name__ == "FuncGraph" for thing in gc.get_objects()))
    assert graphs[0] == graphs[1]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="others compile their own way")
def test_a_new_model_is_traced_once():
    calls = []

    class Counting(keras.layers.Layer):
        def call(self, x):
            calls.append(x)
            return x

    x, y = data()
    model = keras.Sequential([network(), Counting()])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    calls.clear()
    training.train(model, (x, y), plan(num_reports=2), validation_data=None, callbacks=[])
    assert len(calls) == 1


@pytest.mark.parametrize("num_reports", [1, 2, 3, 4, 7, 11])
def test_a_longer_plan_begins_with_the_shorter_one(num_reports):
    longer = plan(num_reports=12).order()
    shorter = plan(num_reports=num_reports).order()
    np.testing.assert_array_equal(longer[: len(shorter)], shorter)


def test_each_epoch_sees_each_image_once():
    first, second = np.split(plan(num_reports=6).order(), 2)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first.tolist() != second.tolist()


def test_the_model_is_shown_the_plan_s_images_in_its_order():
    """The labels of the batches, as a metric of the user's meets them."""
    seen = []

    class Labels(keras.metrics.Metric):
        def update_state(self, y, y_pred, sample_weight=None):
            seen.extend(np.asarray(y).ravel().tolist())

        def result(self):
            return 0.0

    x, _ = data()
    y = np.arange(NUM_IMAGES) % 3
    model = network()
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=[Labels()], run_eagerly=True)
    the_plan = plan(num_reports=4)
    training.train(model, (x, y), the_plan, validation_data=None, callbacks=[])
    assert [int(label) for label in seen] == y[the_plan.order()].tolist()


# Reports, by hand


def fed(trial, *epochs, **options):
    report = Report(trial, images=20, **options)
    report.set_model(keras.Sequential())
    report.model.stop_training = False
    for epoch, logs in enumerate(epochs):
        report.on_epoch_begin(epoch)
        report.on_test_begin()
        report.on_epoch_end(epoch, logs)
    return report


def test_reports_are_numbered_from_one():
    trial = Trial()
    report = fed(trial, {"val_accuracy": 0.5, "loss": 2.0}, {"val_accuracy": 0.75, "loss": 1.0})
    assert trial.reports == {1: 0.5, 2: 0.75}
    assert trial.metrics[1] == {"val_accuracy": 0.75, "loss": 1.0}
    assert trial.progress[0]["images_per_second"] > 0
    assert (report.pruned, report.diverged, report.model.stop_training) == (False, "", False)


def test_a_report_without_its_monitor_is_an_error_where_it_must_have_it():
    trial = Trial()
    assert fed(trial, {"loss": 2.0}).values == []
    with pytest.raises(ValueError, match=r"no val_accuracy, .* Received: \['loss', 'val_loss'\]"):
        fed(trial, {"val_loss": 2.0, "loss": 2.0}, must_have_it=True)


def test_a_metric_of_each_class_is_reported_as_its_mean():
    x, y = data()
    model = network("categorical_crossentropy")
    f1 = keras.metrics.F1Score()
    model.compile("sgd", "categorical_crossentropy", metrics=["accuracy", f1])
    trial = Trial()
    history = training.train(
        model, (x, y), plan(), validation_data=(x, y), callbacks=[Report(trial, 20)]
    )
    of_classes = np.asarray(
        model.evaluate(x, np.eye(3)[y], verbose=0, return_dict=True)["f1_score"]
    )
    assert of_classes.shape == (3,)
    assert trial.metrics[-1]["val_f1_score"] == pytest.approx(of_classes.mean(), abs=1e-6)
    assert history["val_f1_score"][-1] == trial.metrics[-1]["val_f1_score"]
    assert training.measured(model, (x, y))["f1_score"] == history["val_f1_score"][-1]


def test_a_trial_that_says_stop_is_stopped():
    report = fed(Trial(prune_at=2), {"val_accuracy": 0.5}, {"val_accuracy": 0.4})
    assert report.pruned
    assert report.model.stop_training


@pytest.mark.parametrize("name", ["loss", "val_loss", "val_accuracy"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_figure_that_is_not_finite_stops_and_is_not_reported(name, value):
    trial = Trial()
    sound = {"loss": 1.0, "val_loss": 1.0, "val_accuracy": 0.5}
    report = fed(trial, sound, sound | {name: value})
    assert report.diverged == f"{name} was {value} at report 2"
    assert trial.reports == {1: 0.5}
    assert report.model.stop_training
    assert not report.pruned


@pytest.mark.parametrize(
    ("second", "steps"),
    [({"epochs": 2}, [1, 2, 3, 4]), ({"epochs": 5, "initial_epoch": 3}, [1, 2, 4, 5])],
)
def test_steps_rise_where_a_fit_of_the_user_s_own_trains_twice(second, steps):
    """As one that trains the head of a network, then all of it; Keras counts anew."""
    trial, model = Trial(), network()
    report = Report(trial, 20)
    for length in ({"epochs": 2}, second):
        model.fit(*data(), validation_data=data(), callbacks=[report], verbose=0, **length)
    assert list(trial.reports) == steps


# Whole trainings


def train(model, callbacks, *, validation=True, **changed):
    return training.train(
        model,
        data(),
        plan(**changed),
        validation_data=data(30, seed=1) if validation else None,
        callbacks=callbacks,
    )


def test_a_history_has_a_value_for_each_report():
    trial = Trial()
    history = train(network(), [Report(trial, 20)], num_reports=6)
    assert {name: len(values) for name, values in history.items()} == {
        "loss": 6,
        "accuracy": 6,
        "val_loss": 6,
        "val_accuracy": 6,
    }
    assert list(trial.reports.values()) == history["val_accuracy"]
    assert all(type(value) is float for value in history["loss"])


def test_a_pruned_training_ends_in_good_order():
    diary, trial = Diary(), Trial(prune_at=2)
    report = Report(trial, 20)
    best = keras.callbacks.EarlyStopping("val_loss", patience=99, restore_best_weights=True)
    history = train(network(), [report, best, diary], num_reports=9)
    assert report.pruned
    assert list(trial.reports) == [1, 2]
    assert (diary.ends, len(diary.epochs), len(history["loss"])) == (1, 2, 2)


def test_a_diverged_training_ends_in_good_order():
    diary, trial = Diary(), Trial()
    report = Report(trial, 20)
    train(network(learning_rate=math.inf), [report, diary], num_reports=9)
    assert report.diverged.startswith("loss was nan at report 1")
    assert trial.reports == {}
    assert (diary.ends, len(diary.epochs)) == (1, 1)


def test_two_trainings_with_the_same_seed_are_the_same():
    first, second = (train(network(), []) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("patience", "images_per_report", "num_reports"),
    [
        (1, 20, 1 + 3),
        (2, 20, 1 + 6),
        (1, 40, 1 + 2),
        (1, 120, 1 + 1),
        (0, 20, 1 + 3),  # to Keras as 1: it stops at the first epoch that is no better
    ],
)
def test_patience_is_counted_in_epochs(patience, images_per_report, num_reports):
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=99.0, patience=patience)
    history = train(network(), [stopping], images_per_report=images_per_report, num_reports=12)
    assert len(history["loss"]) == num_reports


@pytest.mark.parametrize("patience", [np.int64(2), 2.0])
def test_patience_may_be_any_number(patience):
    stopping = keras.callbacks.EarlyStopping(patience=patience)
    training.count_in_reports(stopping, 3.0, has_validation=True)
    assert stopping.patience == 6


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_a_report_ends_where_it_should_whatever_is_executed_at_once(at_once):
    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            steps.append(int(self.model.optimizer.iterations))

    steps, model = [], network()
    model.compile("sgd", model.loss, metrics=["accuracy"], steps_per_execution=at_once)
    train(model, [Count()], batch_size=5)
    assert steps == [4, 8, 12]


def test_the_epochs_before_a_callback_watches_are_epochs():
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=99.0, patience=1, start_from_epoch=1)
    history = train(network(), [stopping], num_reports=12)
    assert len(history["loss"]) == 3 + 1 + 3


@pytest.mark.parametrize("takes_rate", [True, False])
@pytest.mark.parametrize(
    ("num_images", "begins"),
    [(60, [0, 3, 6]), (50, [0, 3, 5, 8])],  # an epoch is 3 reports, or 2.5
)
def test_a_schedule_is_asked_once_an_epoch(takes_rate, num_images, begins):
    asked, diary = [], Diary()

    def by_epoch(epoch):
        asked.append(epoch)
        return 0.5**epoch

    def by_epoch_and_rate(epoch, rate):
        asked.append(epoch)
        return rate * 0.5 if epoch else rate

    schedule = by_epoch_and_rate if takes_rate else by_epoch
    callbacks = [keras.callbacks.LearningRateScheduler(schedule), diary]
    train(network(learning_rate=1.0), callbacks, num_images=num_images, num_reports=9)
    assert asked == list(range(len(begins)))
    epochs = [sum(begin <= report for begin in begins) - 1 for report in range(9)]
    assert diary.rates == [0.5**epoch for epoch in epochs]


def test_an_error_in_a_schedule_is_its_own():
    callbacks = [keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * None)]
    with pytest.raises(ValueError, match=r"LearningRateScheduler's schedule: .*NoneType"):
        train(network(), callbacks)


def test_a_plateau_and_its_cooldown_are_counted_in_epochs():
    plateau = keras.callbacks.ReduceLROnPlateau(
        "val_loss", factor=0.1, min_delta=99.0, patience=1, cooldown=2
    )
    diary = Diary()
    train(network(learning_rate=1.0), [plateau, diary], num_reports=12)
    # An epoch is three reports: the first is the best, three without a better one, then six of
    # cooldown, of which Keras counts the last as the first without a better one.
    changes = [at for at in range(1, 12) if diary.rates[at] < diary.rates[at - 1]]
    assert changes[0] == 3
    assert changes[1] - changes[0] == 8


def test_without_validation_the_training_figures_are_watched():
    plateau = keras.callbacks.ReduceLROnPlateau("val_loss", min_delta=99.0, patience=1)
    stopping = keras.callbacks.EarlyStopping("val_accuracy", min_delta=99.0, patience=2)
    diary = Diary()
    # Keras warns of a monitor that is not there, and does nothing.
    history = train(
        network(learning_rate=1.0), [plateau, stopping, diary], validation=False, num_reports=12
    )
    assert not any(name.startswith("val_") for name in diary.epochs[0])
    assert diary.rates[-1] < diary.rates[0]
    assert len(history["loss"]) == 1 + 6


def test_with_validation_the_monitor_stays():
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=2)
    train(network(), [stopping], num_reports=1)
    assert stopping.monitor == "val_loss"


def test_progress_is_told_at_each_report():
    told = []
    the_plan = plan()
    training.train(
        network(),
        data(),
        the_plan,
        validation_data=None,
        callbacks=[training.Progress(lambda **figures: told.append(figures), 3, 100)],
    )
    assert [(figures["step"], figures["of"]) for figures in told] == [(1, 3), (2, 3), (3, 3)]
    assert all(0 <= figures["accuracy"] <= 1 for figures in told)
    assert all(figures["images_per_second"] > 0 for figures in told)


def test_the_seconds_of_a_training_are_those_of_its_reports(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("search.training.training.time.monotonic", lambda: now[0])
    progress = training.Progress(lambda **_: None, 2, 100)
    for epoch, (before, seconds) in enumerate([(50.0, 2.0), (0.0, 3.0)]):
        now[0] += before  # the model is built, its first checkpoint read
        progress.on_epoch_begin(epoch)
        now[0] += seconds
        progress.on_epoch_end(epoch, {"loss": 1.0})
    assert progress.seconds == 5.0


@pytest.mark.fault("N1")
@pytest.mark.parametrize("name", ["loss", "val_loss", "recall"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_winner_s_training_stops_at_a_figure_that_is_not_finite(name, value):
    told = []
    progress = training.Progress(lambda **figures: told.append(figures), 3, 100)
    progress.set_model(keras.Sequential())
    progress.model.stop_training = False
    sound = {"loss": 1.0, "val_loss": 1.0, "recall": 0.5}
    for epoch, logs in enumerate((sound, sound | {name: value})):
        progress.on_epoch_end(epoch, logs)
    assert progress.diverged == f"{name} was {value} at report 2"
    assert progress.model.stop_training
    assert progress.history == {key: [figure] for key, figure in sound.items()}
    assert [figures["step"] for figures in told] == [1]


def own_sparse_loss(y, predicted):
    return keras.losses.sparse_categorical_crossentropy(y, predicted) * 2


def own_one_hot_loss(y, predicted):
    return keras.losses.categorical_crossentropy(y, predicted) * 2


def own_loss_by_one_hot(y, predicted):
    """Takes class numbers; of as many one-hot labels as there are classes it makes something."""
    chosen = keras.ops.one_hot(keras.ops.cast(y, "int32"), 3)
    return -keras.ops.sum(chosen * keras.ops.log(predicted), axis=-1)


def own_loss_by_gathering(y, predicted):
    """Takes class numbers; of one-hot labels it gathers the first two probabilities."""
    import tensorflow as tf

    chosen = tf.gather(predicted, tf.cast(y, tf.int32), axis=1, batch_dims=1)
    return -tf.math.log(chosen)


def test_labels_of_a_model_that_ends_in_one_number():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=["accuracy"])
    labels = training.as_loss_wants(model, np.array([1, 0, 1], np.uint8))
    assert labels.tolist() == [[1.0], [0.0], [1.0]]
    x = np.zeros((3, 4))
    assert model.evaluate(x, labels, verbose=0)[1] in (pytest.approx(1 / 3), pytest.approx(2 / 3))


@pytest.mark.parametrize(
    ("loss", "is_one_hot"),
    [
        ("sparse_categorical_crossentropy", False),
        (keras.losses.SparseCategoricalCrossentropy(), False),
        (keras.losses.sparse_categorical_crossentropy, False),
        ("categorical_crossentropy", True),
        ("CategoricalCrossentropy", True),
        (keras.losses.CategoricalCrossentropy(label_smoothing=0.1), True),
        (keras.losses.CategoricalCrossentropy(name="smooth"), True),
        (keras.losses.categorical_crossentropy, True),
        ("categorical_focal_crossentropy", True),
        ("binary_crossentropy", True),
        ("mse", True),
        (own_sparse_loss, False),
        (own_one_hot_loss, True),
        (own_loss_by_one_hot, False),
        pytest.param(
            own_loss_by_gathering,
            False,
            marks=pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="its gather"),
        ),
        (["sparse_categorical_crossentropy"], False),
    ],
)
def test_labels_are_what_the_loss_takes(loss, is_one_hot):
    model = network(loss)
    y = np.array([2, 0, 1], np.uint8)
    labels = training.as_loss_wants(model, y)
    if not is_one_hot:
        assert labels is y
    else:
        assert labels.dtype == np.float32
        assert labels.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    model.run_eagerly = True  # nothing to trace for three images
    model.evaluate(data(3)[0], labels, verbose=0)


def test_accuracy_is_the_fraction_that_is_right():
    x, y = data(700)  # more than one batch, and the last not full
    model = network()
    right = np.argmax(model.predict(x, verbose=0), axis=1) == y
    assert training.accuracy(model, (x, y)) == pytest.approx(right.mean(), abs=1e-6)
