import keras_tuner
import optuna
import pytest

from search.training.hyperparameters import (
    ReplayedHyperParameters,
    TrialHyperParameters,
    describe,
    distribution,
)
from spaces.cnn import CNN


@pytest.fixture
def study():
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


@pytest.fixture
def drawn(study):
    """Reads a space with a real trial, which then holds what was asked; its params may be fixed."""

    def drawn(space, **fixed):
        if fixed:
            study.enqueue_trial(fixed)
        trial = study.ask()
        hp = TrialHyperParameters(trial)
        return read(space, hp), hp, trial

    return drawn


def read(space, hp):
    return space.build(hp) if isinstance(space, keras_tuner.HyperModel) else space(hp)


class TwoOptimizers(keras_tuner.HyperModel):
    """Conditional both ways: a name that is read in one branch, and one that is read in both."""

    def build(self, hp):
        built = {"optimizer": hp.Choice("optimizer", ["sgd", "adam"], default="adam")}
        with hp.conditional_scope("optimizer", ["sgd"]):
            if built["optimizer"] == "sgd":
                built["momentum"] = hp.Float("momentum", 0.0, 0.9, default=0.5)
        built["rate"] = hp.Float("rate", 1e-4, 1e-1, sampling="log", default=1e-2)
        with hp.name_scope("head"):
            built["units"] = hp.Int("units", 16, 64, step=16, default=32)
        return built


@pytest.mark.parametrize(
    ("ask", "kind", "arguments"),
    [
        (
            lambda hp: hp.Choice("p", ["relu", "elu"]),
            "categorical",
            {"choices": ["relu", "elu"]},
        ),
        (lambda hp: hp.Choice("p", [32, 64]), "categorical", {"choices": [32, 64]}),
        (lambda hp: hp.Choice("p", [0.1, 0.5]), "categorical", {"choices": [0.1, 0.5]}),
        (lambda hp: hp.Boolean("p"), "categorical", {"choices": [False, True]}),
        (lambda hp: hp.Fixed("p", 7), "categorical", {"choices": [7]}),
        (
            lambda hp: hp.Int("p", 1, 10),
            "int",
            {"low": 1, "high": 10, "step": 1, "log": False},
        ),
        (
            lambda hp: hp.Int("p", 8, 64, step=8),
            "int",
            {"low": 8, "high": 64, "step": 8, "log": False},
        ),
        (
            lambda hp: hp.Int("p", 1, 10, step=4),
            "int",
            {"low": 1, "high": 9, "step": 4, "log": False},
        ),
        (
            lambda hp: hp.Int("p", 16, 250, sampling="log"),
            "int",
            {"low": 16, "high": 250, "step": 1, "log": True},
        ),
        (
            lambda hp: hp.Float("p", 0.0, 0.5),
            "float",
            {"low": 0.0, "high": 0.5, "step": None, "log": False},
        ),
        (
            lambda hp: hp.Float("p", 0.0, 0.5, step=0.1),
            "float",
            {"low": 0.0, "high": 0.5, "step": 0.1, "log": False},
        ),
        (
            lambda hp: hp.Float("p", 0.1, 0.7, step=0.2),
            "float",
            {"low": 0.1, "high": 0.7, "step": 0.2, "log": False},
        ),
        (
            lambda hp: hp.Float("p", 0.0, 0.55, step=0.1),
            "float",
            {"low": 0.0, "high": 0.5, "step": 0.1, "log": False},
        ),
        (
            lambda hp: hp.Float("p", 1e-4, 1e-1, sampling="log"),
            "float",
            {"low": 1e-4, "high": 1e-1, "step": None, "log": True},
        ),
    ],
)
def test_each_kind_has_its_twin_in_optuna(drawn, ask, kind, arguments):
    hp = keras_tuner.HyperParameters()
    ask(hp)
    assert distribution(hp.space[0]) == (kind, arguments)
    value, _, trial = drawn(ask)  # Optuna warns of a range that the step does not divide
    assert trial.params == {"p": value}
    stored = trial.distributions["p"]
    for name, expected in arguments.items():
        received = getattr(stored, name)
        assert (list(received) if name == "choices" else received) == expected


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        (lambda hp: hp.Choice("p", ["a", "b", "c"]), "c"),
        (lambda hp: hp.Boolean("p"), True),
        (lambda hp: hp.Int("p", 8, 64, step=8), 64),
        (lambda hp: hp.Float("p", 0.0, 0.5, step=0.1), 0.5),
        (lambda hp: hp.Float("p", 1e-4, 1e-1, sampling="log"), 0.0123),
    ],
)
def test_the_trial_s_value_is_what_the_space_reads(drawn, ask, value):
    assert drawn(ask, p=value)[0] == value


