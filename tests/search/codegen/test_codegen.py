import ast
import functools
import io
import subprocess
import sys
import warnings
from contextlib import redirect_stdout

import keras
import keras_tuner
import numpy as np
import pytest
from keras import layers, ops
from PIL import Image

from search.codegen.layout import quoted, wrapped
from search.codegen.model import functions
from search.codegen.script import DataSource, Training, script
from search.data import datasets, formats, image_folder
from search.training import averaging, training
from spaces.cnn import CNN

SHAPE = (8, 8, 1)
DIGITS = DataSource(name="digits", input_shape=SHAPE, num_classes=10)
SMALL = {"num_blocks": 1, "convs_per_block": 1, "filters": 16, "dense_units": 0, "flip": False}
PLAN = {"images_per_report": 512, "num_reports": 8, "batch_size": 64, "seed": 3}
TOTAL_IMAGES = PLAN["images_per_report"] * PLAN["num_reports"]
POINTS = [
    {},
    {"schedule": "plateau", "optimizer": "sgd", "erasing": 0.3, "label_smoothing": 0.15},
    {"schedule": "step", "optimizer": "adam", "padding": "valid", "batch_norm": False},
    {"schedule": "exponential", "features": "average", "dense_units": 0, "pooling": "average"},
]


@pytest.fixture(autouse=True)
def _keras_as_it_was():
    yield
    keras.config.set_dtype_policy("float32")


def point(values):
    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    return hp


def random_point(seed):
    hp = keras_tuner.HyperParameters()
    CNN(SHAPE, 10, TOTAL_IMAGES).build(hp)
    values = {}
    for number, parameter in enumerate(hp.space):
        if all(condition.is_active(values) for condition in parameter.conditions):
            values[parameter.name] = parameter.random_sample(seed * 1_000 + number)
    return values


def space_and_model(values):
    keras.utils.set_random_seed(PLAN["seed"])
    space = CNN(SHAPE, 10, TOTAL_IMAGES)
    return space, space.build(point(values))


def how(**changed):
    fields = {"seed": 3, "precision": "float32", "batch_size": 64, "steps_per_report": 8}
    return Training(**(fields | {"num_reports": 8, "num_images": 1_437} | changed))


def text_of(model, *, dataset=DIGITS, **options):
    training_ = options.pop("training", how())
    return script(model, training_, title="Trial 7 of study mine", dataset=dataset, **options)


def loaded(text):
    """What a script defines, without running it."""
    namespace = {"__name__": "model"}
    exec(compile(text, "model.py", "exec"), namespace)
    return namespace


def compiled(inputs, outputs, optimizer="adam", loss="categorical_crossentropy", **options):
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, loss=loss, **({"metrics": ["accuracy"]} | options))
    return model


def without_names(config):
    if isinstance(config, list | tuple):
        return [without_names(item) for item in config]
    if not isinstance(config, dict) or config.get("class_name") == "DTypePolicy":
        return config
    return {key: without_names(item) for key, item in config.items() if key != "name"}


def dense(loss="categorical_crossentropy", units=10):
    inputs = keras.Input(SHAPE)
    return compiled(inputs, layers.Dense(units)(layers.Flatten()(inputs)), loss=loss)


def layers_of(model):
    """Class and config of each layer, inner ones too, but no names."""
    return [
        layers_of(layer)
        if isinstance(layer, keras.Model)
        else (type(layer), without_names(layer.get_config()))
        for layer in model.layers
    ]


