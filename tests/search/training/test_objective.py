import dataclasses

import keras
import keras_tuner
import numpy as np
import pytest

from search import artifacts
from search.data import datasets
from search.settings import Settings
from search.training import averaging, backend, features, training
from search.training.keras_tasks import KerasTasks
from search.training.training_data import TrainingData
from search.workers import devices
from search.workers.devices import Device
from studies.study import Study

# 6 600 training images: 5 500 to learn from, 1 100 to validate on, of which 275 at every report.
NUM_IMAGES = 6_600
MESSAGE = {"type": "start", "task": "trial", "trial": 0, "attempt": 1, "seed": 5}


@pytest.fixture(autouse=True)
def _float32():
    yield
    keras.config.set_dtype_policy("float32")


def made_up(dataset, part):
    """Images of a class differ by one pixel, not always; the test set must not be asked for."""
    if part == "test":
        raise AssertionError("the test set was read")
    rng = np.random.default_rng(0)
    y = np.arange(NUM_IMAGES, dtype=np.uint8) % 3
    x = rng.integers(0, 256, (NUM_IMAGES, 2, 2, 1)).astype(np.uint8)
    x[:, 0, 0, 0] = np.where(rng.random(NUM_IMAGES) < 0.7, y * 100, x[:, 0, 0, 0])
    return x, y


@pytest.fixture
def made_up_data(monkeypatch):
    row = datasets.Dataset(
        name="made-up", input_shape=(2, 2, 1), class_names=("a", "b", "c"), read=made_up
    )
    monkeypatch.setitem(datasets.DATASETS, "made-up", row)
    return "made-up"


class Trial:
    """Answers with the first choice and the middle of a range, and keeps what it is told."""

    number, attempt = 0, 1

    def __init__(self, prune_at=None, offers=(), **answers):
        self._offers = offers  # answers of each draft
        self.drafts = []
        self.reports = {}
        self.user_attrs = {}
        self.params = {}
        self.notes = []
        self._answers = answers
        self._prune_at = prune_at

    def draft(self, number):
        self.drafts.append(Trial(**self._offers[number]))
        self.drafts[-1].take = lambda: self._answers.update(self._offers[number])
        return self.drafts[-1]

    def suggest_float(self, name, low, high, *, step=None, log=False):
        return self._answer(name, (low * high) ** 0.5 if log else (low + high) / 2)

    def suggest_int(self, name, low, high, *, step=1, log=False):
        return self._answer(name, low)

    def suggest_categorical(self, name, choices):
        return self._answer(name, choices[0])

    def report(self, value, step, metrics=None, **progress):
        self.reports[step] = value

    def should_prune(self):
        return self._prune_at in self.reports

    def set_user_attr(self, key, value):
        self.user_attrs[key] = value

    def resume(self, step):
        self.resumed = step

    def progress(self, note):
        self.notes.append(note)

    def _answer(self, name, value):
        self.params[name] = self._answers.get(name, value)
        return self.params[name]


