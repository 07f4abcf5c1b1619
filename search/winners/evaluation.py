"""What a winner is worth: predictions on the test set, and scikit-learn's figures of them.

    predict_test(model_path, "fashion_mnist", "runs/cnn/evaluation/best.npz", history)  # a worker
    figures = measure(saved["probabilities"], saved["labels"], dataset.class_names)

The only file that calls `datasets.load_test`, and only after the search has chosen: figures of the
test set are reported, never selected on. Keras and scikit-learn load late, because the coordinator
imports this file for `measure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from search import artifacts
from search.data import datasets
from search.errors import EXIT_NOTHING_USABLE, SearchError
from search.winners import pictures

SMALLEST_PROBABILITY = 1e-7  # in the loss; keras.config.epsilon(), so that both agree


def predict_test(
    model_path: str | Path,
    dataset: str,
    out_path: str | Path,
    history: Mapping[str, Sequence[float]],
    *,
    pictures_path: str | Path | None = None,
) -> str:
    """Lets a saved model classify the test set and writes what it said. Runs in a worker.

    Args:
        model_path: a `.keras` file; plain Keras loads it, with its safe mode on.
        dataset: a name that `datasets.find` knows.
        out_path: the `.npz` to write: probabilities (n, classes) float32, labels (n,) uint8 and,
            for each entry of `history`, `history_<name>` (reports,) float64.
        history: of the training, one figure a report; kept beside the predictions for the report.
        pictures_path: another `.npz` to write, of what the report's pictures show
            (search/winners/pictures.py).

    Returns:
        What is wrong with what it said, where nothing is written since nothing can be measured; ""
        else.

    Raises:
        SearchError: if the test set is unusable, the model does not fit it, or the disk is full.
    """
    x, y = datasets.load_test(dataset)
    model = _loaded(model_path, x)
    probabilities = _predict(model, x)
    if num_bad := _num_not_finite(probabilities):
        return f"outputs that are not finite for {num_bad} of {len(x)} test images"
    arrays: dict[str, Any] = {"probabilities": probabilities, "labels": y}
    arrays |= {f"history_{name}": np.asarray(values, float) for name, values in history.items()}
    with artifacts.write_atomically(out_path) as temporary:
        np.savez(temporary, **arrays)
    if pictures_path is not None:
        train = datasets.load_train(dataset)
        pictures.write(pictures_path, model, (x, y), probabilities, train)
    return ""


def predict(model_path: str | Path, x: np.ndarray) -> np.ndarray:
    """Class probabilities (n, classes) float32 of images (n, height, width, channels) uint8.

    Raises:
        SearchError: if the model takes images of another shape.
    """
    return _predict(_loaded(model_path, x), x)


def _loaded(model_path: str | Path, x: np.ndarray) -> Any:
    import keras

    model = keras.models.load_model(model_path, compile=False)
    wanted = model.input_shape[1:]
    if len(wanted) != 3 or any(
        size not in (None, given) for size, given in zip(wanted, x.shape[1:], strict=True)
    ):
        raise SearchError(f"{model_path} takes images of shape {wanted}. Received: {x.shape[1:]}")
    return model


def _predict(model: Any, x: np.ndarray) -> np.ndarray:
    from search.training import backend

    labels = np.zeros(len(x), np.uint8)  # the batches have them; predict ignores them
    outputs = model.predict(backend.validation_batches(x, labels), verbose=0)
    return as_probabilities(outputs, _ends_in_logits(model))


def _ends_in_logits(model: Any) -> bool | None:
    """Whether the last layer that computes something is linear; None where it does not say."""
    from keras import activations, layers

    layer: Any = model
    while outputs := getattr(layer, "outputs", None):
        tensor = outputs[0]
        layer, index, _ = tensor._keras_history  # the last layer, which may be a model, too
        while type(layer) is layers.Activation and layer.activation is activations.linear:
            # Only casts, as to float32 behind a softmax in bfloat16.
            layer, index, _ = layer._inbound_nodes[index].input_tensors[0]._keras_history
    says = {activations.linear: True, activations.sigmoid: False, activations.softmax: False}
    return says.get(getattr(layer, "activation", None))


def as_probabilities(outputs: np.ndarray, is_logit: bool | None = None) -> np.ndarray:
    """Distributions over the classes, from whatever a HyperModel of the user's ends in.

    Args:
        outputs: (n, classes), of any float type: probabilities, one sigmoid for each class, or
            logits; or (n, 1), the second of two classes: a probability or a logit.
        is_logit: whether they are logits; None for a guess.

    Returns:
        (n, classes) float32.
    """
    outputs = np.asarray(outputs, np.float32)
    if is_logit is None:
        is_logit = bool(np.any((outputs < 0) | (outputs > 1)))
    if outputs.shape[1] == 1:
        second = 1 / (1 + np.exp(-outputs)) if is_logit else outputs
        return np.concatenate([1 - second, second], axis=1)
    sums = outputs.sum(axis=1, keepdims=True)
    # The width of the tolerance is a guess that lets rounded bfloat16 outputs pass.
    if not is_logit and np.all(outputs >= 0) and np.allclose(sums, 1, atol=0.02):
        return outputs
    if not is_logit and np.all(sums > 0):
        return outputs / sums
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def measure(
    probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Figures of one model on one set of images, ready for JSON.

    Args:
        probabilities: (n, classes) float.
        labels: (n,) class numbers; at least two classes occur.
        class_names: one for each column.

    Returns:
        accuracy, precision, recall, f1 and roc_auc (fractions; the last four are means over the
        classes, roc_auc one against the rest), loss (mean negative log-likelihood, nats),
        per_class {name: {precision, recall, f1, support}}, confusion_matrix (rows: label, columns:
        prediction). A class that is never predicted has precision 0.

    Raises:
        SearchError: if a shape or a value breaks these rules.
    """
    from sklearn import metrics

    probabilities, labels = np.asarray(probabilities, float), np.asarray(labels)
    _check(probabilities, labels, class_names)
    predicted = probabilities.argmax(axis=1)
    classes = list(range(len(class_names)))
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, average=None, zero_division=0
    )
    likelihood = probabilities[np.arange(len(labels)), labels].clip(SMALLEST_PROBABILITY, 1)
    # roc_auc_score(multi_class="ovr") has no answer where a class has no image.
    areas = [
        metrics.roc_auc_score(labels == label, probabilities[:, label])
        for label in np.unique(labels)
    ]
    return {
        "accuracy": float(np.mean(predicted == labels)),
        "loss": float(-np.log(likelihood).mean()),
        "precision": float(precision.mean()),
        "recall": float(recall.mean()),
        "f1": float(f1.mean()),
        "roc_auc": float(np.mean(areas)),
        "per_class": {
            name: {
                "precision": float(precision[label]),
                "recall": float(recall[label]),
                "f1": float(f1[label]),
                "support": int(support[label]),
            }
            for label, name in enumerate(class_names)
        },
        "confusion_matrix": metrics.confusion_matrix(labels, predicted, labels=classes).tolist(),
    }


