"""A space as the workers use it, whoever wrote it: KerasTuner's HyperModels and `build(hp)` alike.

    space = Space(study.space, dataset, total_images=250_000)
    model = space.build(hp)

What a model needs for the search and lacks (an input shape, accuracy among its metrics) is added;
what can't work is refused at the first build, before the first trial.
"""

from __future__ import annotations

import copy
import inspect
import math
import re
import types
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import keras_tuner
import numpy as np

ACCURACY = "accuracy"
# Activations are functions; the others may be, too.
_GIVEN = (
    types.FunctionType,
    keras.Initializer,
    keras.Regularizer,
    keras.constraints.Constraint,
)


class Images(NamedTuple):
    """What a space is told of a data set."""

    name: str
    input_shape: tuple[int, int, int]  # height, width, channels
    num_classes: int


class Space:
    """A study's space, for one data set and one length of training.

    Args:
        space: a HyperModel (class or instance) or a function build(hp). A class is called with
            those of input_shape, num_classes (also called classes), total_images and weights that
            it takes.
        total_images: seen in a whole training.
        weights: file of pretrained ones, or "none"; None where the study says nothing of them, and
            the class's own default stands.
    """

    def __init__(self, space: Any, dataset: Images, total_images: int, weights: str | None = None):
        self._dataset = dataset
        self._space = space
        self._takes_weights = False
        if inspect.isclass(space):
            known = {
                "input_shape": dataset.input_shape,
                "num_classes": dataset.num_classes,
                "classes": dataset.num_classes,
                "total_images": total_images,
            }
            if weights is not None:
                known["weights"] = weights
            taken = inspect.signature(space).parameters
            self._takes_weights = weights is not None and "weights" in taken
            self._space = space(**{name: value for name, value in known.items() if name in taken})

    def build(self, hp: keras_tuner.HyperParameters) -> keras.Model:
        """The compiled model of the point that hp holds, ready to be trained and measured.

        Raises:
            ValueError: if it isn't compiled, has no graph of layers, or doesn't map the data set's
                images to its classes.
        """
        model = self._space.build(hp) if hasattr(self._space, "build") else self._space(hp)
        if not isinstance(model, keras.Model) or not model.compiled:
            raise ValueError(f"A space returns a compiled Keras model. Received: {model!r}")
        if not (isinstance(model, keras.Sequential) or hasattr(model, "output_shape")):
            raise ValueError(
                "A space's model is functional or Sequential: of one that calls its layers in a "
                f"`call` of its own no shapes are known. Received: {model!r}"
            )
        if not model.built:  # a Sequential without an Input, as KerasTuner's guides write it
            model.build((None, *self._dataset.input_shape))
        self._check_shapes(model)
        if ACCURACY not in _own_metrics(model) or _ends_in_a_logit(model):
            _measure_accuracy(model)
        return model

    def callbacks(self, hp: keras_tuner.HyperParameters) -> list[keras.callbacks.Callback]:
        """Those that the space brings: a method `callbacks(hp)`, patience in epochs. They will be
        changed to count reports, so they are copies of what the space may keep; the very same only
        where its own fit may use them."""
        own = (self._space.callbacks(hp) if hasattr(self._space, "callbacks") else None) or []
        return own if trains_itself(self._space) else [copy.copy(callback) for callback in own]

    def epochs(self, hp: keras_tuner.HyperParameters) -> float:
        """Passes over the training part that suit a point: a method `epochs(hp)`, which only
        comparisons ask; else infinitely many."""
        return self._space.epochs(hp) if hasattr(self._space, "epochs") else math.inf

    def before_saving(self, model: keras.Model) -> None:
        """A method `before_saving(model)` may leave out what plain Keras could not load."""
        if hasattr(self._space, "before_saving"):
            self._space.before_saving(model)

    def is_pretrained(self, hp: keras_tuner.HyperParameters) -> bool:
        """Whether the point begins from the study's weights: all of a space that takes them do,
        unless its method `is_pretrained(hp)` says otherwise."""
        own = getattr(self._space, "is_pretrained", None)
        return self._takes_weights and (own is None or own(hp))

    def fit(
        self,
        hp: keras_tuner.HyperParameters,
        model: keras.Model,
        train_data: tuple[np.ndarray, np.ndarray],
        *,
        validation_data: tuple[np.ndarray, np.ndarray],
        epochs: int,
        callbacks: Sequence[keras.callbacks.Callback],
    ) -> Any:
        """Call the space's own `fit` as KerasTuner would; returns what it returns.

        Args:
            train_data: (n, height, width, channels) uint8 and labels as the loss wants them.
        """
        arguments = {
            "validation_data": validation_data,
            "epochs": epochs,
            "callbacks": [*self.callbacks(hp), *callbacks],
        }
        # Else the progress bar of each epoch fills the worker's log.
        keras.config.disable_interactive_logging()
        try:
            return self._space.fit(hp, model, *train_data, **arguments)
        except TypeError as error:
            # KerasTuner's documentation tunes epochs with fit(*args, epochs=hp.Int(...), **kwargs).
            if not re.search(r"multiple values for (keyword )?argument 'epochs'", str(error)):
                raise
            del arguments["epochs"]
            return self._space.fit(hp, model, *train_data, **arguments)

    def _check_shapes(self, model: keras.Model) -> None:
        dataset = self._dataset
        wanted = (dataset.num_classes, 1) if dataset.num_classes == 2 else (dataset.num_classes,)
        outputs = model.output_shape
        if not isinstance(outputs, tuple) or len(outputs) != 2 or outputs[-1] not in wanted:
            raise ValueError(
                f"A model for {dataset.name} ends in {' or '.join(map(str, wanted))} numbers for "
                f"an image, one for each class. Received: output_shape={outputs}"
            )
        inputs = model.input_shape
        if not isinstance(inputs, tuple) or not _fits(dataset.input_shape, inputs[1:]):
            raise ValueError(
                f"A model for {dataset.name} takes images of shape {dataset.input_shape}. "
                f"Received: input_shape={inputs}"
            )


