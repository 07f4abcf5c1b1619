import contextlib
import random
import shutil

import numpy as np
import optuna
import pytest
import scipy.special
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers._tpe import _truncnorm
from optuna.search_space.group_decomposed import _GroupDecomposedSearchSpace
from optuna.trial import TrialState, create_trial

from search import sampling
from search.sampling import STARTUP_TRIALS, TrialSampling
from search.storage import storage

RATE = {"low": 1e-4, "high": 1e-1, "log": True}
# What a space asks, in its order; `momentum` only where the optimizer is sgd.
QUESTIONS = (
    ("categorical", "optimizer", {"choices": ["sgd", "adam"]}),
    ("float", "rate", RATE),
    ("float", "momentum", {"low": 0.0, "high": 0.9}),
    ("int", "units", {"low": 16, "high": 256, "log": True}),
    ("int", "filters", {"low": 8, "high": 64, "step": 8}),
    ("float", "dropout", {"low": 0.0, "high": 0.5}),
)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A file with the finished trials that TPE needs before it models anything, and some more."""
    path = tmp_path_factory.mktemp("filled") / "study.db"
    study = storage.at(f"sqlite:///{path}").open("mine")
    fill(study, STARTUP_TRIALS + 8)
    study._storage.remove_session()
    study._storage._backend.engine.dispose()
    return path


@pytest.fixture
def opened(tmp_path, filled):
    """Opens a study, each time anew, as a coordinator does when it starts.

    Args:
        name: of the file; another name is another study with the same history.
        is_filled: whether it has a history.
    """

    def opened(name="study", *, is_filled=True):
        path = tmp_path / f"{name}.db"
        if is_filled and not path.exists():
            shutil.copy(filled, path)
        study = storage.at(f"sqlite:///{path}").open("mine")
        study.get_trials(deepcopy=False)  # which of them are to be adopted
        return study

    return opened


def fill(study, num_trials):
    """The same finished trials each time; every fifth was pruned."""
    rng = random.Random(1)
    for number in range(num_trials):
        params = {
            "optimizer": rng.choice(["sgd", "adam"]),
            "rate": 10 ** rng.uniform(-4, -1),
            "units": rng.randint(16, 256),
            "filters": rng.randrange(8, 65, 8),
            "dropout": rng.uniform(0.0, 0.5),
        }
        distributions = {
            "optimizer": CategoricalDistribution(["sgd", "adam"]),
            "rate": FloatDistribution(1e-4, 1e-1, log=True),
            "units": IntDistribution(16, 256, log=True),
            "filters": IntDistribution(8, 64, step=8),
            "dropout": FloatDistribution(0.0, 0.5),
        }
        if params["optimizer"] == "sgd":
            params["momentum"] = rng.uniform(0.0, 0.9)
            distributions["momentum"] = FloatDistribution(0.0, 0.9)
        value = rng.random()
        finished = {"state": TrialState.COMPLETE, "value": value}
        if number % 5 == 4:
            finished = {"state": TrialState.PRUNED}
        study.add_trial(
            create_trial(
                params=params,
                distributions=distributions,
                intermediate_values={1: value},
                **finished,
            )
        )


def ask(study):
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    return study.ask()._trial_id


def suggest(study, trial_id, name, num_questions=None, seed=7):
    """What the space is told that asks so many of its questions, from the first one."""
    trial = TrialSampling(study, trial_id, name, seed)
    answers = {}
    for kind, question, arguments in QUESTIONS[:num_questions]:
        if question == "momentum" and answers["optimizer"] != "sgd":
            continue
        answers[question] = trial.suggest(kind, question, arguments)
    return answers


def test_before_tpe_begins_a_trial_has_drafts(opened):
    study = opened("new", is_filled=False)
    for name, drafts in (("tpe", sampling.STARTUP_DRAFTS), ("random", 1), ("qmc", 1)):
        assert TrialSampling(study, ask(study), name, 7).num_drafts == drafts
    study.enqueue_trial({"units": 17})
    assert TrialSampling(study, ask(study), "tpe", 7).num_drafts == 1
    study = opened()
    assert TrialSampling(study, ask(study), "tpe", 7).num_drafts == 1
    more = TrialSampling(study, ask(study), "tpe", 7, startup_trials=30)
    assert more.num_drafts == sampling.STARTUP_DRAFTS


def test_a_draft_is_drawn_at_random_and_kept_when_it_is_taken(opened):
    study = opened("new", is_filled=False)
    trial_id, drafts = ask(study), {}
    trial = TrialSampling(study, trial_id, "tpe", 7)
    for number in range(40):
        drafts[number] = {
            name: trial.draft(number, kind, name, arguments) for kind, name, arguments in QUESTIONS
        }
    assert drafts[3] == {name: trial.draft(3, kind, name, of) for kind, name, of in QUESTIONS}
    assert study.trials[-1].params == {}
    rates = [np.log10(point["rate"]) for point in drafts.values()]
    assert min(rates) < -3.7
    assert max(rates) > -1.3
    assert np.mean(rates) == pytest.approx(-2.5, abs=0.5)
    trial.take(3)
    again = TrialSampling(opened("new"), trial_id, "tpe", 8)  # a coordinator later
    for taken in (trial, again):
        for kind, name, arguments in QUESTIONS:
            assert taken.suggest(kind, name, arguments) == drafts[3][name]
    assert again.num_drafts == 1


def test_before_tpe_begins_nothing_is_drawn_by_it(opened, monkeypatch):
    """Known points make it begin later, also for what is asked for one by one."""
    models = []
    sample = optuna.samplers.TPESampler._sample
    monkeypatch.setattr(
        optuna.samplers.TPESampler, "_sample", lambda *of: models.append(of) or sample(*of)
    )
    study = opened()
    for startup_trials, are_modelled in ((30, False), (12, True)):
        trial = TrialSampling(study, ask(study), "tpe", 7, startup_trials)
        trial.suggest("float", "new", {"low": 0.0, "high": 1.0})
        trial.suggest("float", "rate", RATE)
        assert bool(models) == are_modelled


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
@pytest.mark.parametrize("is_filled", [False, True])
def test_a_trial_adopted_half_way_is_the_trial_in_one_go(opened, name, is_filled):
    whole = opened("whole", is_filled=is_filled)
    trial_id = ask(whole)
    expected = suggest(whole, trial_id, name)
    broken = opened("broken", is_filled=is_filled)
    assert ask(broken) == trial_id
    for num_questions in (0, 1, 3, 4):  # after each the coordinator dies
        said = suggest(broken, trial_id, name, num_questions)
        assert said.items() <= expected.items()
        broken = opened("broken")
    assert suggest(broken, trial_id, name) == expected
    (stored,) = [t.params for t in opened("broken").trials if not t.state.is_finished()]
    assert stored == expected


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
@pytest.mark.parametrize("is_filled", [False, True])
def test_each_number_has_a_point_of_its_own(opened, name, is_filled):
    points = []
    for _ in range(6):
        study = opened(
            is_filled=is_filled
        )  # a sampler made anew repeats its first point, if it has but one seed
        points.append(suggest(study, ask(study), name))
    for question in ("rate", "dropout"):
        assert len({point[question] for point in points}) == 6, points


@pytest.mark.parametrize("name", ["tpe", "random", "qmc"])
def test_another_seed_gives_another_point(opened, name):
    points = []
    for seed in (1, 2, 1):
        study = opened(f"study-{len(points)}")
        points.append(suggest(study, ask(study), name, seed=seed))
    assert points[0] == points[2] != points[1]


def test_hyperparameters_of_one_trial_are_drawn_apart(opened):
    study = opened()
    trial = TrialSampling(study, ask(study), "random", 0)
    unit = {"low": 0.0, "high": 1.0}
    assert len({trial.suggest("float", name, unit) for name in "abcdef"}) == 6


def test_tpe_follows_what_was_good(opened):
    study = opened(is_filled=False)
    rng = random.Random(2)
    for _ in range(STARTUP_TRIALS * 2):
        rate = rng.random()
        distributions = {"rate": FloatDistribution(0.0, 1.0)}
        trial = create_trial(
            params={"rate": rate}, distributions=distributions, value=-abs(rate - 0.2)
        )
        study.add_trial(trial)
    drawn = []
    for _ in range(8):
        trial = TrialSampling(study, ask(study), "tpe", 0)
        drawn.append(trial.suggest("float", "rate", {"low": 0.0, "high": 1.0}))
    assert sum(abs(rate - 0.2) < 0.2 for rate in drawn) >= 7


def test_a_point_that_was_enqueued_is_taken_as_it_is(opened):
    study = opened()
    point = {"optimizer": "sgd", "rate": 0.01, "momentum": 0.5, "units": 17, "filters": 24}
    study.enqueue_trial({**point, "dropout": 0.125})
    assert suggest(study, ask(study), "tpe") == {**point, "dropout": 0.125}


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("float", {"low": 1.0, "high": 0.0}, "low <= high"),
        ("int", {"low": 0, "high": 9, "log": True}, "`low >= 1` must hold"),
        ("categorical", {"choices": []}, "must contain one or more elements"),
    ],
)
def test_a_range_that_is_none_is_refused(opened, kind, arguments, message):
    study = opened()
    trial = TrialSampling(study, ask(study), "random", 0)
    with pytest.raises(ValueError, match=message):
        trial.suggest(kind, "p", arguments)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("random", optuna.samplers.RandomSampler),
        ("qmc", optuna.samplers.QMCSampler),
        ("tpe", optuna.samplers.TPESampler),
    ],
)
def test_the_table_of_samplers(name, kind):
    assert isinstance(sampling.sampler(name, 0), kind)


@pytest.mark.slow
def test_of_the_others_tpe_looks_at_the_latest_and_at_some_of_the_older(opened, monkeypatch):
    def draw(most, early):
        monkeypatch.setattr(sampling, "MOST_OTHERS", most)
        study = opened(f"{most}-{early}", is_filled=False)
        rng = random.Random(3)
        rates = [early] * 10 + [rng.random() for _ in range(30)]
        for number, rate in enumerate(rates):
            value = -1.0 if number < 10 else -abs(rate - 0.2)
            distributions = {"rate": FloatDistribution(0.0, 1.0)}
            study.add_trial(
                create_trial(params={"rate": rate}, distributions=distributions, value=value)
            )
        trial = TrialSampling(study, ask(study), "tpe", 0)
        return trial.suggest("float", "rate", {"low": 0.0, "high": 1.0})

    assert draw(36, 0.2) != draw(36, 0.9)  # all
    assert draw(26, 0.2) != draw(26, 0.9)
    assert draw(2, 0.2) != draw(2, 0.9)  # the first and the last
    monkeypatch.setattr(sampling, "_OLDER", 0)
    assert draw(26, 0.2) == draw(26, 0.9)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize("num_complete", [0, 3, 30])
def test_what_tpe_is_shown_makes_no_other_draw(opened, monkeypatch, num_complete):
    """Optuna's own sampler draws the same, if its density of the others has only those."""

    class Plain(optuna.samplers.TPESampler):
        def _build_parzen_estimator(self, study, space, trials, handle_below):
            if not handle_below:
                older, latest = trials[:-10], trials[-10:]
                trials = [*(older[k * len(older) // 10] for k in range(10)), *latest]
            return super()._build_parzen_estimator(study, space, trials, handle_below)

    study = opened(is_filled=False)
    rng = random.Random(4)
    for number in range(60):
        value = rng.random()
        finished = {"state": TrialState.PRUNED}
        if number % 2 == 0 and number < 2 * num_complete:
            finished = {"state": TrialState.COMPLETE, "value": value}
        trial = create_trial(
            params={"rate": rng.random()},
            distributions={"rate": FloatDistribution(0.0, 1.0)},
            intermediate_values={rng.randrange(1, 4): value},
            **finished,
        )
        if number % 7 == 0:  # good ones too, which are not to be taken for good
            trial.set_constraint("memory", 1.0)
        study.add_trial(trial)
    monkeypatch.setattr(sampling, "MOST_OTHERS", 20)
    running = study._storage.get_trial(ask(study))
    options = {"seed": 5, "multivariate": True, "group": True, "constant_liar": True}
    draws = []
    for make in (sampling._TPE, Plain):
        space = {"rate": FloatDistribution(0.0, 1.0)}
        draws.append(make(**options)._sample(study, running, space))
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("_ndtr", -8, 8), ("_log_ndtr", -60, 20), ("_ndtri_exp", -1000, -1e-12)],
)
def test_scipys_functions_are_those_that_optuna_has(name, least, most):
    own = getattr(_truncnorm, name)
    with sampling._quick_normal_distribution():
        quick = getattr(_truncnorm, name)
    assert getattr(_truncnorm, name) is own
    assert quick is getattr(scipy.special, name[1:])
    for at in (np.linspace(least, most, 999), np.array([]), np.array([-np.inf])):
        if not (name == "_ndtri_exp" and np.isinf(at).any()):  # Optuna's has no answer
            np.testing.assert_allclose(quick(at), own(at), rtol=1e-7, atol=1e-15)


def test_a_draw_is_optunas(opened, monkeypatch):
    """Who draws with Optuna's own functions and conversions draws the same point."""
    study = opened()
    number = ask(study)
    drawn = TrialSampling(study, number, "tpe", 0).trial.relative_params
    called = set()

    def noted(name):
        own = getattr(_truncnorm, name)
        return lambda *args: (called.add(name), own(*args))[1]

    for name in sampling.QUICK:
        monkeypatch.setattr(_truncnorm, name, noted(name))
    monkeypatch.setattr(sampling, "_quick_normal_distribution", contextlib.nullcontext)
    monkeypatch.delattr(sampling._TPE, "_get_internal_repr")
    again = TrialSampling(study, number, "tpe", 0).trial.relative_params
    assert again == pytest.approx(drawn)
    assert called == set(sampling.QUICK)  # so they are what Optuna calls


def test_points_are_represented_as_optuna_does(opened):
    study = opened()
    trial = TrialSampling(study, ask(study), "tpe", 0).trial  # one that runs
    trials = study.get_trials(deepcopy=False)
    assert trials[-1].number == trial.number
    space = {
        "optimizer": CategoricalDistribution(["sgd", "adam"]),
        "units": IntDistribution(16, 256, log=True),
        "filters": IntDistribution(8, 64, step=8),
        "dropout": FloatDistribution(0.0, 0.5),
    }
    for names in (("optimizer", "units", "filters", "dropout"), ("optimizer",), ("momentum",)):
        asked = {name: space.get(name, FloatDistribution(0.0, 0.9)) for name in names}
        ours = sampling.sampler("tpe", 0)._get_internal_repr(trials, asked, study)
        own = optuna.samplers.TPESampler(multivariate=True)._get_internal_repr(trials, asked, study)
        assert ours.keys() == own.keys()
        for name in names:
            np.testing.assert_array_equal(ours[name], own[name])
    numbers = CategoricalDistribution([64, 32])
    made = [create_trial(params={"n": n}, distributions={"n": numbers}, value=0) for n in (32, 64)]
    found = sampling.sampler("tpe", 0)._get_internal_repr(made, {"n": numbers}, study)
    assert found["n"].tolist() == [1, 0]


def test_tpe_groups_conditional_hyperparameters(opened):
    """All that exist together are drawn at once, though no trial has them all."""
    study = opened()
    trial = TrialSampling(study, ask(study), "tpe", 0).trial
    assert set(trial.relative_params) == {question for _, question, _ in QUESTIONS}


def test_groups_are_those_of_optuna(opened):
    study = opened()
    search_spaces = []
    for make in (_GroupDecomposedSearchSpace, sampling._Groups):
        search_spaces.append(make(True).calculate(study).search_spaces)
    assert len(search_spaces[0]) == 2  # momentum is only there with sgd
    assert search_spaces[0] == search_spaces[1]


def test_a_seed_is_named_by_all_its_parts():
    parts = [(0, 1), (1, 0), (0, 1, "training"), (0, 1, "units"), ("0/1", "units2"), (0, 11)]
    seeds = [sampling.seed_for(*of) for of in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**31 for seed in seeds)
    # Studies are continued by later versions.
    assert sampling.seed_for(0, 1, "training") == sampling.seed_for("0", "1", "training")
    assert sampling.seed_for(0, 0) == 713683445