def assert_same(model, namespace):
    keras.utils.set_random_seed(PLAN["seed"])
    rebuilt = namespace["build"]()
    assert layers_of(rebuilt) == layers_of(model)
    assert rebuilt.count_params() == model.count_params()
    rebuilt.set_weights(model.get_weights())
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 9, (3, *tensor.shape[1:])) for tensor in model.inputs]
    images = [x.astype(tensor.dtype) for x, tensor in zip(images, model.inputs, strict=True)]
    images = images if len(images) > 1 else images[0]
    for one, other in zip(
        keras.tree.flatten(model(images)), keras.tree.flatten(rebuilt(images)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    namespace["compile_model"](rebuilt)
    configs = [without_names(each.get_compile_config()) for each in (rebuilt, model)]
    assert configs[0] == configs[1]


def run(text, folder):
    """Run a script as its user would, out of reach of this project; returns what it printed."""
    file = folder / "model.py"
    file.write_text(text)
    command = [sys.executable, "-I", "-W", "error::UserWarning", str(file)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    return figures(done.stdout)


def run_here(text, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with redirect_stdout(io.StringIO()) as printed:
        loaded(text)["main"]()
    return figures(printed.getvalue())


def figures(printed):
    lines = [line.split(": ") for line in printed.splitlines()[-3:]]
    return {name: float(value) for name, value in lines}


def trained(values, *, average=False):
    """A point's script, and the product's own model after the same training."""
    space, model = space_and_model(values)
    x, y = datasets.load_train("digits")
    plan = training.Plan(len(x), **PLAN)
    callbacks = space.callbacks(point(values))
    for callback in callbacks:
        training.count_in_reports(callback, plan.reports_per_epoch, has_validation=False)
    if average:
        averaging.average_weights(model)
        averaging.shorten(model, plan.num_reports * plan.steps_per_report)
    text = text_of(model, callbacks=callbacks)
    space, model = space_and_model(values)
    if average:
        averaging.average_weights(model)
    callbacks = space.callbacks(point(values))
    training.train(model, (x, y), plan, validation_data=None, callbacks=callbacks)
    return text, model


def assert_trained_alike(printed, model, folder):
    assert printed["parameters"] == model.count_params()
    accuracy = training.accuracy(model, datasets.load_test("digits"))
    # Bit for bit the same here; sums over threads may come in another order elsewhere.
    assert printed["test accuracy"] == pytest.approx(accuracy, abs=0.03)
    saved = keras.saving.load_model(folder / "model.keras")
    assert saved.count_params() == model.count_params()


# Whole scripts


@pytest.mark.slow
def test_a_script_trains_the_model_that_the_product_trains(tmp_path):
    values = SMALL | {"shift": 0, "adamw_learning_rate": 0.01}
    text, model = trained(values)
    printed = run(text, tmp_path)
    assert_trained_alike(printed, model, tmp_path)
    assert printed["test accuracy"] > 0.5


@pytest.mark.slow
def test_an_average_of_the_weights_is_kept_by_plain_keras(tmp_path, monkeypatch):
    values = SMALL | {"shift": 0, "schedule": "constant", "adamw_learning_rate": 0.01}
    text, model = trained(values, average=True)
    assert "use_ema=True, ema_momentum=64 / 73" in " ".join(text.split())
    printed = run_here(text, tmp_path, monkeypatch)
    assert_trained_alike(printed, model, tmp_path)
    assert printed["test accuracy"] > 0.5


def test_the_best_weights_are_the_average_s(tmp_path):
    model = dense()
    best = keras.callbacks.EarlyStopping("loss", patience=3, restore_best_weights=True)
    assert "SwapEMAWeights" not in text_of(model, callbacks=[best])
    averaging.average_weights(model)
    assert "callbacks = [keras.callbacks.SwapEMAWeights(swap_on_epoch=True), " in " ".join(
        text_of(model, callbacks=[best]).replace("(\n", "(").split()
    ).replace("[ ", "[")
    assert "SwapEMAWeights" not in text_of(model, callbacks=[])


@pytest.mark.slow
def test_a_plateau_is_trained_alike(tmp_path, monkeypatch):
    values = SMALL | {"schedule": "plateau", "shift": 0, "erasing": 0.2}
    text, model = trained(values)
    assert 'keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=3)' in text
    printed = run_here(text, tmp_path, monkeypatch)
    assert_trained_alike(printed, model, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_random_points_are_trained_alike(seed, tmp_path):
    values = random_point(seed)
    text, model = trained(values)
    assert_trained_alike(run(text, tmp_path), model, tmp_path)


@pytest.mark.parametrize(
    "values",
    [*POINTS[1:], 0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))],
    ids=str,
)
def test_points_of_the_space_are_built_again(values):
    values = random_point(values) if isinstance(values, int) else values
    _, model = space_and_model(values)
    namespace = loaded(text_of(model))
    keras.utils.set_random_seed(PLAN["seed"])
    for drawn, wanted in zip(namespace["build"]().get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(drawn, wanted)
    assert_same(model, namespace)


def test_biases_and_scales_are_not_decayed_either():
    _, model = space_and_model({})
    namespace = loaded(text_of(model))
    rebuilt = namespace["build"]()
    namespace["compile_model"](rebuilt)
    decayed = [
        [model.optimizer._use_weight_decay(weight) for weight in each.trainable_weights]
        for each in (model, rebuilt)
        for model in [each]
    ]
    assert decayed[0] == decayed[1]
    assert {True, False} == set(decayed[0])


def test_the_images_come_in_the_order_of_the_product():
    namespace = loaded(text_of(dense(), training=how(num_reports=20)))
    plan = training.Plan(100, **(PLAN | {"num_reports": 20}))
    positions = np.arange(100)
    order = [x for x, y in namespace["batches"](positions, positions)]
    np.testing.assert_array_equal(np.concatenate(order), plan.order())


def test_a_script_reads_as_if_written_by_hand():
    _, model = space_and_model({"label_smoothing": 0.1, "shift": 1})
    text = text_of(model)
    for line in (
        '"""Trial 7 of study mine.',
        "import math",
        "from sklearn.datasets import load_digits",
        "SEED = 3",
        "STEPS_PER_REPORT = 8",
        "NUM_REPORTS = 8  # 2.9 passes",
        '    inputs = keras.Input((8, 8, 1), dtype="uint8")',
        "    x = layers.Rescaling(1 / 255)(inputs)",
        "    # training=False is for calls such as model(x): fit() overrules it.",
        '    x = layers.RandomFlip("horizontal")(x, training=False)',
        '    x = layers.Conv2D(32, 3, padding="same", use_bias=False)(x)',
        "    x = layers.BatchNormalization(momentum=0.9)(x)",
        "    x = layers.MaxPooling2D()(x)  # (n, 4, 4, 32)",
        "    x = layers.Dropout(0.1)(x)",
        '    x = layers.Dense(256, activation="relu")(x)',
        '    outputs = layers.Dense(10, activation="softmax")(x)',
        "    learning_rate = keras.optimizers.schedules.CosineDecay(",
        "    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=0.02)",
        '    optimizer.exclude_from_weight_decay(var_names=["beta", "bias", "gamma"])',
        "        loss=keras.losses.CategoricalCrossentropy(label_smoothing=0.1),",
        "    y_train, y_test = one_hot[y_train], one_hot[y_test]",
        'if __name__ == "__main__":',
    ):
        assert line in text.splitlines(), line
    assert "name=" not in text
    assert "search" not in text
    assert "float32" in text  # of the labels and of the docstring of build only
    assert "set_dtype_policy" not in text


def test_bfloat16_is_set_and_the_last_layer_stays_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    _, model = space_and_model({})
    keras.config.set_dtype_policy("float32")
    text = text_of(model, training=how(precision="bfloat16"))
    assert keras.config.dtype_policy().name == "float32"
    assert '    keras.config.set_dtype_policy("mixed_bfloat16")' in text.splitlines()
    assert '    outputs = layers.Dense(10, activation="softmax", dtype="float32")(x)' in text
    assert text.count("dtype=") == 3  # of the input, of that layer and of the labels
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert_same(model, loaded(text))


def test_a_fit_of_the_space_s_own_becomes_a_plain_one(tmp_path, monkeypatch):
    model = dense()
    text = text_of(model, own_fit=True, training=how(batch_size=512, steps_per_report=3))
    assert "# The space trains with a fit of its own; this is Keras's plain one." in text
    assert "EPOCHS = 9" in text.splitlines()
    assert "batches" not in text
    assert "NUM_REPORTS" not in text
    assert run_here(text, tmp_path, monkeypatch)["parameters"] == model.count_params()


def test_a_model_that_began_with_weights_is_said_to():
    model = dense()
    remark = "began with weights of its own"
    assert remark not in text_of(model)
    assert remark in text_of(model, is_pretrained=True)  # as the space says, of whatever weights
    model.layers[-1].bias.assign(np.ones(10))
    assert remark in text_of(model)


@pytest.mark.parametrize("title", ['a "quoted" one', 'ends with """', "back\\slash", "two\nlines"])
def test_any_title_makes_a_docstring(title):
    text = script(dense(), how(), title=title, dataset=DIGITS)
    document = ast.get_docstring(ast.parse(text))
    assert document.startswith(" ".join(title.split()).replace('"""', "'''"))


# Graphs


def residual():
    inputs = keras.Input((16, 16, 3))
    x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    x = layers.Conv2D(
        8,
        3,
        padding="same",
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(1e-4),
    )(x)
    for filters, strides in ((8, 1), (16, 2)):
        shortcut = x
        if strides > 1:
            shortcut = layers.Conv2D(filters, 1, strides=strides)(x)
            shortcut = layers.BatchNormalization()(shortcut)
        x = layers.Conv2D(filters, 3, strides=strides, padding="same")(x)
        x = layers.Activation("relu")(layers.BatchNormalization()(x))
        x = layers.Conv2D(filters, 3, padding="same")(x)
        x = layers.Activation("relu")(layers.Add()([x, shortcut]))
    return compiled(inputs, layers.Dense(3, "softmax")(layers.GlobalAveragePooling2D()(x)))


def with_operations():
    inputs = keras.Input((8, 8, 1), dtype="uint8")
    x = ops.cast(inputs, "float32") / 255.0
    x = (x - np.array([0.5], "float32")) * 2
    y = layers.Conv2D(4, 3, padding="same")(x)
    x = ops.concatenate([ops.relu(y) + x, y], axis=-1)
    x = ops.mean(x[:, 1:-1, ...], axis=(1, 2))
    one, other = ops.split(ops.reshape(x, (-1, 8)), 2, axis=-1)
    x = ops.clip(ops.maximum(one, other), -1, 1)
    return compiled(inputs, layers.Dense(3, "softmax")(ops.leaky_relu(x, negative_slope=0.3)))


def nested():
    augmentation = keras.Sequential(
        [layers.RandomFlip("horizontal"), layers.RandomRotation(0.1)], name="augmentation"
    )
    images = keras.Input(SHAPE)
    features = layers.Flatten()(layers.Conv2D(4, 3, activation="relu")(images))
    encoder = keras.Model(images, features, name="encoder")
    head = keras.Sequential([keras.Input((144,)), layers.Dense(8, "relu"), layers.Dense(3)])
    inputs = keras.Input(SHAPE)
    return compiled(inputs, head(encoder(augmentation(inputs, training=False))))


def nested_twice():
    vectors = keras.Input((4,))
    encoder = keras.Model(vectors, layers.Dense(5)(vectors))
    inputs = keras.Input((4,))
    both = layers.Concatenate()([encoder(inputs), encoder(ops.flip(inputs, axis=1))])
    return compiled(inputs, layers.Dense(2)(both))


def shared():
    inputs = keras.Input((8,))
    twice = layers.Dense(8, activation="relu", name="twice")
    other = layers.Dense(8)
    return compiled(inputs, layers.Dense(2)(other(other(twice(twice(inputs))))))


def stacked():
    model = keras.Sequential(
        [layers.Flatten(), layers.Dense(4, "relu"), layers.Dense(1, "sigmoid")]
    )
    model.build((None, 4, 4, 1))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "binary_crossentropy", ["accuracy"])
    return model


def particular():
    """Arguments of many kinds."""
    inputs = keras.Input((8, 8, 2), name="image")
    x = layers.Conv2D(
        4,
        (3, 5),
        strides=(1, 2),
        activation=layers.LeakyReLU(negative_slope=0.1),
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.02),
        bias_initializer=keras.initializers.Constant(0.1),
        activity_regularizer=keras.regularizers.L1L2(1e-5, 1e-4),
        kernel_constraint=keras.constraints.MaxNorm(3),
    )(inputs)
    x = layers.LayerNormalization(epsilon=1e-4)(layers.PReLU(shared_axes=[1, 2])(x))
    x = layers.SeparableConv2D(4, 3, padding="same", dilation_rate=2)(x)
    x = layers.ZeroPadding2D(((1, 1), (2, 0)))(x)
    x = layers.GaussianNoise(0.1, seed=3)(x)
    x = layers.UpSampling2D(2, interpolation="bilinear")(x)
    x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    x = layers.Normalization(mean=[0.1] * 4, variance=[1.0] * 4)(x)
    x = layers.Dense(4, trainable=False)(layers.GlobalMaxPooling2D()(x))
    return compiled(
        inputs,
        layers.Dense(3, keras.activations.softmax)(x),
        keras.optimizers.Lion(1e-4, weight_decay=0.1, clipnorm=1.0),
        keras.losses.CategoricalFocalCrossentropy(gamma=3.0),
        steps_per_execution=2,
    )


def attending():
    inputs = keras.Input(SHAPE)
    x = layers.Dense(8)(layers.Reshape((64, 1))(inputs))
    x = layers.Add()([x, layers.MultiHeadAttention(2, 4)(x, x)])
    x = layers.Bidirectional(layers.LSTM(4, return_sequences=True))(x)
    x, state, _ = layers.LSTM(4, return_state=True)(x)
    return compiled(inputs, layers.Dense(2)(layers.Concatenate()([x, state])))


def masked():
    inputs = keras.Input((6,), dtype="int32")
    x = layers.GRU(3)(layers.Embedding(10, 4, mask_zero=True)(inputs))
    return compiled(inputs, layers.Dense(2)(x))


def two_ended():
    one, other = keras.Input((4,), name="one"), keras.Input((4,), name="other")
    x = layers.Multiply()([one, other])
    model = keras.Model([one, other], [layers.Dense(2, name="p")(x), layers.Dense(3, name="q")(x)])
    model.compile("adam", loss=["mse", keras.losses.mean_absolute_error])
    return model


def frozen():
    base = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()])
    base.trainable = False
    inputs = keras.Input((4,))
    return compiled(inputs, layers.Dense(2)(base(inputs, training=False)))