def trains_itself(space: Any) -> bool:
    """Whether a HyperModel, class or instance, overrides KerasTuner's `HyperModel.fit`."""
    own = getattr(space if inspect.isclass(space) else type(space), "fit", None)
    return own not in (None, keras_tuner.HyperModel.fit)


def check_can_be_loaded(model: keras.Model) -> None:
    """Raises ValueError if the model could be saved but not loaded again: found out before it is
    trained, not after the last trial."""
    if all(map(_is_plain, model._flatten_layers())):
        return
    try:
        saved = keras.saving.serialize_keras_object(model)
        saved.pop("compile_config", None)  # a winner answers without its loss
        keras.saving.deserialize_keras_object(saved, safe_mode=True)
    except Exception as error:  # whatever the user's layers raise
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            "the model can be saved but not loaded again: give layers of your own a get_config and "
            "@keras.saving.register_keras_serializable(), and write a Lambda as one. Keras says: "
            f"{why}"
        ) from None


def _is_plain(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.Lambda | keras.layers.Wrapper):
        return False
    # A layer may have been given some of the user's own, and is saved with them.
    given = [value for value in vars(layer).values() if isinstance(value, _GIVEN)]
    return all(map(_is_kerass, [layer, *given]))


def _is_kerass(value: Any) -> bool:
    of = value if isinstance(value, types.FunctionType) else type(value)
    return str(of.__module__).startswith("keras.")


def ends_in_float32(model: keras.Model) -> bool:
    return all(str(output.dtype) == "float32" for output in model.outputs)


def value_of_fit(returned: Any, reported: Sequence[float]) -> float | None:
    """The value to maximise, from what a space's own `fit` returned.

    Args:
        returned: a number, a dictionary with val_accuracy (or with one entry), a Keras History,
            or None.
        reported: validation accuracies of the epochs, where there was a callback to hear them.

    Returns:
        None where there is nothing: the model is to be measured.

    Raises:
        ValueError: if it is none of these.
    """
    if isinstance(returned, dict):
        named = returned.get("val_accuracy", next(iter(returned.values()), None))
        if "val_accuracy" not in returned and len(returned) != 1:
            raise ValueError(
                "A dictionary that fit returns has the key 'val_accuracy', or one key, whose value "
                f"is maximised. Received: {sorted(returned)}"
            )
        returned = max(named) if isinstance(named, list) and named else named
    if isinstance(returned, keras.callbacks.History):
        return max(returned.history.get("val_accuracy", reported), default=None)
    if returned is None:
        return max(reported, default=None)
    try:
        return float(returned)
    except (TypeError, ValueError):
        raise ValueError(
            "fit returns a number to maximise, a dictionary, or the History of model.fit. "
            f"Received: {returned!r}"
        ) from None


def _measure_accuracy(model: keras.Model) -> None:
    """Compile again with accuracy beside the metrics that are there."""
    accuracy: Any = ACCURACY
    if _ends_in_a_logit(model):  # Keras's "accuracy" would ask whether it is above 0.5
        accuracy = keras.metrics.BinaryAccuracy(ACCURACY, threshold=0.0)
    config = model._compile_config.config  # as given: get_compile_config holds copies
    others = [metric for metric in _own_metrics(model) if metric != ACCURACY]
    given = {
        "optimizer": model.optimizer,
        "metrics": [*others, accuracy],
        "auto_scale_loss": False,
    }
    # Not a `compile` of its own, which may take other arguments, and has had them.
    keras.Model.compile(model, **(config | given))


def _own_metrics(model: keras.Model) -> list[Any]:
    """Those that it was compiled with; there is one output, by whose name they may be given."""
    given = getattr(model._compile_metrics, "_user_metrics", None)
    return [metric for metric in keras.tree.flatten(given) if metric is not None]


def _ends_in_a_logit(model: keras.Model) -> bool:
    losses = keras.tree.flatten(model.loss)  # by the output's name, perhaps
    return model.output_shape[-1] == 1 and any(
        getattr(loss, "from_logits", False) for loss in losses
    )


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size is None or size == given for size, given in zip(wanted, shape, strict=True)
    )