@pytest.mark.parametrize(
    ("ask", "received"),
    [
        (
            lambda hp: hp.Float("rate", 1e-4, 1e-1, step=10, sampling="log"),
            "sampling='log', step=10",
        ),
        (lambda hp: hp.Int("rate", 2, 32, step=2, sampling="log"), "sampling='log', step=2"),
        (
            lambda hp: hp.Float("rate", 1e-4, 1e-1, sampling="reverse_log"),
            "sampling='reverse_log', step=None",
        ),
        (lambda hp: hp.Int("rate", 2, 32, sampling="reverse_log"), "'reverse_log', step=None"),
    ],
)
def test_what_optuna_cannot_express_is_refused_and_says_what_to_write(drawn, ask, received):
    instead = r"Write sampling='log' without step, or hp\.Choice\('rate', \[\.\.\.\]\)"
    with pytest.raises(ValueError, match=rf"can't sample 'rate' \(.*{received}\)\. {instead}"):
        drawn(ask)


def test_an_unknown_kind_is_refused():
    class Other(keras_tuner.engine.hyperparameters.HyperParameter):
        pass

    with pytest.raises(ValueError, match=r"Unknown kind of hyperparameter\. Received: .*p"):
        distribution(Other("p"))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_only_what_is_active_is_suggested(drawn, optimizer):
    built, hp, trial = drawn(TwoOptimizers(), optimizer=optimizer)
    names = {"optimizer", "rate", "head/units"} | ({"momentum"} if optimizer == "sgd" else set())
    assert set(trial.params) == set(hp.values) == names
    assert built["units"] == trial.params["head/units"]
    assert built.get("momentum") == trial.params.get("momentum")


def test_an_inactive_branch_that_is_read_all_the_same_asks_nothing(drawn):
    def build(hp):
        hp.Choice("kind", ["a", "b"])
        values = []
        for kind in ("a", "b"):
            with hp.conditional_scope("kind", [kind]):
                values.append(hp.Int(f"{kind}_units", 1, 9))
        return values

    values, _, trial = drawn(build, kind="b")
    assert set(trial.params) == {"kind", "b_units"}
    assert values == [None, trial.params["b_units"]]


def test_a_name_in_two_branches_has_each_branch_s_range(drawn):
    def build(hp):
        hp.Choice("kind", ["a", "b"])
        for kind, low in (("a", 0), ("b", 100)):
            with hp.conditional_scope("kind", [kind]):
                hp.Int("units", low, low + 9)
        return hp.get("units")

    for kind, low in (("a", 0), ("b", 100)):
        units, _, trial = drawn(build, kind=kind)
        assert low <= units <= low + 9
        assert trial.distributions["units"].low == low


@pytest.mark.parametrize(
    "ask",
    [
        lambda hp, kind: hp.Choice("size", [1, 3] if kind == "a" else [5, 7]),
        lambda hp, kind: hp.Int("size", 1, 9) if kind == "a" else hp.Float("size", 1.0, 9.0),
        lambda hp, kind: hp.Int("size", 1, 9, sampling="log" if kind == "a" else "linear"),
        lambda hp, kind: hp.Int("size", 1, 9) if kind == "a" else hp.Boolean("size"),
    ],
)
@pytest.mark.parametrize("asks_always", [True, False])
def test_a_name_that_optuna_would_refuse_in_another_branch_is_refused_at_once(
    drawn, ask, asks_always
):
    def build(hp):
        chosen = hp.Choice("kind", ["a", "b"])
        for kind in ("a", "b"):
            with hp.conditional_scope("kind", [kind]):
                if asks_always or kind == chosen:
                    ask(hp, kind)

    hp = keras_tuner.HyperParameters()
    build(hp)
    with pytest.raises(ValueError, match=r"'size' is .* in one branch and .* name of its own"):
        describe(hp, build)
    drawn(build, kind="a")
    with pytest.raises(ValueError, match=r"dynamic|different|does not match"):
        drawn(build, kind="b")


def test_a_value_is_in_each_range_that_it_is_read_with(drawn):
    def build(hp):
        hp.Choice("kind", ["a", "b"])
        with hp.conditional_scope("kind", ["a", "b"]):
            hp.Int("units", 16, 64)
        with hp.conditional_scope("kind", ["b"]):
            hp.Int("units", 64, 256)

    with pytest.raises(ValueError, match=r"'units' lies between 64 and 256. Received: 32"):
        drawn(build, kind="b", units=32)


def test_a_repeated_name_is_suggested_once(drawn):
    values, _, trial = drawn(lambda hp: [hp.Int("units", 1, 1000) for _ in range(3)])
    assert values == [trial.params["units"]] * 3


# Replay

WHOLE = {"optimizer": "sgd", "momentum": 0.25, "rate": 0.05, "head/units": 48}


def test_a_stored_point_is_read_exactly():
    hp = ReplayedHyperParameters(WHOLE)
    assert read(TwoOptimizers(), hp) == {
        "optimizer": "sgd",
        "momentum": 0.25,
        "rate": 0.05,
        "units": 48,
    }
    hp.check_all_read()


def test_what_a_trial_drew_can_be_replayed(drawn):
    for _ in range(10):
        built, _, trial = drawn(TwoOptimizers())
        hp = ReplayedHyperParameters(trial.params)
        assert read(TwoOptimizers(), hp) == built
        hp.check_all_read()