def hyper(name, size):
    space = getattr(keras_tuner.applications, name)(input_shape=(size, size, 3), classes=4)
    return space.build(keras_tuner.HyperParameters())


GRAPHS = [
    residual,
    with_operations,
    nested,
    nested_twice,
    shared,
    stacked,
    particular,
    attending,
    masked,
    two_ended,
    frozen,
]


@functools.cache
def model_and_code(build):
    model = build()
    code = functions(model).code
    return model, f"import keras\nimport numpy as np\nfrom keras import layers\n\n\n{code}\n"


@pytest.mark.parametrize("build", GRAPHS, ids=lambda build: build.__name__)
def test_any_graph_is_built_again(build):
    model, code = model_and_code(build)
    assert_same(model, loaded(code))


@pytest.mark.slow
def test_the_largest_of_keras_tuner_s_networks_is_built_again():
    model, code = model_and_code(functools.partial(hyper, "HyperXception", 71))
    assert_same(model, loaded(code))


@pytest.mark.slow
@pytest.mark.parametrize(
    "build",
    [
        lambda: hyper("HyperResNet", 32),
        lambda: published("MobileNetV3Small"),
        lambda: published("DenseNet121"),
        lambda: published("EfficientNetB0"),
    ],
)
def test_published_networks_are_built_again(build):
    model, code = model_and_code(build)
    assert_same(model, loaded(code))


