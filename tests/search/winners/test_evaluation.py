import json
import math

import numpy as np
import pytest
from sklearn import metrics

from search.data import datasets
from search.errors import EXIT_NOTHING_USABLE, SearchError
from search.winners import evaluation
from tests.command import ROOT

# Keras 3.15 turns TensorFlow variables, which lack the keyword, into arrays of NumPy 2.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

NAMES = ("shirt", "coat", "bag")

# Predicted 0, 1, 1, 0 where 0, 0, 1, 2 is right: "bag" is never predicted.
PROBABILITIES = np.array([[0.7, 0.2, 0.1], [0.3, 0.5, 0.2], [0.1, 0.8, 0.1], [0.6, 0.0, 0.4]])
LABELS = np.array([0, 0, 1, 2])


@pytest.mark.parametrize(
    ("figure", "by_hand"),
    [
        ("accuracy", 2 / 4),
        ("loss", -math.log(0.7 * 0.3 * 0.8 * 0.4) / 4),
        ("precision", (1 / 2 + 1 / 2 + 0) / 3),
        ("recall", (1 / 2 + 1 + 0) / 3),
        ("f1", (1 / 2 + 2 / 3 + 0) / 3),
        # of the pairs (of the class, not of it), those ranked rightly: 3 of 4, 3 of 3, 3 of 3
        ("roc_auc", (3 / 4 + 1 + 1) / 3),
        ("confusion_matrix", [[1, 1, 0], [0, 1, 0], [1, 0, 0]]),
    ],
)
def test_figures_are_those_computed_by_hand(figure, by_hand):
    measured = evaluation.measure(PROBABILITIES, LABELS, NAMES)
    np.testing.assert_allclose(measured[figure], by_hand)
    assert json.loads(json.dumps(measured)) == measured


