"""A model and its training as a Python script that needs Keras and nothing of this project.

    text = script(model, Training(...), title="Trial 41 of study cnn", dataset=DataSource(...))

The script loads the data, builds the model layer by layer, trains it on the same images in the
same order, and measures it on the test set. Called in a process that has Keras, with the model as
its space compiled it, not trained yet.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from search.codegen.data import DataCode, DataSource, data_code
from search.codegen.expressions import NAMESPACE, call_text, expression
from search.codegen.layout import WIDTH, wrapped
from search.codegen.model import functions
from search.training.training import as_loss_wants

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the model is trained."""

    seed: int
    precision: str  # float32 or bfloat16
    batch_size: int
    steps_per_report: int
    num_reports: int
    num_images: int  # in the training set

    @property
    def epochs(self) -> float:
        """Passes over the training set."""
        images = self.num_reports * self.steps_per_report * self.batch_size
        return images / self.num_images


def script(
    model: keras.Model,
    training: Training,
    *,
    title: str,
    dataset: DataSource,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    own_fit: bool = False,
    is_pretrained: bool = False,
) -> str:
    """The whole script.

    Args:
        model: built and compiled under the training's precision.
        title: which model this is; the script begins with it.
        callbacks: those that the space brings, patience and cooldown in reports (with own_fit in
            epochs). A monitor `val_loss` becomes `loss`, since the script trains on all that is not
            test data. A callback that can't be written becomes a comment.
        own_fit: the space trains with a `fit` of its own, which can't be copied.
        is_pretrained: the space says that it gives the model weights to begin with; else that is
            only seen where they are not drawn, as biases are not.

    Raises:
        ValueError: if a part of the model, or the data set, can't be written as code; the message
            names it and says why.
    """
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(_POLICIES[training.precision])
    try:
        network = functions(model)
    finally:
        keras.config.set_dtype_policy(policy)
    data = data_code(dataset)
    has_weights = is_pretrained or network.has_weights
    main = _main(model, training, callbacks, own_fit=own_fit, has_weights=has_weights)
    code = [data.code, network.code, *([] if own_fit else [_BATCHES]), main]
    body = "\n\n\n".join([*code, 'if __name__ == "__main__":\n    main()\n'])
    head = [
        _docstring(title, training, data, own_fit=own_fit),
        _imports(data, body),
        _constants(training, dataset, data, body),
    ]
    return "\n\n".join(head) + "\n\n\n" + body


_BATCHES = '''\
def batches(x, y):
    """The batches of the whole training: pass after pass over the images, each in another order."""
    num_steps = NUM_REPORTS * STEPS_PER_REPORT
    num_passes = math.ceil(num_steps * BATCH_SIZE / len(x))
    order = np.concatenate(
        [np.random.default_rng([SEED, number]).permutation(len(x)) for number in range(num_passes)]
    )
    for step in range(num_steps):
        chosen = order[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]
        yield x[chosen], y[chosen]'''

_MEASURE = """\
    # The loss is the one that is trained, label smoothing included.
    figures = model.evaluate(x_test, y_test, batch_size=500, verbose=0, return_dict=True)
    print(f"parameters: {model.count_params()}")
    for name, value in figures.items():
        print(f"test {name}: {value:.4f}")
    model.save(MODEL_FILE)"""


def _docstring(title: str, training: Training, data: DataCode, *, own_fit: bool) -> str:
    packages = ["Keras 3 with a backend", "NumPy", *data.needs]
    says = "" if own_fit else "a line for each report, then "
    paragraphs = [
        " ".join(title.split()).rstrip(".") + ".",
        "    python model.py",
        f"It needs {', '.join(packages[:-1])} and {packages[-1]}. It trains for "
        f"{training.epochs:.1f} passes over {training.num_images:,} images, prints {says}the "
        "number of parameters and the figures on the test set, and saves the model as model.keras.",
    ]
    text = "\n\n".join(
        textwrap.fill(part, WIDTH - 4) if part[0] != " " else part for part in paragraphs
    )
    text = text.replace("\\", "\\\\").replace('"""', "'''")
    return f'"""{text}\n"""'


def _imports(data: DataCode, body: str) -> str:
    standard = [line for line in data.imports if line.startswith("from pathlib")]
    if "math." in body:
        standard.insert(0, "import math")
    others = ["import keras"]
    if "np." in body:
        others.append("import numpy as np")
    if re.search(r"(?<!keras\.)\blayers\.", body):
        others.append("from keras import layers")
    others += [line for line in data.imports if line not in standard]
    return "\n\n".join("\n".join(lines) for lines in (standard, others) if lines)