def published(name):
    model = getattr(keras.applications, name)(weights=None, classes=5, input_shape=(32, 32, 3))
    model.compile("adam", loss="categorical_crossentropy")
    return model


@pytest.mark.parametrize(
    ("build", "lines"),
    [
        (
            residual,
            [
                "x = layers.Rescaling(1 / 127.5, offset=-1)(inputs)",
                "kernel_regularizer=keras.regularizers.L2(0.0001),",
                'kernel_initializer="he_normal",',
                'x = layers.Conv2D(8, 3, padding="same")(block)',
                "x = layers.Add()([x, block])",
                "shortcut = layers.BatchNormalization()(x)",
                "x = layers.Add()([x, shortcut])",
            ],
        ),
        (
            with_operations,
            [
                "x = keras.ops.true_divide(x, 255.0)",
                'x = keras.ops.subtract(x, np.array([0.5], dtype="float32"))',
                "x = x[:, 1:-1, ...]  # (n, 6, 8, 8)",
                "split, split_2 = keras.ops.split(x, indices_or_sections=2, axis=-1)",
            ],
        ),
        (
            nested,
            [
                "def build_augmentation():",
                '[keras.Input((8, 8, 1)), layers.RandomFlip("horizontal"), '
                "layers.RandomRotation(0.1)],",
                'return keras.Model(inputs, outputs, name="encoder")',
                "encoder = build_encoder()",
                "x = augmentation(inputs, training=False)",
                "part = build_part()",
            ],
        ),
        (shared, ['twice = layers.Dense(8, activation="relu", name="twice")', "x = twice(x)"]),
        (stacked, ['layers.Dense(1, activation="sigmoid"),', "layers.Flatten(),"]),
        (
            particular,
            [
                'inputs = keras.Input((8, 8, 2), name="image")',
                "(3, 5),",
                "activation=layers.LeakyReLU(negative_slope=0.1),",
                "x = layers.LayerNormalization(epsilon=0.0001)(x)",
                "x = layers.GaussianNoise(0.1, seed=3)(x)",
                "keras.optimizers.Lion(0.0001, weight_decay=0.1, clipnorm=1.0),",
                "steps_per_execution=2,",
            ],
        ),
        (attending, ["lstm, lstm_2, _ = layers.LSTM(4, return_state=True)(x)"]),
        (masked, ["x = layers.GRU(3)(x)  # (n, 3)"]),
        (two_ended, ["return keras.Model([one, other], [p, q])"]),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_graphs_read_as_if_written_by_hand(build, lines):
    written = [line.strip() for line in model_and_code(build)[1].splitlines()]
    for line in lines:
        assert line in written, "\n".join(written)


def test_all_that_is_written_is_laid_out_as_ruff_would(tmp_path):
    pytest.importorskip("ruff")
    texts = [model_and_code(build)[1] for build in GRAPHS]
    space, model = space_and_model(POINTS[1])
    texts.append(text_of(model, callbacks=[*space.callbacks(point(POINTS[1])), *CALLBACKS]))
    texts += [text_of(dense(), dataset=source) for source in SOURCES]
    for number, text in enumerate(texts):
        (tmp_path / f"script_{number}.py").write_text(text)
    checks = [["format", "--diff"], ["check", "--select=E,F,I,B,UP,SIM,C4", "--ignore=F401"]]
    for command in checks:
        ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length=100", "."]
        done = subprocess.run(ruff, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


# What can't be written


class Doubled(layers.Layer):
    def call(self, x):
        return 2 * x

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable()
class Registered(layers.Dense):
    pass


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)


class Functional(keras.Model):
    """Of inputs and outputs, yet trained in a way of its own."""


def relu(x):
    return x + 1


def softer_loss(y, predicted):
    return ops.mean(ops.square(y - predicted))


def of_layer(layer, shape=(4,)):
    inputs = keras.Input(shape)
    return compiled(inputs, layers.Dense(2)(layer(inputs)))


def of_subclass():
    model = Subclassed()
    model.build((None, 4))
    model.compile("adam", loss="mse")
    return model


def of_functional_subclass():
    inputs = keras.Input((4,))
    model = Functional(inputs, layers.Dense(2)(inputs))
    model.compile("adam", loss="mse")
    return model


def of_shared_layer():
    dense = layers.Dense(4, name="dense_of_two")
    vectors, inputs = keras.Input((4,)), keras.Input((4,))
    return compiled(inputs, keras.Model(vectors, dense(vectors))(dense(inputs)))


def of_optimizer():
    inputs = keras.Input((4,))
    dense = layers.Dense(2)
    optimizer = keras.optimizers.AdamW()
    model = compiled(inputs, dense(inputs), optimizer)
    optimizer.exclude_from_weight_decay(var_list=[dense.bias])
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: of_layer(layers.Lambda(lambda x: x, name="same")),
            r"Layer 'same' \(Lambda\) can't be written as code: .*function of the space's own",
        ),
        (
            lambda: of_layer(Doubled(name="doubled")),
            r"Layer 'doubled' \(Doubled\) can't .*: Doubled is not one of Keras's own classes",
        ),
        (lambda: of_layer(Registered(3)), "Registered is not one of Keras's own classes"),
        (
            lambda: of_layer(layers.Dense(3, activation=relu, name="a")),
            r"Layer 'a' \(Dense\) can't be written as code: relu is a function of the space's own",
        ),
        (
            lambda: of_layer(layers.TimeDistributed(layers.Dense(3, relu)), (3, 4)),
            r"\(TimeDistributed\) can't be written as code: relu is a function of the space's own",
        ),
        (
            lambda: compiled(i := keras.Input((4,)), layers.Dense(2)(i), metrics=[softer_loss]),
            "The model's metrics can't be written as code: the function 'softer_loss' is not one",
        ),
        (lambda: keras.Sequential([keras.Input((4,))]), "it is not compiled"),
        (
            lambda: of_layer(layers.TimeDistributed(Doubled()), (3, 4)),
            "Doubled is not one of Keras's own classes",
        ),
        (of_subclass, "Model 'subclassed' can't be written as code: Subclassed is not"),
        (of_functional_subclass, "Functional is not keras.Sequential, or keras.Model of inputs"),
        (of_shared_layer, "Layer 'dense_of_two' can't be written as code: two models share it"),
        (
            lambda: compiled(i := keras.Input((4,)), layers.Dense(2)(i), loss=softer_loss),
            "The loss 'softer_loss' can't be written as code",
        ),
        (of_optimizer, "exclude_from_weight_decay was called with var_list"),
        (
            lambda: compiled(i := keras.Input((100,)), layers.Dense(2)(ops.add(i, np.zeros(100)))),
            r"it holds a constant of shape \(100,\)",
        ),
    ],
    ids=range(14),
)
def test_what_can_t_be_written_is_named(build, message):
    with warnings.catch_warnings(action="ignore"):  # Keras's, of odd layers
        model = build()
    with pytest.raises(ValueError, match=message):
        functions(model)


