import keras
import numpy as np
import pytest

from spaces.optimizers import Layerwise, learning_rate_schedule, make_optimizer, make_plain


@pytest.mark.parametrize(
    ("name", "first", "middle", "last"),
    [
        ("constant", 0.1, 0.1, 0.1),
        ("plateau", 0.1, 0.1, 0.1),
        ("cosine", 0.1, 0.05, 0.0),
        ("exponential", 0.1, 0.01, 0.001),
        ("step", 0.1, 0.1, 0.001),
        # 2 of 100 steps of warm-up: step 50 is 48/98 of the way down.
        ("warmup_cosine", 0.1 / 3, 0.05 * (1 + np.cos(np.pi * 48 / 98)), 0.0),
    ],
)
def test_learning_rate_at_the_start_the_middle_and_the_end(name, first, middle, last):
    schedule = learning_rate_schedule(name, 0.1, total_steps=100)
    at = schedule if callable(schedule) else lambda step: schedule
    assert [float(at(step)) for step in (0, 50, 100)] == pytest.approx([first, middle, last])


def test_step_drops_after_half_and_three_quarters():
    at = learning_rate_schedule("step", 0.1, total_steps=100)
    assert [float(at(s)) for s in (50, 51, 75, 76)] == pytest.approx([0.1, 0.01, 0.01, 0.001])


def test_warmup_rises_to_the_learning_rate_and_starts_above_zero():
    at = learning_rate_schedule("warmup_cosine", 0.1, total_steps=250)  # 5 of warm-up
    rates = [float(at(step)) for step in range(6)]
    assert rates[0] > 0
    assert np.diff(rates) == pytest.approx((0.1 - rates[0]) / 5)
    assert rates[5] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["cosine", "exponential", "step", "warmup_cosine"])
@pytest.mark.parametrize("total_steps", [1, 2, 3])
def test_schedules_of_very_short_trainings_are_finite(name, total_steps):
    at = learning_rate_schedule(name, 0.1, total_steps=total_steps)
    assert all(0 <= float(at(step)) <= 0.1 + 1e-6 for step in range(5))


def test_what_is_unknown_is_refused_with_the_value():
    with pytest.raises(ValueError, match=r"schedule is one of .*Received: 'linear'"):
        learning_rate_schedule("linear", 0.1, total_steps=10)
    with pytest.raises(ValueError, match=r"total_steps is at least 1. Received: 0"):
        learning_rate_schedule("cosine", 0.1, total_steps=0)
    with pytest.raises(ValueError, match=r"optimizer is one of .*Received: 'lion'"):
        make_optimizer("lion", 0.1)


@pytest.mark.parametrize(
    ("name", "settings", "kept"),
    [
        ("adam", {}, 1.0),
        ("adamw", {"weight_decay": 0.5}, 1 - 0.1 * 0.5),
        ("sgd", {"weight_decay": 0.5, "momentum": 0.9}, 1 - 0.1 * 0.5),
    ],
)
def test_weight_decay_shrinks_weights_and_nothing_else(name, settings, kept):
    model = keras.Sequential(
        [keras.Input((2,)), keras.layers.Dense(3), keras.layers.BatchNormalization()]
    )
    model.set_weights([np.ones(w.shape) for w in model.weights])
    variables = model.trainable_variables
    optimizer = make_optimizer(name, 0.1, **settings)
    optimizer.apply([keras.ops.zeros(v.shape) for v in variables], variables)
    after = {v.name: keras.ops.convert_to_numpy(v).flat[0] for v in variables}
    assert after == pytest.approx({"kernel": kept, "bias": 1.0, "gamma": 1.0, "beta": 1.0})


def test_sgd_has_nesterov_momentum():
    weight = keras.Variable([1.0])
    make_optimizer("sgd", 0.1, weight_decay=0.0, momentum=0.9).apply([np.ones(1)], [weight])
    assert float(weight[0]) == pytest.approx(1 - 0.1 * (1 + 0.9))


IMAGES = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")
LABELS = np.eye(2, dtype="float32")[np.arange(16) % 2]
OPTIMIZERS = [
    ("adam", {}),
    ("adamw", {"weight_decay": 0.5}),
    ("sgd", {"weight_decay": 0.5, "momentum": 0.9}),
]


def three_layers(optimizer, *, run_eagerly=True):
    """Layers "frozen", "slow" and "head", with the same weights each time; biases are ones."""
    keras.utils.set_random_seed(1)
    inputs = x = keras.Input((3,))
    for name in ("frozen", "slow"):
        x = keras.layers.Dense(4, "tanh", name=name, bias_initializer="ones")(x)
    outputs = keras.layers.Dense(2, "softmax", name="head", dtype="float32")(x)
    model = keras.Model(inputs, outputs)
    model.get_layer("frozen").trainable = False
    loss = "categorical_crossentropy"
    model.compile(optimizer, loss=loss, metrics=["accuracy"], run_eagerly=run_eagerly)
    return model