@pytest.mark.parametrize("missing", sorted(WHOLE))
def test_a_key_that_is_missing_is_not_the_default(missing):
    point = {name: value for name, value in WHOLE.items() if name != missing}
    rule = f"reads '{missing}', which the stored point lacks.*Received: .*"
    with pytest.raises(ValueError, match=rule):
        read(TwoOptimizers(), ReplayedHyperParameters(point))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"depth": 3, "colour": "red"}, "'colour', 'depth'"),
        ({"optimizer": "adam"}, "'momentum'"),  # a key of the other branch
    ],
)
def test_a_key_that_is_never_read_is_named(more, named):
    hp = ReplayedHyperParameters(WHOLE | more)
    read(TwoOptimizers(), hp)
    rule = rf"never reads {named} at this point\. It reads: head/units, "
    with pytest.raises(ValueError, match=rule):
        hp.check_all_read()


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"optimizer": "rmsprop"}, r"'optimizer' is one of \['sgd', 'adam'\]\. .*: 'rmsprop'"),
        ({"momentum": 0.95}, r"'momentum' lies between 0\.0 and 0\.9\. Received: 0\.95"),
        ({"rate": 0.0}, r"'rate' lies between 0\.0001 and 0\.1\. Received: 0\.0"),
        ({"rate": float("nan")}, r"'rate' lies between .* Received: nan"),
        ({"head/units": 80}, r"'head/units' lies between 16 and 64.*\. Received: 80"),
        ({"head/units": 8}, r"'head/units' lies between 16 and 64.*\. Received: 8"),
    ],
)
@pytest.mark.parametrize("complete", [False, True])
def test_a_value_outside_its_range_is_refused(changed, rule, complete):
    hp = ReplayedHyperParameters(WHOLE | changed, complete=complete)
    with pytest.raises(ValueError, match=rule):
        read(TwoOptimizers(), hp)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"rate": "0.01"}, r"'rate' lies between .*Received: '0\.01'"),
        ({"head/units": 20}, r"'head/units' .*steps? of 16.*Received: 20"),
        ({"head/units": 32.5}, r"'head/units' .*Received: 32\.5"),
    ],
)
def test_a_value_that_no_trial_could_draw_is_refused(changed, rule):
    with pytest.raises(ValueError, match=rule):
        read(TwoOptimizers(), ReplayedHyperParameters(WHOLE | changed))


@pytest.mark.parametrize("rate", [0.1 + 0.2, 0.7, 0.1 * 9])
def test_a_step_s_rounding_is_not_outside(rate):
    hp = ReplayedHyperParameters({"p": rate})
    assert hp.Float("p", 0.0, 0.9, step=0.1) == rate


@pytest.mark.parametrize(
    ("point", "whole"),
    [
        ({}, {"optimizer": "adam", "rate": 1e-2, "head/units": 32}),
        (
            {"optimizer": "sgd"},
            {"optimizer": "sgd", "momentum": 0.5, "rate": 1e-2, "head/units": 32},
        ),
        (WHOLE, WHOLE),
    ],
)
def test_a_known_point_is_completed_by_defaults(point, whole):
    hp = ReplayedHyperParameters(point, complete=True)
    read(TwoOptimizers(), hp)
    hp.check_all_read()
    assert hp.values == whole


@pytest.mark.parametrize("asks_always", [True, False])
def test_a_space_is_described_with_its_conditions(asks_always):
    def build(hp):
        chosen = hp.Choice("kind", ["a", "b"])
        for kind, high in (("a", 9), ("b", 99)):
            with hp.conditional_scope("kind", [kind]):
                if asks_always or kind == chosen:
                    hp.Int("units", 1, high)
                    hp.Int("units", 1, high)  # read twice, described once

    hp = keras_tuner.HyperParameters()
    build(hp)
    units = {"name": "units", "kind": "int", "low": 1, "step": 1, "log": False}
    assert describe(hp, build) == [
        {"name": "kind", "kind": "categorical", "choices": ["a", "b"], "when": []},
        {**units, "high": 9, "when": [when("a")]},
        {**units, "high": 99, "when": [when("b")]},
    ]


def test_branches_of_branches_are_described_also_where_there_is_no_model():
    def build(hp):
        kind = hp.Choice("kind", ["a", "b"])
        with hp.conditional_scope("kind", ["b"]):
            if kind == "b":
                depth = hp.Int("depth", 1, 2)
                with hp.conditional_scope("depth", [2]):
                    if depth == 2:
                        hp.Float("rate", 0.0, 1.0)
                        raise ValueError("no such model")

    hp = keras_tuner.HyperParameters()
    build(hp)
    assert [described["name"] for described in describe(hp, build)] == ["kind", "depth", "rate"]


def test_a_space_that_asks_in_all_its_branches_is_built_once():
    """Its workers wait for it as they start."""
    hp = keras_tuner.HyperParameters()
    CNN((28, 28, 1), 10, 12_800).build(hp)
    builds = []
    describe(hp, builds.append)
    assert not builds


def when(kind):
    return {"name": "kind", "values": [kind]}