# Callbacks


class Own(keras.callbacks.Callback):
    pass


CALLBACKS = [
    keras.callbacks.EarlyStopping("val_accuracy", patience=4, mode="max", min_delta=0.01),
    keras.callbacks.TerminateOnNaN(),
    keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate),
    Own(),
]


@pytest.mark.parametrize(
    ("callback", "line"),
    [
        (
            keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=3, cooldown=2),
            'keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=3, cooldown=2)',
        ),
        (
            CALLBACKS[0],
            'keras.callbacks.EarlyStopping("accuracy", min_delta=0.01, patience=4, mode="max")',
        ),
        (CALLBACKS[1], "keras.callbacks.TerminateOnNaN()"),
        (CALLBACKS[2], "# Left out: LearningRateScheduler, a callback that is code of its own."),
        (CALLBACKS[3], "# Left out: Own, a callback that is code of its own."),
        (
            keras.callbacks.LambdaCallback(on_epoch_end=print),
            "# Left out: LambdaCallback, a callback that is code of its own.",
        ),
    ],
    ids=range(6),
)
def test_callbacks_are_written_or_named(callback, line):
    text = text_of(dense(), callbacks=[callback])
    assert line in text
    assert ("callbacks=callbacks" in text) != line.startswith("#")
    assert ("counted in reports" in text) == ("patience" in line)
    ast.parse(text)