def moved(optimizer, steps=1, **how):
    """How far each layer's kernel and bias go."""
    model = three_layers(optimizer, **how)
    before = {layer.name: layer.get_weights() for layer in model.layers}
    for _ in range(steps):
        model.train_on_batch(IMAGES, LABELS)
    return {
        layer.name: [
            now - was for now, was in zip(layer.get_weights(), before[layer.name], strict=True)
        ]
        for layer in model.layers[1:]
    }


@pytest.fixture
def precision(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    ("precision", "run_eagerly"),
    [("float32", True), ("mixed_bfloat16", False)],
    indirect=["precision"],
)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_a_layer_moves_at_its_own_rate(name, settings, run_eagerly):
    slow = {"layer_rates": {"slow": 0.25}}
    whole = moved(make_optimizer(name, 0.1, **settings), run_eagerly=run_eagerly)
    part = moved(make_optimizer(name, 0.1, **settings, **slow), run_eagerly=run_eagerly)
    for weight in range(2):
        np.testing.assert_array_equal(part["frozen"][weight], 0)
        # Kernel and bias, weight decay included: exactly a quarter, but for rounding.
        np.testing.assert_allclose(part["slow"][weight], 0.25 * whole["slow"][weight], atol=1e-6)
        np.testing.assert_allclose(part["head"][weight], whole["head"][weight], atol=1e-6)
    assert np.abs(whole["slow"][0]).max() > 0.01


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_layers_that_are_not_named_move_as_ever(name, settings):
    rate = learning_rate_schedule("cosine", 0.1, total_steps=5)
    whole = moved(make_optimizer(name, rate, **settings), steps=3)
    same = moved(make_optimizer(name, rate, layer_rates={"slow": 1.0}, **settings), steps=3)
    for layer in whole:
        for weight in range(2):
            np.testing.assert_allclose(same[layer][weight], whole[layer][weight], atol=1e-6)


def test_biases_of_slow_layers_are_not_decayed_either():
    weights = [keras.Variable(np.ones(2), name=name) for name in ("kernel", "bias")]
    for weight in weights:
        weight._path = f"slow/{weight.name}"
    optimizer = make_optimizer("adamw", 0.1, weight_decay=0.5, layer_rates={"slow": 0.2})
    optimizer.apply([np.zeros(2)] * 2, weights)
    assert [float(weight[0]) for weight in weights] == pytest.approx([1 - 0.1 * 0.2 * 0.5, 1.0])


def test_plateau_lowers_the_rate_of_all_layers():
    model = three_layers(make_optimizer("sgd", 0.1, momentum=0.9, layer_rates={"slow": 0.5}))
    callback = keras.callbacks.ReduceLROnPlateau(monitor="loss", factor=0.5, patience=1)
    callback.set_model(model)
    callback.on_train_begin()
    for epoch in range(2):
        callback.on_epoch_end(epoch, {"loss": 1.0})
    assert float(model.optimizer.learning_rate) == pytest.approx(0.05)


@pytest.mark.parametrize("layer", ["frozen", "lost"])
def test_a_rate_for_no_trained_layer_is_refused(layer):
    model = three_layers(make_optimizer("adam", 0.1, layer_rates={"slow": 0.5, layer: 0.5}))
    with pytest.raises(ValueError, match=f"names layers that are trained. Received: {layer}"):
        model.train_on_batch(IMAGES, LABELS)


@pytest.mark.parametrize(("name", "settings"), OPTIMIZERS)
def test_a_model_is_made_plain_to_be_saved(name, settings, tmp_path):
    rate = learning_rate_schedule("step", 0.1, total_steps=5)
    model = three_layers(make_optimizer(name, rate, layer_rates={"slow": 0.25}, **settings))
    model.train_on_batch(IMAGES, LABELS)
    copy = model.optimizer.from_config(model.optimizer.get_config())
    assert isinstance(copy, Layerwise)
    assert copy.layer_rates == {"slow": 0.25}
    state, predicted = model.optimizer.variables, model(IMAGES)

    make_plain(model)
    assert type(model.optimizer).__module__.startswith("keras.")
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is type(make_optimizer(name, 0.1, **settings))
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    np.testing.assert_array_equal(loaded(IMAGES), predicted)
    for variable, expected in zip(loaded.optimizer.variables, state, strict=True):
        np.testing.assert_array_equal(variable, expected)
    assert np.isfinite(loaded.train_on_batch(IMAGES, LABELS)).all()


def test_a_plain_model_stays_as_it_is():
    optimizer = make_optimizer("adamw", 0.1, weight_decay=0.5)
    model = three_layers(optimizer)
    make_plain(model)
    assert model.optimizer is optimizer
