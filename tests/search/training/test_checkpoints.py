"""A training that was killed goes on as if it had not been."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from contextlib import suppress

import keras
import numpy as np
import pytest

from search.storage import storage
from search.training import averaging, checkpoints, training
from search.training.checkpoints import Checkpoints
from search.training.training import Plan, Progress
from tests import invariants
from tests.command import ROOT

PLAN = Plan(num_images=60, images_per_report=20, num_reports=8, batch_size=10, seed=3)


class Killed(Exception):
    pass


class KillAfter(keras.callbacks.Callback):
    """As a kill between two steps: an exception leaves nothing to clean up here."""

    def __init__(self, report, step=0):
        super().__init__()
        self._kill_at = {(report, step)}  # no plain value: each attempt has its own

    def on_train_batch_end(self, batch, logs=None):
        if (self._epoch, batch) in self._kill_at:
            raise Killed

    def on_epoch_begin(self, epoch, logs=None):
        self._epoch = epoch


class KillAtTheEnd(KillAfter):
    def on_train_end(self, logs=None):
        raise Killed


def data():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 60).astype(np.uint8)
    x = rng.integers(0, 100, (60, 8, 8, 1)).astype(np.uint8)
    x[:, 0, 0, 0] = y * 100
    return x, y


def network():
    """All that has a state: dropout and augmentation draw, normalisation averages, rates decay."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomTranslation(0.1, 0.1),
        keras.layers.Conv2D(4, 3),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dropout(0.3),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def small(units=4, activation=None):
    """Where it matters what is kept and what is not, not how well."""
    keras.utils.set_random_seed(1)
    layers = [
        keras.Input((8, 8, 1)),
        keras.layers.Rescaling(1 / 255),
        keras.layers.Flatten(),
        keras.layers.Dense(units, activation),
        keras.layers.Dense(3, activation="softmax"),
    ]
    model = keras.Sequential(layers)
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def decayed():
    model = network()
    rate = keras.optimizers.schedules.CosineDecay(0.02, 16)
    model.compile(keras.optimizers.AdamW(rate), model.loss, metrics=["accuracy"])
    return model


def averaged():
    model = network()
    averaging.average_weights(model)
    return model


def callbacks():
    return [
        keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=0.3),
        keras.callbacks.EarlyStopping("val_accuracy", patience=9, restore_best_weights=True),
    ]


def train(make=network, path=None, kill=None, identity="a"):
    """History over all attempts, the model, and behind which report this attempt went on."""
    model = make()
    progress = Progress(lambda **_: None, PLAN.num_reports, PLAN.images_per_report)
    others = [] if make is decayed else callbacks()
    kept = Checkpoints(path, {"training": identity}) if path else None
    told = []
    training.train(
        model,
        data(),
        PLAN,
        validation_data=data(),
        callbacks=[*others, progress, *([kill] if kill else [])],
        checkpoints=kept,
        on_resume=told.append,
    )
    return progress.history, model, sum(told)


@pytest.fixture(autouse=True)
def _after_each_report(monkeypatch):
    monkeypatch.setattr(checkpoints, "SHARE", 1e9)


