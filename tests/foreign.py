"""Search spaces as users of KerasTuner bring them: after its documentation and published guides
(https://keras.io/keras_tuner/), written anew from the documented API. Nothing here knows of us.
"""

import functools

import keras
import keras_tuner
import numpy as np
from keras import layers
from keras_tuner.applications import HyperEfficientNet
from keras_tuner.src.applications import efficientnet

CLASSES = 3


def dense(hp):
    """ "Getting started": a model without an Input, a switch, a logarithmic learning rate."""
    model = keras.Sequential()
    model.add(layers.Flatten())
    model.add(
        layers.Dense(
            hp.Int("units", min_value=32, max_value=128, step=32),
            activation=hp.Choice("activation", ["relu", "tanh"]),
        )
    )
    if hp.Boolean("dropout"):
        model.add(layers.Dropout(rate=0.25))
    model.add(layers.Dense(CLASSES, activation="softmax"))
    rate = hp.Float("lr", min_value=1e-4, max_value=1e-2, sampling="log")
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate=rate),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    return model


class Deep(keras_tuner.HyperModel):
    """ "Getting started": a number of layers, each with its own units; an accuracy called acc."""

    def build(self, hp):
        model = keras.Sequential([layers.Flatten()])
        for layer in range(hp.Int("num_layers", 1, 3)):
            model.add(layers.Dense(hp.Int(f"units_{layer}", 16, 64, step=16), activation="relu"))
        model.add(layers.Dense(CLASSES))
        model.compile(
            "adam",
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=[keras.metrics.SparseCategoricalAccuracy(name="acc")],
        )
        return model


class Shuffled(Deep):
    """ "Getting started": the training is tuned as well."""

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(
            *args,
            batch_size=hp.Choice("batch_size", [16, 32]),
            shuffle=hp.Boolean("shuffle"),
            **kwargs,
        )


class Epochs(Deep):
    """As the documentation of `HyperModel.fit` tunes the number of epochs."""

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, epochs=hp.Int("epochs", 1, 3), **kwargs)


class Normalised(Deep):
    """ "Getting started": data prepared according to a hyperparameter, named arguments."""

    def fit(self, hp, model, x, y, validation_data, callbacks=None, **kwargs):
        x_val, y_val = validation_data
        scale = 255.0 if hp.Boolean("normalize") else 1.0
        model.fit(
            x / scale, y, validation_data=(x_val / scale, y_val), callbacks=callbacks, **kwargs
        )
        loss, accuracy = model.evaluate(x_val / scale, y_val, verbose=0)[:2]
        return {"val_loss": loss, "val_accuracy": accuracy}


class OwnLoop(Deep):
    """ "Custom training": a loop of batches that calls the callbacks itself; returns a number."""

    def fit(self, hp, model, x, y, validation_data, epochs=1, callbacks=(), **kwargs):
        batch_size = hp.Int("batch_size", 16, 64, step=16, default=32)
        for callback in callbacks:
            callback.set_model(model)
        best = 0.0
        for epoch in range(epochs):
            for start in range(0, len(x), batch_size):
                model.train_on_batch(x[start : start + batch_size], y[start : start + batch_size])
            predicted = model.predict(validation_data[0], verbose=0).argmax(axis=-1)
            best = max(best, float(np.mean(predicted == validation_data[1])))
            for callback in callbacks:
                callback.on_epoch_end(epoch, logs={"val_accuracy": best})
        return best