def summarise(metrics_per_seed: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and spread over seeds of the scalar figures.

    Args:
        metrics_per_seed: what `measure` returned, once for each seed; at least one.

    Returns:
        {"mean": {figure: value}, "std": {figure: value}}; std is the sample's (divided by n - 1),
        and 0.0 for a single seed.
    """
    if not metrics_per_seed:
        raise ValueError("At least one seed is needed. Received: none")
    names = [name for name, value in metrics_per_seed[0].items() if isinstance(value, float)]
    values = {name: np.array([seed[name] for seed in metrics_per_seed]) for name in names}
    ddof = 1 if len(metrics_per_seed) > 1 else 0
    return {
        "mean": {name: float(values[name].mean()) for name in names},
        "std": {name: float(values[name].std(ddof=ddof)) for name in names},
    }


def _check(probabilities: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
    wanted = (len(labels), len(class_names))
    if probabilities.shape != wanted:
        raise SearchError(
            f"There is a row for each label and a column for each class: {wanted}. "
            f"Received: probabilities of shape {probabilities.shape}"
        )
    if num_bad := _num_not_finite(probabilities):
        raise SearchError(
            f"Probabilities are finite. Received: NaN or inf for {num_bad} of {len(labels)} images."
            " Fix: the model diverged; retrain it with another seed or a smaller learning rate",
            exit_code=EXIT_NOTHING_USABLE,
        )
    if len(np.unique(labels)) < 2:
        raise SearchError(
            f"At least two classes occur in a test set. Received: labels {np.unique(labels)}"
        )


def _num_not_finite(probabilities: np.ndarray) -> int:
    """Of rows."""
    return int((~np.isfinite(probabilities)).any(axis=1).sum())