@pytest.mark.parametrize(
    ("make", "kills"),
    [
        pytest.param(averaged, (1, 2, 7), marks=pytest.mark.slow),
        (averaged, (3,)),
        pytest.param(decayed, (3,), marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_that_of_a_training_left_alone(tmp_path, make, kills):
    expected, model, _ = train(make)
    for report in kills:
        with pytest.raises(Killed):
            train(make, tmp_path / "c.npz", KillAfter(report, step=1))
    # The number of callbacks is part of what is kept, so the last attempt has one as well.
    history, resumed, began = train(make, tmp_path / "c.npz", KillAfter(99))
    assert began == kills[-1]
    assert history.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(history[name], values, rtol=1e-5, atol=1e-6)
    for weight, other in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)


def killed_and_resumed(path, callbacks):
    """What two attempts of a small training return, the first of which is killed."""
    for kill in (KillAfter(2), KillAfter(99)):
        layers = [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(3, "softmax")]
        model = keras.Sequential(layers)
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
        with suppress(Killed):
            return training.train(
                model,
                data(),
                PLAN,
                validation_data=None,
                callbacks=[*callbacks(), kill],
                checkpoints=Checkpoints(path, {}),
            )


def test_what_is_hardly_better_is_no_better_after_a_kill(tmp_path):
    """Keras turns the sign of min_delta where less is better: in each attempt, and once."""
    history = killed_and_resumed(
        tmp_path / "c.npz",
        lambda: [
            keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=1e9),
            keras.callbacks.EarlyStopping("loss", patience=2, min_delta=1e9),
        ],
    )
    # An epoch is three reports. The first is the best, and two are of the attempt before.
    assert len(history["loss"]) == 1 + 2 * 3 - 2
    first = history["learning_rate"][0]
    assert history["learning_rate"] == pytest.approx([first] * 2 + [first / 2] * 3)


def test_the_seconds_of_a_training_are_those_of_all_its_attempts(tmp_path):
    attempts = []

    def callbacks():
        attempts.append(Progress(lambda **_: None, PLAN.num_reports, PLAN.images_per_report))
        attempts[-1].seconds = 1_000.0 if len(attempts) == 1 else 0.0
        return attempts[-1:]

    killed_and_resumed(tmp_path / "c.npz", callbacks)
    before, now = (progress.seconds for progress in attempts)
    assert 1_000 < before < now < 1_100


@pytest.mark.slow
def test_a_training_that_is_killed_at_its_end_has_nothing_left_to_do(tmp_path):
    """As a winner's while its model is saved; on JAX it must not be given an empty generator."""
    with pytest.raises(Killed):
        train(decayed, tmp_path / "c.npz", KillAtTheEnd(99))
    history, resumed, began = train(decayed, tmp_path / "c.npz", KillAfter(99))
    assert began == PLAN.num_reports
    expected, model, _ = train(decayed)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    for weight, other in zip(resumed.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_allclose(weight, other, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_of_another_training_is_not_taken(tmp_path):
    with pytest.raises(Killed):
        train(path=tmp_path / "c.npz", kill=KillAfter(3))
    assert Checkpoints(tmp_path / "c.npz", {"training": "a"}).reports == 3
    assert Checkpoints(tmp_path / "c.npz", {"training": "b"}).reports == 0
    assert Checkpoints(tmp_path / "other.npz", {"training": "a"}).reports == 0


def other_activation():
    """Of the same shapes, as code is that was changed between a kill and the next call."""
    return small(activation="relu")


def other_loss():
    model = small()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(), metrics=["accuracy"])
    return model


def other_rate():
    model = small()
    model.compile(keras.optimizers.Adam(0.01), model.loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize("make", [other_activation, other_loss, other_rate])
def test_changed_code_does_not_go_on_with_what_the_old_has_trained(tmp_path, caplog, make):
    with pytest.raises(Killed):
        train(small, tmp_path / "c.npz", KillAfter(3))
    assert train(make, tmp_path / "c.npz", KillAfter(99))[2] == 0
    assert "is of another model or other callbacks: begun again" in caplog.text


@pytest.mark.parametrize("make", [small, pytest.param(decayed, marks=pytest.mark.slow)])
def test_a_checkpoint_of_another_model_is_begun_again(tmp_path, caplog, make):
    """Another layer, or other callbacks, than when it was killed."""

    def wider():
        return small(units=5)

    with pytest.raises(Killed):
        train(wider if make is small else network, tmp_path / "c.npz", KillAfter(3))
    history, _, began = train(make, tmp_path / "c.npz", KillAfter(99))
    assert began == 0
    assert "is of another model or other callbacks: begun again" in caplog.text
    np.testing.assert_allclose(history["loss"], train(make)[0]["loss"], rtol=1e-5)


class WithItsOwn(keras.Model):
    """Its optimizer is not the one that it was compiled with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = keras.optimizers.Adam(0.1)


def with_its_own():
    plain = small()
    model = WithItsOwn(plain.inputs, plain.outputs)
    model.compile("adam", plain.loss, metrics=["accuracy"])
    return model


def test_a_model_with_another_optimizer_begins_again(tmp_path, caplog):
    with pytest.raises(Killed):
        train(with_its_own, tmp_path / "c.npz", KillAfter(3))
    assert "optimizers of its own: once killed, it begins again" in caplog.text
    assert not (tmp_path / "c.npz").exists()


def scaled():
    """As under mixed_float16. Its `build` makes its variables anew each time."""
    model = small()
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam())
    model.compile(optimizer, model.loss, metrics=["accuracy"])
    return model


def coarse():
    """Of bfloat16 variables, which NumPy writes but does not know when it reads them."""
    keras.config.set_dtype_policy("bfloat16")
    try:
        return network()
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("make", [scaled, pytest.param(coarse, marks=pytest.mark.slow)])
def test_variables_of_any_kind_are_taken_up(tmp_path, make):
    with pytest.raises(Killed):
        train(make, tmp_path / "c.npz", KillAfter(3, step=1))
    history, _, began = train(make, tmp_path / "c.npz", KillAfter(99))
    assert began == 3
    assert len(history["loss"]) == PLAN.num_reports


@pytest.mark.fault("A2")
@pytest.mark.parametrize(
    "damage",
    [
        "truncated",
        pytest.param("empty", marks=pytest.mark.slow),
        pytest.param("garbage", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_checkpoint_is_begun_again(tmp_path, caplog, damage):
    path = tmp_path / "c.npz"
    with pytest.raises(Killed):
        train(small, path, KillAfter(3))
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "empty": b"", "garbage": b"no"}[damage]
    )
    history, _, began = train(small, path)
    assert began == 0
    assert len(history["loss"]) == PLAN.num_reports
    assert "is damaged" in caplog.text


@pytest.mark.fault("S4")
def test_a_full_disk_costs_the_checkpoint_alone(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    history, _, _ = train(small, tmp_path / "file" / "c.npz")
    assert len(history["loss"]) == PLAN.num_reports
    assert "no checkpoint: " in caplog.text


def test_writing_takes_its_share_of_the_time_at_most(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoints, "SHARE", 0.02)
    monkeypatch.setattr("search.training.checkpoints.time.monotonic", lambda: now[0])
    kept = Checkpoints(tmp_path / "c.npz", {})
    written = []

    def write(reports):
        written.append(now[0])
        now[0] += 0.1

    monkeypatch.setattr(kept, "_write", write)
    kept.set_model(network())
    for report in range(1_000):
        now[0] += 0.5
        kept.on_epoch_end(report)
    assert len(written) > 50
    assert 0.1 * len(written) / now[0] <= 0.021


def search(folder, *arguments):
    command = [sys.executable, "-m", "search", "--study", "quickstart", "--workers", "1"]
    command += ["--trials", "1", "--epochs", "40", "--no-retrain", "--out", str(folder)]
    return subprocess.Popen([*command, *arguments], cwd=ROOT, text=True, stderr=subprocess.PIPE)


def curves(folder):
    study = storage.read_study(f"sqlite:///{folder}/study.db", "quickstart")
    return [trial.intermediate_values for trial in study.trials]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The curves of a search that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    process = search(folder)
    _, output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return curves(folder)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["worker", "coordinator"])
def test_a_search_that_is_killed_goes_on_in_the_middle_of_a_trial(alone, tmp_path, whom):
    process = search(tmp_path)
    end = time.monotonic() + 100
    while not list(tmp_path.glob("checkpoints/[!.]*.npz")):  # whole ones
        assert time.monotonic() < end
        time.sleep(0.05)
    if whom == "worker":
        (worker,) = invariants.workers_of(tmp_path)
        worker.kill()
        _, output = process.communicate(timeout=200)
    else:
        process.kill()
        process.communicate()
        _, output = search(tmp_path).communicate(timeout=200)
    assert re.search(r"trial 0 goes on after report \d+", output), output
    for killed, undisturbed in zip(curves(tmp_path), alone, strict=True):
        assert killed == pytest.approx(undisturbed, abs=1e-6)
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.slow
def test_winners_that_are_retrained_leave_a_running_trial_its_checkpoint(tmp_path):
    process = search(tmp_path, "--epochs", "1")
    _, output = process.communicate(timeout=200)
    assert process.returncode == 0, output
    study = storage.at(f"sqlite:///{tmp_path}/study.db").open("quickstart")
    study.ask()  # as a search has that was interrupted, or whose time was spent
    study._storage.remove_session()
    path = tmp_path / "checkpoints" / "trial-1.npz"
    path.parent.mkdir(exist_ok=True)
    path.write_text("how far it has come")
    retrain = [sys.executable, "-m", "search", "retrain", "--study", "quickstart", "--seeds", "1"]
    done = subprocess.run(
        [*retrain, "--out", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "metrics.json").exists()
    assert path.exists()