class Convolutional(keras_tuner.HyperModel):
    """The documentation's image classifier: blocks in a loop, poolings, steps of dropout."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.input_shape = input_shape
        self.num_classes = num_classes

    def build(self, hp):
        inputs = keras.Input(shape=self.input_shape)
        x = inputs
        for block in range(hp.Int("conv_blocks", 1, 3, default=2)):
            filters = hp.Int(f"filters_{block}", 8, 32, step=8)
            for _ in range(2):
                x = layers.Conv2D(filters, kernel_size=(3, 3), padding="same")(x)
                x = layers.BatchNormalization()(x)
                x = layers.ReLU()(x)
            if hp.Choice(f"pooling_{block}", ["avg", "max"]) == "max":
                x = layers.MaxPool2D(2)(x)
            else:
                x = layers.AvgPool2D(2)(x)
        x = layers.GlobalAveragePooling2D()(x)
        x = layers.Dense(hp.Int("hidden_size", 30, 60, step=10, default=50), activation="relu")(x)
        x = layers.Dropout(hp.Float("dropout", 0, 0.5, step=0.1, default=0.5))(x)
        outputs = layers.Dense(self.num_classes, activation="softmax")(x)
        model = keras.Model(inputs, outputs)
        model.compile(
            optimizer=keras.optimizers.Adam(hp.Float("learning_rate", 1e-4, 1e-2, sampling="log")),
            loss="categorical_crossentropy",
            metrics=["accuracy"],
        )
        return model


class Conditional(keras_tuner.HyperModel):
    """ "Conditional hyperparameters": scopes of a parent's value, name scopes, a fixed value."""

    def build(self, hp):
        kind = hp.Choice("model_type", ["dense", "conv"])
        model = keras.Sequential()
        with hp.conditional_scope("model_type", ["dense"]):
            if kind == "dense":
                model.add(layers.Flatten())
                with hp.name_scope("hidden"):
                    model.add(layers.Dense(hp.Int("units", 16, 64, sampling="log"), "relu"))
        with hp.conditional_scope("model_type", ["conv"]):
            if kind == "conv":
                with hp.name_scope("hidden"):
                    model.add(layers.Conv2D(hp.Choice("filters", [4, 8, 16]), 3))
                model.add(layers.Flatten())
        model.add(layers.Dropout(hp.Fixed("dropout", 0.1)))
        model.add(layers.Dense(CLASSES, activation="softmax"))
        optimizer = hp.Choice("optimizer", ["adam", "rmsprop", "sgd"])
        model.compile(optimizer, loss="sparse_categorical_crossentropy", metrics=["acc"])
        return model


def binary(hp):
    """One sigmoid for two classes, as the guides of binary classification end."""
    model = keras.Sequential([layers.Rescaling(1 / 255), layers.Flatten()])
    model.add(layers.Dense(hp.Int("units", 8, 32), activation=hp.Choice("act", ["relu", "gelu"])))
    model.add(layers.Dense(1, activation="sigmoid"))
    model.compile(
        keras.optimizers.RMSprop(hp.Choice("lr", [1e-2, 1e-3])),
        loss="binary_crossentropy",
        metrics=["accuracy"],
    )
    return model


class Augmented(keras_tuner.HyperModel):
    """KerasTuner's HyperImageAugment in front of a small network."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.augment = keras_tuner.applications.HyperImageAugment(
            input_shape=input_shape, augment_layers=0, contrast=None
        )
        self.input_shape = input_shape
        self.num_classes = num_classes

    def build(self, hp):
        inputs = keras.Input(self.input_shape)
        x = self.augment.build(hp)(inputs)
        x = layers.Conv2D(hp.Int("filters", 8, 16, step=8), 3, activation="relu")(x)
        x = layers.GlobalMaxPooling2D()(x)
        model = keras.Model(inputs, layers.Dense(self.num_classes, activation="softmax")(x))
        model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
        return model


class EfficientNet(HyperEfficientNet):
    """KerasTuner's, from random weights: those of ImageNet may not be at hand."""

    def build(self, hp):
        for name, make in efficientnet.EFFICIENTNET_MODELS.items():
            if not isinstance(make, functools.partial):
                efficientnet.EFFICIENTNET_MODELS[name] = functools.partial(make, weights=None)
        hp.Fixed("version", "B0")  # the others take minutes for an image of 300 x 300 on a core
        return super().build(hp)