# Data


def npz(name="/data/flowers.npz"):
    return DataSource(name=name, input_shape=(5, 4, 3), num_classes=2)


SOURCES = [
    DataSource(name="fashion_mnist", input_shape=(28, 28, 1), num_classes=10),
    DataSource(name="mnist", input_shape=(28, 28, 1), num_classes=10),
    DataSource(name="cifar10", input_shape=(32, 32, 3), num_classes=10),
    npz(),
    npz("/data/flowers"),
]


def data_of(source):
    return loaded(text_of(dense(), dataset=source))["load_data"]()


def assert_same_data(read, train, test):
    for (x, y), (wanted_x, wanted_y) in zip(read, (train, test), strict=True):
        assert x.dtype == np.uint8
        np.testing.assert_array_equal(x, wanted_x)
        assert np.issubdtype(y.dtype, np.integer)
        np.testing.assert_array_equal(y, wanted_y)


def test_digits_are_split_as_the_product_does():
    parts = datasets.load_train("digits"), datasets.load_test("digits")
    assert_same_data(data_of(DIGITS), *parts)


@pytest.mark.parametrize("source", SOURCES[:3], ids=lambda source: source.name)
def test_keras_s_data_sets_get_channels_and_flat_labels(source, monkeypatch):
    height, width, channels = source.input_shape
    stored = (2, height, width) if channels == 1 else (2, *source.input_shape)
    x = np.arange(np.prod(stored), dtype="uint8").reshape(stored)
    y = np.array([3, 1], "uint8")
    labels = y if channels == 1 else y[:, np.newaxis]
    module = getattr(keras.datasets, source.name)
    monkeypatch.setattr(module, "load_data", lambda: ((x, labels), (x, labels)))
    part = x.reshape(2, *source.input_shape), y
    assert_same_data(data_of(source), part, part)