def _constants(training: Training, dataset: DataSource, data: DataCode, body: str) -> str:
    lines = [
        *data.constants,
        f"NUM_CLASSES = {dataset.num_classes}",
        f"SEED = {training.seed}",
        f"BATCH_SIZE = {training.batch_size}",
        "# A report is what Keras calls an epoch, shorter than a pass over the images.",
        f"STEPS_PER_REPORT = {training.steps_per_report}",
        f"NUM_REPORTS = {training.num_reports}  # {training.epochs:.1f} passes",
        f"EPOCHS = {max(1, round(training.epochs))}",
        'MODEL_FILE = "model.keras"',
    ]
    used = [line for line in lines if re.search(rf"\b{line.split()[0]}\b", body)]
    return "\n".join(
        line
        for number, line in enumerate(lines)
        if line in used or (line.startswith("#") and lines[number + 1] in used)
    )


def _main(
    model: keras.Model,
    training: Training,
    callbacks: Sequence[keras.callbacks.Callback],
    *,
    own_fit: bool,
    has_weights: bool,
) -> str:
    lines = ["def main():", "    keras.utils.set_random_seed(SEED)"]
    if training.precision != "float32":
        policy = _POLICIES[training.precision]
        lines.append(
            "    # Layers compute in bfloat16, weights stay float32; without this all is float32."
        )
        lines.append(f'    keras.config.set_dtype_policy("{policy}")')
    lines.append("    (x_train, y_train), (x_test, y_test) = load_data()")
    lines += _labels(model)
    lines.append("")
    if has_weights:
        lines.append("    # The trial began with weights of its own, such as pretrained ones; this")
        lines.append("    # model begins with random ones, and its figures will differ.")
    lines += ["    model = build()", "    compile_model(model)"]
    given = {"x": "batches(x_train, y_train)", "epochs": "NUM_REPORTS"}
    given |= {"steps_per_epoch": "STEPS_PER_REPORT", "shuffle": "False"}
    if own_fit:
        lines.append("    # The space trains with a fit of its own; this is Keras's plain one.")
        given = {"x": "x_train", "y": "y_train", "batch_size": "BATCH_SIZE", "epochs": "EPOCHS"}
    written = [text for callback in callbacks if (text := _callback(callback))]
    lines += _left_out(callbacks)
    if getattr(model.optimizer, "use_ema", False):
        lines.append(
            "    # In the search the average is of the last ninth of the steps at first; here"
        )
        lines.append("    # of as many steps from the first to the last.")
        if any(getattr(callback, "restore_best_weights", False) for callback in callbacks):
            lines.append("    # The best weights are those of the average.")
            written.insert(0, "keras.callbacks.SwapEMAWeights(swap_on_epoch=True)")
    if written:
        if not own_fit and any(re.search("patience|cooldown", text) for text in written):
            lines.append("    # Patience and cooldown are counted in reports.")
        lines.append(wrapped(f"    callbacks = [{', '.join(written)}]"))
        given["callbacks"] = "callbacks"
    lines.append(wrapped(f"    {call_text('model.fit', ['x', 'y'], given | {'verbose': '2'})}"))
    return "\n".join([*lines, "", _MEASURE])


def _labels(model: keras.Model) -> list[str]:
    """Labels as `training.as_loss_wants` gives them, by their shape."""
    shape = as_loss_wants(model, np.zeros(2, np.uint8)).shape
    if len(shape) == 1:
        return []
    if shape[1] == 1:
        return [
            f'    {name} = {name}[:, np.newaxis].astype("float32")'
            for name in ("y_train", "y_test")
        ]
    return [
        '    one_hot = np.eye(NUM_CLASSES, dtype="float32")',
        "    y_train, y_test = one_hot[y_train], one_hot[y_test]",
    ]


def _left_out(callbacks: Sequence[keras.callbacks.Callback]) -> Iterator[str]:
    for callback in callbacks:
        if _callback(callback) is None:
            yield f"    # Left out: {type(callback).__name__}, a callback that is code of its own."


def _callback(callback: keras.callbacks.Callback) -> str | None:
    """The call that makes it, from its attributes; None for one of the space's own, or one that
    doesn't keep what it was made with."""
    made_by = type(callback)
    if getattr(keras.callbacks, made_by.__name__, None) is not made_by:
        return None
    parameters = {
        name: parameter.default
        for name, parameter in inspect.signature(made_by).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    try:
        values = {name: _attribute(callback, name) for name in parameters}
        given = {
            name: expression(keras.saving.serialize_keras_object(value))
            for name, value in values.items()
            if value != parameters[name]
        }
    except (AttributeError, ValueError):
        return None
    text = call_text(f"keras.callbacks.{made_by.__name__}", list(parameters)[:1], given)
    again = eval(text, dict(NAMESPACE))
    return text if all(_attribute(again, name) == values[name] for name in values) else None


def _attribute(callback: keras.callbacks.Callback, name: str) -> Any:
    value = getattr(callback, name)
    if callable(value):
        raise ValueError(f"{name} is a function")
    if name == "monitor":
        return value.removeprefix("val_")  # there is no validation in the script
    return abs(value) if name == "min_delta" else value  # Keras turns its sign
