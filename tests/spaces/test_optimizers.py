import keras
import numpy as np
import pytest

from spaces.optimizers import learning_rate_schedule, make_optimizer


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