@pytest.mark.parametrize(
    ("dtype", "scale"), [("uint8", 1), ("float32", 1), ("float64", 1 / 255), ("int64", 1)]
)
def test_an_npz_file_is_read_as_the_product_reads_it(dtype, scale, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": (rng.integers(0, 256, (8, 5, 4)) * scale).astype(dtype),
        "y_train": np.arange(8)[:, np.newaxis] % 2,
        "x_test": (rng.integers(0, 256, (4, 5, 4)) * scale).astype(dtype),
        "y_test": np.arange(4.0) % 2,
    }
    path = tmp_path / "flowers.npz"
    np.savez(path, **arrays)
    parts = formats.read_npz(path, "train"), formats.read_npz(path, "test")
    assert parts[0][0].shape == (8, 5, 4, 1)
    assert_same_data(data_of(npz(str(path))), *parts)


def drawing(number, mode, size):
    width, height = size
    levels = np.random.default_rng(number).integers(0, 256, (height, width, 4)).astype("uint8")
    return Image.fromarray(levels).convert(mode)


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        *(("train", "L"), ("train", "RGB"), ("train and test", "RGBA"), ("classes", "L")),
        ("classes, one of them train", "L"),
    ],
)
def test_a_folder_is_read_as_the_product_reads_it(layout, mode, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    folder = tmp_path / "flowers"
    parts = {"train": ["train"], "train and test": ["train", "test"]}.get(layout, ["."])
    names = ("rose", "lily", "train" if "one of them" in layout else "test")
    for part in parts:
        for name in names:
            (folder / part / name).mkdir(parents=True)
            for number in range(8):
                file = folder / part / name / f"{number:02}.png"
                drawing(number + 100 * len(name), mode, (6 + number % 3, 5)).save(file)
            (folder / part / name / "notes.txt").write_text("not an image")
            (folder / part / name / "._00.png").write_text("what macOS leaves")
        (folder / part / ".hidden").mkdir()
    image_folder.prepare(folder)
    shape, classes = image_folder.describe(folder)
    read = data_of(DataSource(name=str(folder), input_shape=shape, num_classes=len(classes)))
    assert_same_data(read, image_folder.load(folder, "train"), image_folder.load(folder, "test"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_a_script_trains_on_files(kind, tmp_path):
    rng = np.random.default_rng(0)
    y = np.arange(80) % 2
    x = rng.integers(0, 100, (80, *SHAPE)).astype("uint8") + (100 * y)[:, None, None, None].astype(
        "uint8"
    )
    path = tmp_path / ("data.npz" if kind == "npz" else "data")
    if kind == "npz":
        np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    for number, (image, label) in enumerate(zip(x, y, strict=True)):
        if kind == "folder":
            (path / "train" / "ab"[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[..., 0]).save(path / "train" / "ab"[label] / f"{number:02}.png")
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(SHAPE, dtype="uint8"), layers.Rescaling(1 / 255)])
    model.add(layers.Flatten())
    model.add(layers.Dense(1, activation="sigmoid"))
    optimizer = keras.optimizers.Adam(0.05)
    model.compile(optimizer, loss="binary_crossentropy", metrics=["accuracy"])
    source = DataSource(name=str(path), input_shape=SHAPE, num_classes=2)
    text = text_of(model, dataset=source, training=how(batch_size=10, num_reports=20))
    assert f"DATA = Path({str(path)!r})".replace("'", '"') in text
    printed = run(text, tmp_path)
    assert printed["parameters"] == 65
    assert printed["test accuracy"] > 0.9


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (npz("flowers"), "A script reads fashion_mnist, mnist, cifar10, digits, or the absolute"),
        (
            DataSource(name="/data/flowers", input_shape=(8, 8, 2), num_classes=2),
            "Images in files have 1 or 3 channels",
        ),
    ],
)
def test_data_that_a_script_can_t_read_is_refused(source, message):
    model = dense()
    with pytest.raises(ValueError, match=f"{message}.*Received: .*"):
        text_of(model, dataset=source)