class Small(keras_tuner.HyperModel):
    """A layer or two; keeps the last model that it built."""

    def __init__(self, input_shape, num_classes, total_images):
        super().__init__()
        self.input_shape = input_shape
        self.num_classes = num_classes
        Small.total_images = total_images

    def build(self, hp):
        kind = hp.Choice("kind", ["linear", "deep"])
        layers = [keras.Input(self.input_shape), keras.layers.Rescaling(1 / 255)]
        layers.append(keras.layers.Flatten())
        if kind == "deep":
            with hp.conditional_scope("kind", ["deep"]):
                units = hp.Int("units", 4, 16, step=4)
            layers.append(keras.layers.Dense(units, activation="relu"))
        model = keras.Sequential([*layers, keras.layers.Dense(self.num_classes, dtype="float32")])
        rate = hp.Float("rate", 1e-4, 1e4, sampling="log", default=1e-2)
        model.compile(
            keras.optimizers.SGD(rate),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        Small.model = model
        return model


class Spoil(keras.callbacks.Callback):
    """Makes nonsense of the model before its last report."""

    def __init__(self, at):
        super().__init__()
        self._at = at

    def on_test_begin(self, logs=None):
        if self._at == 0:
            self.model.set_weights([-weights for weights in self.model.get_weights()])
        self._at -= 1


class SpoiltAtTheEnd(Small):
    def callbacks(self, hp):
        return [Spoil(at=3)]


def diverging(hp):
    model = Small((8, 8, 1), 10, 1).build(hp)
    model.compile(
        keras.optimizers.SGD(float("inf")),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


class Frozen(Small):
    """A frozen convolution, the same in each model, before what is trained."""

    def build(self, hp):
        frozen = keras.layers.Conv2D(
            6, 3, activation="relu", kernel_initializer=keras.initializers.GlorotUniform(3)
        )
        frozen.trainable = False
        layers = [keras.Input(self.input_shape), keras.layers.Rescaling(1 / 16), frozen]
        layers += [keras.layers.Flatten(), keras.layers.Dense(16, activation="relu")]
        layers += [keras.layers.Dense(self.num_classes, activation="softmax")]
        model = keras.Sequential(layers)
        loss = keras.losses.SparseCategoricalCrossentropy()
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
        Small.model = model
        return model


class Coarse(Small):
    """Its frozen activations differ by little from 100, of which an untrained head sees nothing."""

    def build(self, hp):
        frozen = keras.layers.Conv2D(
            6,
            3,
            bias_initializer=keras.initializers.Constant(100),
            kernel_initializer=keras.initializers.GlorotUniform(3),
            trainable=False,
        )
        layers = [keras.Input(self.input_shape), keras.layers.Rescaling(1 / 255), frozen]
        layers += [keras.layers.Flatten(), keras.layers.BatchNormalization(momentum=0.5)]
        head = keras.layers.Dense(self.num_classes, "softmax", kernel_initializer="zeros")
        model = keras.Sequential([*layers, head])
        loss = keras.losses.SparseCategoricalCrossentropy()
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
        Small.model = model
        return model


def tasks(
    space=Small, dataset="digits", precision="float32", folder="", cache_size=None, **changed
):
    fields = {"epochs": 1, "images_per_report": 400, "batch_size": 50}
    study = Study(name="mine", space=space, dataset=dataset, **(fields | changed))
    own = {field.name for field in dataclasses.fields(Settings)} & set(study.__dict__)
    settings = Settings(
        **{name: getattr(study, name) for name in own},
        file="mine.py",
        kind="space",
        precision=precision,
        folder=str(folder),
        cache_size=int(1e9) if cache_size is None else cache_size,
    )
    return KerasTasks(study, dataclasses.asdict(settings))


@pytest.fixture
def planned(monkeypatch):
    """Models and plans of the trials, which are trained no further."""
    planned = []

    def fit(self, space, hp, model, plan, *_):
        planned.append((model, plan))
        return 0.5

    monkeypatch.setattr(KerasTasks, "_fit", fit)
    return planned


def accuracy(model, x, y):
    return (np.argmax(model.predict(x, verbose=0), axis=1) == y).mean()


@pytest.mark.parametrize("average", [True, False])
def test_weights_are_averaged_unless_the_study_says_no(average, made_up_data, tmp_path):
    task = tasks(Small, made_up_data, average_weights=average)
    task.trial(Trial(), MESSAGE)
    assert averaging.is_averaged(Small.model) == average
    path = tmp_path / "m.keras"
    asked = {"params": {"kind": "linear", "rate": 0.01}, "seed": 0, "epochs": 1, "share": 1.0}
    task.retrain(lambda **_: None, asked | {"validated": False, "path": str(path)})
    assert averaging.is_averaged(keras.saving.load_model(path)) == average


def test_a_trial_is_worth_its_best_weights_on_all_validation_images(made_up_data):
    trial = Trial(rate=0.5)
    outcome = tasks(SpoiltAtTheEnd, made_up_data, images_per_report=1_375).trial(trial, MESSAGE)
    split = datasets.load_split(made_up_data)
    assert (len(split.x_val), len(split.x_monitor)) == (1_100, 275)
    assert list(trial.reports) == [1, 2, 3, 4]
    best = max(trial.reports.values())
    assert trial.reports[4] < best - 0.2  # what was learnt was spoilt
    model = Small.model
    assert accuracy(model, split.x_monitor, split.y_monitor) == pytest.approx(best)
    assert outcome["outcome"] == "complete"
    assert outcome["value"] == pytest.approx(accuracy(model, split.x_val, split.y_val))
    assert outcome["value"] != best  # the two parts can be told apart
    costs = {"parameters": model.count_params(), "flops": 35, "memory": 1_500, "cached": 0}
    assert trial.user_attrs == costs


def test_a_trial_on_digits_is_the_same_each_time():
    outcomes = []
    for seed in (5, 5, 6):
        trial = Trial(kind="deep")
        outcome = tasks(epochs=2).trial(trial, MESSAGE | {"seed": seed})
        outcomes.append((outcome, trial.reports))
        assert trial.params == {"kind": "deep", "units": 4, "rate": 1.0}
        assert len(trial.reports) == 6  # 1 197 images to learn from, 400 a report
    assert outcomes[0] == outcomes[1] != outcomes[2]
    assert 0.2 < outcomes[0][0]["value"] <= 1


def test_a_pruned_trial_is_not_measured():
    trial = Trial(prune_at=2)
    assert tasks(epochs=2).trial(trial, MESSAGE) == {"outcome": "pruned"}
    assert list(trial.reports) == [1, 2]
    assert "parameters" in trial.user_attrs


def test_a_diverged_trial_says_at_which_report():
    trial = Trial()
    outcome = tasks(diverging).trial(trial, MESSAGE)
    assert outcome == {"outcome": "diverged", "reason": "loss was nan at report 1"}
    assert trial.reports == {}


def test_the_batch_size_is_the_space_s_or_the_study_s():
    steps = []

    class Count(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            steps.append(int(self.model.optimizer.iterations))

    class OwnBatches(Small):
        def build(self, hp):
            hp.Choice("batch_size", [100])
            return super().build(hp)

        def callbacks(self, hp):
            return [Count()]

    class StudyBatches(Small):
        def callbacks(self, hp):
            return [Count()]

    for space in (OwnBatches, StudyBatches):
        tasks(space, epochs=0.4).trial(Trial(), MESSAGE)
    assert steps == [4, 8]


def test_a_study_describes_its_space_and_its_points_made_whole():
    points = ({}, {"kind": "deep", "rate": 0.25})
    described = tasks(known_points=points, epochs=2).describe()
    assert [hp["name"] for hp in described["space"]] == ["kind", "rate"]
    assert described["known_points"] == [
        {"kind": "linear", "rate": 1e-2},
        {"kind": "deep", "rate": 0.25, "units": 4},
    ]
    assert (described["precision"], described["num_reports"]) == ("float32", 6)


@pytest.mark.parametrize(
    ("point", "rule"),
    [
        ({"colour": "red"}, "The space never reads 'colour' at this point"),
        ({"units": 8}, "The space never reads 'units' at this point"),
        ({"kind": "wide"}, r"'kind' is one of \['linear', 'deep'\]\. Received: 'wide'"),
        ({"rate": 1e5}, r"'rate' lies between 0\.0001 and 10000\.0\. Received: 100000\.0"),
    ],
)
def test_a_wrong_known_point_names_the_study(point, rule):
    with pytest.raises(ValueError, match=f"^known_points of study 'mine': {rule}"):
        tasks(known_points=({}, point)).describe()


@pytest.mark.parametrize(
    ("precision", "policy"), [("float32", "float32"), ("bfloat16", "mixed_bfloat16")]
)
def test_models_are_built_with_the_run_s_precision(precision, policy):
    made = tasks(precision=precision)
    assert made.precision == precision
    assert keras.config.dtype_policy().name == policy


@pytest.mark.parametrize("task", ["trial", "retrain"])
def test_precision_outlives_the_memory_of_the_model_before(task, tmp_path):
    """Freeing it makes Keras forget the policy."""
    made = tasks(precision="bfloat16", epochs=0.4)
    made.trial(Trial(), MESSAGE)
    backend.release()
    assert keras.config.dtype_policy().name == "float32"
    if task == "trial":
        made.trial(Trial(kind="deep"), MESSAGE)
    else:
        params = {"kind": "deep", "units": 4, "rate": 0.5}
        made.retrain(lambda **_: None, winner(tmp_path, params, share=0.1))
    *_, hidden, last = Small.model.layers
    assert (hidden.compute_dtype, last.compute_dtype) == ("bfloat16", "float32")


class OwnPolicy(Small):
    """Chooses the precision itself, of some of its models."""

    def build(self, hp):
        if hp.Choice("kind", ["linear", "deep"]) == "deep":
            keras.config.set_dtype_policy("float32")
        return super().build(hp)


def test_a_policy_that_a_space_sets_is_that_of_one_task():
    made = tasks(OwnPolicy, precision="bfloat16", epochs=0.4)
    dtypes = []
    for kind in ("deep", "linear"):
        made.trial(Trial(kind=kind), MESSAGE)
        dtypes.append(Small.model.layers[-2].compute_dtype)
    assert dtypes == ["float32", "bfloat16"]


def test_search_and_retraining_never_read_the_test_set(made_up_data, monkeypatch, tmp_path):
    def refuse(name):
        raise AssertionError("the test set was loaded")

    monkeypatch.setattr(datasets, "load_test", refuse)
    made = tasks(dataset=made_up_data, known_points=({},), images_per_report=1_375)
    made.describe()
    trial = Trial(rate=0.1)
    assert made.trial(trial, MESSAGE)["outcome"] == "complete"
    made.retrain(lambda **_: None, winner(tmp_path, trial.params))
    with pytest.raises(AssertionError, match="the test set was loaded"):
        made.evaluate(lambda **_: None, {
            "model": str(tmp_path / "winner.keras"),
            "path": str(tmp_path / "winner.npz"),
            "history": {},
            "pictures": None,
        })  # fmt: skip


def winner(folder, params, **changed):
    message = {"type": "start", "task": "retrain", "trial": 3, "attempt": 1, "seed": 9}
    length = {"epochs": 2, "share": 0.5}
    return (
        message
        | length
        | {"validated": False, "params": params, "path": str(folder / "winner.keras")}
        | changed
    )


def test_a_retrained_winner_is_saved_whole(tmp_path):
    told = []
    params = {"kind": "deep", "units": 12, "rate": 0.5}
    outcome = tasks().retrain(lambda **figures: told.append(figures), winner(tmp_path, params))
    path = tmp_path / "winner.keras"
    assert outcome["outcome"] == "complete"
    assert outcome["sha256"] == artifacts.sha256(path)
    assert [file.name for file in tmp_path.iterdir()] == ["winner.keras"]
    # The schedule lasts 2 epochs of 1 437 images; half of it is trained, 4 reports of 400.
    assert Small.total_images == 2 * 1_437
    assert outcome["epochs"] == pytest.approx(4 * 400 / 1_437)
    assert [figures["step"] for figures in told] == [1, 2, 3, 4]
    assert set(outcome["history"]) == {"loss", "accuracy"}
    model = keras.models.load_model(path)  # no name of ours is registered
    assert outcome["parameters"] == model.count_params()
    x, y = datasets.load_train("digits")
    assert accuracy(model, x, y) == accuracy(Small.model, x, y) > 0.3


@pytest.mark.parametrize(
    ("params", "rule"),
    [
        ({"kind": "linear"}, "reads 'rate', which the stored point lacks"),
        ({"kind": "linear", "rate": 0.1, "units": 4}, "never reads 'units'"),
    ],
)
def test_a_winner_of_another_space_is_refused(tmp_path, params, rule):
    with pytest.raises(ValueError, match=rule):
        tasks().retrain(lambda **_: None, winner(tmp_path, params))
    assert list(tmp_path.iterdir()) == []


def test_a_winner_that_diverges_is_not_saved(tmp_path):
    outcome = tasks(diverging).retrain(
        lambda **_: None, winner(tmp_path, {"kind": "linear", "rate": 1.0})
    )
    assert outcome == {"outcome": "diverged", "reason": "loss was nan at report 1"}
    assert list(tmp_path.iterdir()) == []


class LastUpdateOverflows(Small):
    """Its fit hands on no callbacks, and leaves what a last update may leave."""

    def fit(self, hp, model, x, y, **options):
        model.get_layer(index=-1).kernel.assign(np.inf * np.ones_like(model.get_weights()[-2]))


def test_a_winner_whose_weights_are_not_finite_is_not_saved(tmp_path):
    params = {"kind": "linear", "rate": 0.5}
    outcome = tasks(LastUpdateOverflows).retrain(lambda **_: None, winner(tmp_path, params))
    assert outcome == {
        "outcome": "diverged", "reason": "weights that are not finite at its end"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_of_one_data_set(tmp_path):
    """`train` takes another one, also for a config whose training was killed."""
    message = {"task": "retrain", "checkpoint": str(tmp_path / "c.npz")}
    hp = keras_tuner.HyperParameters()
    plan = training.Plan(60_000, 12_800, 4, 50, 9)
    identities = {
        tasks(dataset=name)._checkpoints(message, hp, plan, np.zeros(1, np.uint8))._identity
        for name in ("mnist", "fashion_mnist")
    }
    assert len(identities) == 2


@pytest.mark.slow
def test_a_frozen_part_is_computed_once_and_changes_nothing(tmp_path):
    outcomes = []
    for cache_size in (0, 10**9, 10**9, 10**9):
        trial = Trial()
        made = tasks(Frozen, folder=tmp_path, cache_size=cache_size, epochs=3)
        outcomes.append((made.trial(trial, MESSAGE)["value"], trial.reports, trial.notes))
        if not cache_size:
            assert not (tmp_path / "features").exists()
    uncached, first, second, third = outcomes  # the second may be in need of float32
    assert first[0] == pytest.approx(uncached[0], abs=0.02)
    assert first[1] == pytest.approx(uncached[1], abs=0.02)
    assert (uncached[2], third[:2]) == ([], second[:2])
    assert first[2][0] == "features 0%"
    assert first[2][-1] == "features 100%"
    assert third[2] == []  # they lay on disk
    assert uncached[0] > 0.8


def test_a_model_with_a_frozen_part_is_saved_whole(tmp_path):
    made = tasks(Frozen, folder=tmp_path)
    outcome = made.retrain(lambda **_: None, winner(tmp_path, {}, epochs=6, share=1.0))
    assert outcome["outcome"] == "complete"
    model = keras.models.load_model(tmp_path / "winner.keras")
    x, y = datasets.load_train("digits")
    assert accuracy(model, x, y) == pytest.approx(outcome["history"]["accuracy"][-1], abs=0.05)
    assert accuracy(model, x, y) > 0.9
    assert model.input_shape == (None, 8, 8, 1)


@pytest.mark.slow
def test_without_room_for_activations_a_trial_reads_images(tmp_path, caplog):
    """Each trial says so and the log does once."""
    made = tasks(Frozen, folder=tmp_path, cache_size=1_000)
    for _ in range(2):
        trial = Trial()
        assert made.trial(trial, MESSAGE)["outcome"] == "complete"
        assert trial.notes == ["on images: no room for activations"]
        assert trial.user_attrs["trained_on"].startswith("images, for want of room: The activ")
        assert trial.user_attrs["cached"] == 0
    assert caplog.text.count("Fix: --cache-size") == 1


def test_a_trial_says_what_it_keeps_on_disk(tmp_path):
    trial = Trial()
    tasks(Frozen, folder=tmp_path, epochs=0.4).trial(trial, MESSAGE)
    (kept,) = (tmp_path / "features").glob("*/features.npy")
    array = np.load(kept, mmap_mode="r")
    assert trial.user_attrs["cached"] == array.nbytes == len(array) * 6**3 * array.itemsize
    assert trial.user_attrs["trained_on"].startswith(f"activations in {array.dtype}")


def answers(folder):
    """The saved model, and it over the activations that are on disk, as they are or rounded: what
    each says of all training images."""
    model = keras.models.load_model(folder / "winner.keras")
    x, _ = datasets.load_train("digits")
    parts = features.cut(model, x)
    data = TrainingData("digits", folder / "features", 10**9)
    with data.feeding(model, lambda note: None) as feed:
        for kept in (feed.inputs, feed.inputs.astype(np.float16).astype(np.float32)):
            said = parts.rest.predict(np.array(kept), verbose=0)
            yield model.predict(x, verbose=0), said


def assert_same_answers(exact, kept):
    assert np.abs(np.log(exact) - np.log(kept)).max() < 1e-2
    assert np.mean(exact.argmax(1) == kept.argmax(1)) >= 0.999


@pytest.mark.slow
def test_a_saved_model_answers_as_its_stored_activations_say(tmp_path):
    made = tasks(Frozen, folder=tmp_path)
    outcome = made.retrain(lambda **_: None, winner(tmp_path, {}, epochs=3, share=1.0))
    (exact, kept), _ = answers(tmp_path)
    assert_same_answers(exact, kept)
    assert outcome["trained_on"].startswith("activations in float")


@pytest.mark.slow
def test_a_winner_for_which_float16_is_too_coarse_is_trained_again(tmp_path, caplog):
    told = []
    message = winner(tmp_path, {}, epochs=3, share=1.0, checkpoint=str(tmp_path / "c.npz"))
    outcome = tasks(Coarse, folder=tmp_path).retrain(lambda **said: told.append(said), message)
    assert outcome["trained_on"] == "activations in float32"
    assert "too coarse in float16 for a trained model: logits differ by" in caplog.text
    notes = [said["note"] for said in told if "note" in said]
    assert notes.count("features 0%") == 2
    steps = [said["step"] for said in told if "step" in said]
    assert steps == 2 * list(range(1, len(outcome["history"]["loss"]) + 1))
    (exact, kept), (_, rounded) = answers(tmp_path)
    assert_same_answers(exact, kept)
    assert accuracy(Small.model, *datasets.load_train("digits")) > 0.9
    with pytest.raises(AssertionError):
        assert_same_answers(exact, rounded)


@pytest.mark.slow
def test_a_trial_for_which_float16_is_too_coarse_is_measured_on_images(tmp_path):
    made, split = tasks(Coarse, folder=tmp_path, epochs=3), datasets.load_split("digits")
    said = []
    for _ in range(2):
        trial = Trial()
        value = made.trial(trial, MESSAGE)["value"]
        assert value == pytest.approx(accuracy(Small.model, split.x_val, split.y_val))
        said.append(trial.user_attrs["trained_on"])
    coarse = "activations in float16, too coarse for what it became: its value is from images"
    assert said == [coarse, "activations in float32"]


@pytest.mark.fault("N4")
@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_parameters": 12}, "650 parameters, above max_parameters=12"),
        ({"max_flops": 99}, "1,418 flops, above max_flops=99"),
        ({"max_memory": 9_999}, "17,000 bytes of memory, above max_memory=9,999"),
    ],
)
def test_a_point_above_a_limit_costs_nothing(limits, reason):
    trial = Trial()
    outcome = tasks(**limits).trial(trial, MESSAGE)
    assert outcome == {"outcome": "invalid", "reason": reason}
    assert trial.user_attrs["parameters"] == 650
    assert trial.reports == {}


def test_limits_that_a_point_keeps_are_no_matter():
    limits = {"max_parameters": 650, "max_flops": 1_418, "max_memory": 17_000}
    assert tasks(**limits).trial(Trial(), MESSAGE)["value"] > 0


@pytest.mark.fault("N4")
def test_a_step_that_does_not_fit_into_memory_is_not_tried():
    class Wide(Small):
        def build(self, hp):
            hp.Choice("batch_size", [10**9])
            return super().build(hp)

    outcome = tasks(Wide).trial(Trial(), MESSAGE)
    assert outcome["outcome"] == "invalid"
    assert outcome["reason"].startswith("a step of 1000000000 images needs about ")


@pytest.mark.fault("N4")
def test_workers_share_the_memory(monkeypatch):
    """What fits beside one other does not fit beside three."""
    monkeypatch.setattr(devices, "memory", lambda: 2 * 17_000)
    for workers, outcome in ((2, "complete"), (4, "invalid")):
        for name, value in Device(1, workers=workers).environment().items():
            if "WORKERS" in name:
                monkeypatch.setenv(name, value)
        got = tasks().trial(Trial(), MESSAGE)
        assert got["outcome"] == outcome
    assert got["reason"].endswith("above this machine's 0.0 GB among 4 workers")


@pytest.mark.parametrize(
    ("offers", "limits", "units"),
    [
        ([{"units": 16}, {"units": 8}, {"units": 12}], {}, 8),
        ([{"units": 8}, {"units": 16}], {}, 8),
        # What can't be trained is no bargain.
        ([{"units": 16}, {"units": 4, "batch_size": 10**9}], {}, 16),
        ([{"units": 16}, {"units": -4}], {}, 16),
        # Nor is any, if none can be.
        ([{"units": 16}, {"units": 8}], {"max_parameters": 1}, 16),
    ],
)
def test_the_cheapest_draft_is_trained(planned, offers, limits, units):
    class Batches(Small):
        def build(self, hp):
            hp.Choice("batch_size", [50, 10**9])
            return super().build(hp)

    trial = Trial(kind="deep", offers=[{"kind": "deep"} | offer for offer in offers])
    outcome = tasks(Batches, **limits).trial(trial, MESSAGE | {"drafts": len(offers)})
    assert outcome["outcome"] == ("invalid" if limits else "complete")
    assert trial.params["units"] == units
    assert [model.layers[-2].units for model, _ in planned] == ([] if limits else [units])


def test_the_batch_size_is_the_run_s(planned, made_up_data):
    """A config is trained with its own, whatever its study's file says by now."""
    memory = []
    for batch_size in (50, 25):
        task, trial = tasks(Small, made_up_data), Trial()
        task._settings["batch_size"] = batch_size
        task.trial(trial, MESSAGE)
        memory.append(trial.user_attrs["memory"])
    assert [plan.batch_size for _, plan in planned] == [50, 25]
    assert memory[0] > memory[1]


def test_a_draft_that_is_taken_is_trained_as_if_there_had_been_no_other(made_up_data):
    """`repeat` trains it again by its values and its seed."""
    alone, chosen = Trial(kind="deep", units=8), Trial(offers=[{"kind": "deep", "units": 8}] * 2)
    tasks(Small, made_up_data).trial(alone, MESSAGE)
    tasks(Small, made_up_data).trial(chosen, MESSAGE | {"drafts": 2})
    assert len(chosen.drafts) == 2
    assert chosen.reports == alone.reports


class ByName(Small):
    """Finds a layer by the name that Keras gives it."""

    def build(self, hp):
        model = super().build(hp)
        assert model.get_layer("dense") is model.layers[2]
        hp.Choice("patience", [1, 2])
        return model

    def callbacks(self, hp):
        return [keras.callbacks.EarlyStopping(patience=hp.Int("slower", 3, 5))]


def test_layers_have_the_names_that_they_have_alone(made_up_data):
    """Whatever else was built before, and where only callbacks read something."""
    points = ({}, {"kind": "deep"}, {"slower": 5})
    described = tasks(ByName, made_up_data, known_points=points).describe()
    assert [point["slower"] for point in described["known_points"]] == [3, 3, 5]
    trial = Trial(offers=[{"kind": "deep"}, {"kind": "linear"}])
    outcome = tasks(ByName, made_up_data).trial(trial, MESSAGE | {"drafts": 2})
    assert outcome["outcome"] == "complete"


class Shrinking(Small):
    """No model where its kernel is wider than the image."""

    def build(self, hp):
        model = super().build(hp)
        shape = model.input_shape[1:]
        wide = keras.layers.Conv2D(1, hp.Int("kernel", 3, 99))
        wide(keras.Input((*shape, 1)[:3]))
        return model


@pytest.mark.fault("N4")
def test_a_point_that_keras_cannot_build_is_invalid():
    assert tasks(Shrinking).describe()
    outcome = tasks(Shrinking).trial(Trial(kernel=50), MESSAGE)
    assert outcome["outcome"] == "invalid"
    assert outcome["reason"].startswith("it can't be built: ")
    assert tasks(Shrinking).trial(Trial(), MESSAGE)["outcome"] == "complete"


def test_a_killed_trial_goes_on_after_its_last_report(tmp_path, monkeypatch):
    monkeypatch.setattr("search.training.checkpoints.SHARE", 1e9)
    message = MESSAGE | {"checkpoint": str(tmp_path / "trial-0.npz")}

    class Killed(Exception):
        pass

    class Mortal(Trial):
        def report(self, value, step, metrics=None, **progress):
            super().report(value, step)
            if step == 5:
                raise Killed

    alone, killed, resumed = Trial(), Mortal(), Trial()
    expected = tasks(epochs=3).trial(alone, MESSAGE)
    with pytest.raises(Killed):
        tasks(epochs=3).trial(killed, message)
    assert tasks(epochs=3).trial(resumed, message) == expected
    assert resumed.resumed == 4  # the fifth was stored by the coordinator, not yet kept
    assert killed.reports | resumed.reports == pytest.approx(alone.reports)
    assert min(resumed.reports) == 5
    # At another seed it is another training.
    again = Trial()
    tasks(epochs=3).trial(again, message | {"seed": 6})
    assert min(again.reports) == 1