def test_figures_of_each_class():
    per_class = evaluation.measure(PROBABILITIES, LABELS, NAMES)["per_class"]
    assert list(per_class) == list(NAMES)
    assert per_class["shirt"] == {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2}
    assert per_class["bag"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_figures_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    probabilities = generator.dirichlet(np.ones(5), 200)
    labels = generator.integers(0, 5, 200)
    measured = evaluation.measure(probabilities.astype(np.float32), labels, "abcde")
    area = metrics.roc_auc_score(labels, probabilities, multi_class="ovr", average="macro")
    assert measured["roc_auc"] == pytest.approx(area, rel=1e-6)
    assert measured["loss"] == pytest.approx(metrics.log_loss(labels, probabilities), rel=1e-6)


def test_a_class_without_images_and_a_certain_error():
    probabilities = np.array([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    measured = evaluation.measure(probabilities, np.array([0, 1, 0]), NAMES)
    assert measured["per_class"]["bag"]["support"] == 0
    assert measured["loss"] == pytest.approx(-2 * math.log(1e-7) / 3)
    assert measured["roc_auc"] == pytest.approx((0.25 + 0.5) / 2)


@pytest.mark.parametrize(
    ("probabilities", "labels", "said", "exit_code"),
    [
        (PROBABILITIES[:3], LABELS, r"\(4, 3\).*Received: .*\(3, 3\)", 1),
        (PROBABILITIES[:, :2], LABELS, r"\(4, 3\).*Received: .*\(4, 2\)", 1),
        (PROBABILITIES * np.nan, LABELS, "NaN or inf for 4 of 4", EXIT_NOTHING_USABLE),
        (PROBABILITIES, LABELS * 0, "At least two classes", 1),
    ],
)
def test_what_cannot_be_measured_is_refused(probabilities, labels, said, exit_code):
    with pytest.raises(SearchError, match=said) as caught:
        evaluation.measure(probabilities, labels, NAMES)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize(
    ("accuracies", "mean", "std"),
    [([0.9], 0.9, 0.0), ([0.8, 0.9], 0.85, 0.1 / math.sqrt(2)), ([0.5] * 3, 0.5, 0.0)],
)
def test_mean_and_spread_over_seeds(accuracies, mean, std):
    seeds = [{"accuracy": value, "confusion_matrix": [[1]]} for value in accuracies]
    summary = evaluation.summarise(seeds)
    assert summary["mean"] == {"accuracy": pytest.approx(mean)}
    assert summary["std"] == {"accuracy": pytest.approx(std)}


def test_no_seed_has_no_mean():
    with pytest.raises(ValueError, match="At least one seed"):
        evaluation.summarise([])


@pytest.mark.parametrize(
    ("outputs", "probabilities"),
    [
        ([[0.25, 0.75]], [[0.25, 0.75]]),
        ([[0.0, 0.0]], [[0.5, 0.5]]),
        ([[math.log(3), 0.0], [2000.0, -2000.0]], [[0.75, 0.25], [1.0, 0.0]]),
    ],
)
def test_logits_become_probabilities(outputs, probabilities):
    given = evaluation.as_probabilities(np.array(outputs))
    assert given.dtype == np.float32
    np.testing.assert_allclose(given, probabilities, rtol=1e-6)


def softmax(outputs):
    powers = np.exp(outputs)
    return powers / powers.sum(axis=1, keepdims=True)


def of_second(outputs):
    return np.concatenate([1 - outputs, outputs], axis=1)


@pytest.mark.parametrize("behind", ["nothing", "a cast", "a model around it"])
@pytest.mark.parametrize(
    ("units", "activation", "expected"),
    [
        (1, "linear", lambda x: of_second(1 / (1 + np.exp(-x)))),
        (1, "sigmoid", lambda x: of_second(1 / (1 + np.exp(-x)))),
        (3, "linear", softmax),
        (3, "softmax", softmax),
    ],
)
def test_what_a_model_ends_in_says_what_its_outputs_are(
    tmp_path, units, activation, expected, behind
):
    """Not where they lie: these are between 0 and 1, whatever they are."""
    import keras

    layers = [keras.layers.Rescaling(1 / 255), keras.layers.Flatten()]
    model = keras.Sequential([keras.Input((1, 1, 1)), *layers])
    model.add(keras.layers.Dense(units, activation, use_bias=False))
    kernel = np.linspace(1, 0.5, units)[np.newaxis]
    model.set_weights([kernel])
    if behind == "a cast":  # as Keras's guide to mixed precision ends a model
        model.add(keras.layers.Activation("linear", dtype="float32"))
    elif behind != "nothing":
        model = keras.Sequential([keras.Input((1, 1, 1)), model])
    model.save(tmp_path / "m.keras")
    x = np.array([51, 204, 255], np.uint8).reshape(3, 1, 1, 1)
    given = evaluation.predict(tmp_path / "m.keras", x)
    np.testing.assert_allclose(given, expected(x.reshape(3, 1) / 255 @ kernel), rtol=1e-5)


def test_where_a_model_s_end_says_nothing_its_outputs_do(tmp_path):
    """As of one that was trained on labels of -1 and 1."""
    import keras

    layers = [keras.layers.Flatten(), keras.layers.Dense(1, "tanh", kernel_initializer="ones")]
    keras.Sequential([keras.Input((1, 1, 1)), keras.layers.Rescaling(2, -255), *layers]).save(
        tmp_path / "m.keras"
    )
    given = evaluation.predict(tmp_path / "m.keras", np.array([[[[0]]], [[[255]]]], np.uint8))
    assert given.min() > 0
    assert given.argmax(axis=1).tolist() == [0, 1]


@pytest.fixture
def tiny(monkeypatch):
    """A data set of 700 test images: a full batch and a rest. Its training set may not be read."""
    generator = np.random.default_rng(0)
    test = (
        generator.integers(0, 256, (700, 4, 4, 1), dtype=np.uint8),
        generator.integers(0, 3, 700, dtype=np.uint8),
    )
    row = datasets.Dataset(
        name="tiny",
        input_shape=(4, 4, 1),
        class_names=NAMES,
        read=lambda _, part: {"test": test}[part],
    )
    monkeypatch.setitem(datasets.DATASETS, "tiny", row)
    return test


def dense_model(path, *, size=4, activation="softmax"):
    import keras

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((size, size, 1), dtype="uint8"),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            layers.Dense(3, activation=activation, dtype="float32"),
        ]
    )
    model.save(path)
    return model


@pytest.mark.parametrize("activation", ["softmax", "linear"])
def test_predictions_of_a_saved_model(tmp_path, tiny, activation):
    model = dense_model(tmp_path / "m.keras", activation=activation)
    out = tmp_path / "evaluation" / "m.npz"
    history = {"loss": [2.0, 1.5], "val_loss": [2.1]}
    evaluation.predict_test(tmp_path / "m.keras", "tiny", out, history)

    x, y = tiny
    weights, bias = (np.asarray(w) for w in model.layers[-1].get_weights())
    powers = np.exp((x / 255).reshape(700, 16) @ weights + bias)
    with np.load(out) as saved:
        np.testing.assert_allclose(
            saved["probabilities"], powers / powers.sum(axis=1, keepdims=True), rtol=1e-4
        )
        assert saved["probabilities"].dtype == np.float32
        np.testing.assert_array_equal(saved["labels"], y)
        np.testing.assert_array_equal(saved["history_loss"], [2.0, 1.5])
        np.testing.assert_array_equal(saved["history_val_loss"], [2.1])
    assert [path.name for path in out.parent.iterdir()] == ["m.npz"]


def test_what_can_t_be_measured_is_said_and_not_written(tmp_path, tiny):
    model = dense_model(tmp_path / "m.keras")
    weights, bias = model.layers[-1].get_weights()
    model.layers[-1].set_weights([weights * np.nan, bias])
    model.save(tmp_path / "m.keras")
    out = tmp_path / "m.npz"
    said = evaluation.predict_test(tmp_path / "m.keras", "tiny", out, {})
    assert said == "outputs that are not finite for 700 of 700 test images"
    assert not out.exists()


def test_a_model_of_another_shape_is_refused(tmp_path, tiny):
    dense_model(tmp_path / "m.keras", size=5)
    with pytest.raises(
        SearchError, match=r"m.keras takes images of shape \(5, 5, 1\). Received: \(4, 4, 1\)"
    ):
        evaluation.predict_test(tmp_path / "m.keras", "tiny", tmp_path / "m.npz", {})


def test_the_test_set_has_one_reader():
    sources = [
        path for top in ("search", "spaces", "studies") for path in (ROOT / top).rglob("*.py")
    ]
    callers = {path.name for path in sources if "load_test(" in path.read_text()}
    assert callers == {"datasets.py", "evaluation.py"}