@pytest.mark.parametrize(
    ("loss", "units", "lines"),
    [
        ("sparse_categorical_crossentropy", 3, []),
        ("categorical_crossentropy", 3, ["y_train, y_test = one_hot[y_train], one_hot[y_test]"]),
        ("binary_crossentropy", 1, ['y_train = y_train[:, np.newaxis].astype("float32")']),
    ],
)
def test_labels_are_what_the_loss_takes(loss, units, lines):
    text = text_of(dense(loss, units))
    written = [line.strip() for line in text.splitlines()]
    for line in lines:
        assert line in written
    assert ("one_hot" in text) == ("NUM_CLASSES" in text) == (loss == "categorical_crossentropy")


# Layout


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("short = 1", ["short = 1"]),
        (f"    x = f({'a' * 99})(x)", ["    x = f(", f"        {'a' * 99}", "    )(x)"]),
        (f"x = f(a)([{'b' * 90}, c])", ["x = f(a)(", f"    [{'b' * 90}, c]", ")"]),
        (
            f"x = f({'a' * 60}, k={'b' * 60})",
            ["x = f(", f"    {'a' * 60},", f"    k={'b' * 60},", ")"],
        ),
        (f"x = [f({'a' * 95})]", ["x = [", "    f(", f"        {'a' * 95}", "    )", "]"]),
        (f"x = '{'a' * 120}'", [f"x = '{'a' * 120}'"]),
        (f"x = {'a' * 96}  # said", [f"x = {'a' * 96}"]),
    ],
)
def test_long_statements_are_broken(line, lines):
    assert wrapped(line).splitlines() == lines


@pytest.mark.parametrize("text", ["plain", "it's", 'a "b"', "both ' and \"", "back\\slash", "ä\n"])
def test_strings_are_quoted(text):
    assert ast.literal_eval(quoted(text)) == text
    assert quoted(text).startswith('"') or '"' in text
