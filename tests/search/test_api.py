"""`from search import run`, as a notebook and as scripts without a `__main__` guard use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import keras_tuner
import numpy as np
import pytest

import search
from search import api
from search.errors import EXIT_USAGE, SearchError
from search.storage import storage
from studies.study import Study
from tests.command import ROOT

SPACE = """
import keras


def dense(hp):
    model = keras.Sequential([keras.layers.Rescaling(1 / 255), keras.layers.Flatten()])
    model.add(keras.layers.Dense(hp.Int("units", 16, 64), "relu"))
    model.add(keras.layers.Dense(10, "softmax"))
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model
"""


def script(folder: Path, text: str, *, fails: bool = False) -> str:
    """Runs text as a script of the user's, in a folder of theirs."""
    (folder / "script.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_script_without_a_guard_searches_and_gets_its_result(tmp_path):
    (tmp_path / "spaces_of_mine.py").write_text(SPACE)
    text = """
from search import run
from studies.study import Study
from spaces_of_mine import dense

study = Study(name="mine", space=dense, dataset="digits", trials=2, epochs=1, batch_size=32,
              images_per_report=512)
result = run(study, seeds=2)
assert result.best.params == result.study.best_params, result
assert result.best.value == result.study.best_value
assert result.metrics["winners"][0]["trial"] == result.best.number
assert result.metrics["ensemble"]["models"] == 2
models = result.models()
assert [model.output_shape for model in models] == [(None, 10)] * 2
try:
    result.study.set_user_attr("a", 1)
except Exception as error:
    assert "readonly" in str(error.__cause__)
else:
    raise AssertionError("the study can be written")
print(result)
"""
    output = script(tmp_path, text)
    assert "trial 0" in output
    assert "Result(folder='runs/mine', 2 trials, best trial" in output
    # The same folder goes on from the command line.
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "runs/mine/study.py", "--seeds", "2"],
        cwd=tmp_path, capture_output=True, text=True, timeout=100,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 2 trials finished" in done.stdout
    assert "trial 0 " not in done.stderr  # nothing was done again


@pytest.mark.slow
def test_a_space_given_by_file_is_found_from_the_caller_s_folder(tmp_path):
    (tmp_path / "mine.py").write_text(SPACE)
    text = """
from search import run
from studies.study import Study
result = run(Study(name="mine", space="mine.py:dense", dataset="digits", trials=1, epochs=0.5),
             retrain=False, out="elsewhere", verbosity=-1)
assert result.metrics is None
try:
    result.models()
except Exception as error:
    print(error)
"""
    assert script(tmp_path, text) == "there are no models: nothing was retrained\n"
    assert (tmp_path / "elsewhere" / "study.db").exists()


@pytest.mark.slow
def test_a_class_of_the_script_itself_is_refused_with_the_fix(tmp_path):
    text = (
        SPACE
        + """
from search import run
from studies.study import Study
run(Study(name="mine", space=dense, dataset="digits"))
"""
    )
    output = script(tmp_path, text, fails=True)
    assert "the workers can't import 'dense' from '__main__'" in output
    assert 'space="file.py:dense"' in output


class Space(keras_tuner.HyperModel):
    pass


@pytest.mark.parametrize(
    ("arguments", "options", "rule"),
    [
        ({"space": Space()}, {}, "an object can't be sent to.*Fix: give its class"),
        ({"space": lambda hp: None}, {}, "can't import '<lambda>'|can't import '.*<lambda>"),
        ({"space": Space}, {"trails": 3}, r"run\(\) takes .*trials.*Received: trails"),
        ({"space": "file.py"}, {}, "'file.py:name' or 'module:name'"),
        ({"space": "missing.py:Space"}, {}, "There is no file .*missing.py"),
        ({"space": "missing_module:Space"}, {}, "can't import 'missing_module'"),
        pytest.param(
            *({"space": "keras_tuner:Space"}, {}, "keras_tuner has no 'Space'"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_workers_cannot_reach_is_one_line(tmp_path, arguments, options, rule):
    with pytest.raises(SearchError, match=rule) as caught:
        search.run(Study(name="mine", dataset="digits", **arguments), out=tmp_path, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"precision": "float16"}, r"run\(precision=...\): .*float16.*bfloat16"),
        ({"sampler": "grid"}, "grid.*tpe"),
        ({"pruner": "hyperband"}, "hyperband.*asha"),
        ({"log": "wandb"}, "wandb.*tensorboard"),
        ({"seeds": 0}, r"run\(seeds=...\): 0 is not in the range"),
        ({"top": 0}, "0 is not in the range"),
        ({"trials": 2.5}, "'2.5' is not a valid integer"),
        ({"trials": True}, "'True' is not a valid integer"),
        ({"epochs": -1}, "-1.0 is not in the range"),
        ({"workers": 0}, "'0'"),
        ({"time_budget": 0}, "a time is"),
        ({"cache_size": -1}, "a size is"),
    ],
)
def test_options_are_those_of_the_command_line(tmp_path, options, rule):
    with pytest.raises(SearchError, match=rule) as caught:
        search.run("quickstart", out=tmp_path, **options)
    assert caught.value.exit_code == EXIT_USAGE
    assert list(tmp_path.iterdir()) == []


def test_options_are_taken_as_plain_values_or_as_the_command_line_has_them():
    given = {"trials": np.int64(3), "time_budget": 90, "silence": 0.5, "cache_size": 500}
    given |= {"seeds": "2", "epochs": 1, "workers": 4, "dataset": Path("a.npz"), "sampler": None}
    taken = api._as_the_command_takes_them(given)
    assert taken == {
        **{"trials": 3, "time_budget": 90.0, "silence": 0.5, "cache_size": 500},
        **{"seeds": 2, "epochs": 1.0, "workers": "4", "dataset": "a.npz"},
    }


def test_a_refused_study_leaves_the_file_of_the_run(tmp_path):
    (tmp_path / "mine.py").write_text("def half(trial):\n    return 0.5\n")
    study = Study(name="mine", objective=f"{tmp_path}/mine.py:half", trials=1)
    (tmp_path / "study.py").write_text(before := "study = None  # of the run")
    with pytest.raises(SearchError, match=r"no model of ours: --epochs"):
        search.run(study, out=tmp_path, epochs=3)
    assert (tmp_path / "study.py").read_text() == before
    with storage.lock(tmp_path / ".lock"), pytest.raises(SearchError, match="is being run by"):
        search.run(study, out=tmp_path)
    assert (tmp_path / "study.py").read_text() == before


def test_a_study_that_is_given_is_for_its_owner_alone_too(tmp_path):
    (tmp_path / "mine.py").write_text("def half(trial):\n    return 0.5\n")
    study = Study(name="mine", objective=f"{tmp_path}/mine.py:half", trials=1)
    before = os.umask(0)
    try:
        with pytest.raises(SearchError, match=r"no model of ours: --epochs"):
            search.run(study, out=tmp_path / "run", epochs=3)
    finally:
        os.umask(before)
    for path in (tmp_path / "run", tmp_path / "run" / "study.py"):
        assert path.stat().st_mode & 0o077 == 0


def test_an_unknown_study_is_a_usage_error(tmp_path):
    with pytest.raises(SearchError, match="there is no study 'quickstrat'") as caught:
        search.run("quickstrat", out=tmp_path)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.slow
def test_ctrl_c_in_a_notebook_loses_nothing(tmp_path):
    def interrupt():
        while (
            not (tmp_path / "search.log").exists()
            or "trial 0" not in (tmp_path / "search.log").read_text()
        ):
            time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        search.run("quickstart", trials=50, out=tmp_path, retrain=False, verbosity=-1)
    result = search.run(
        "quickstart", trials=len(study_trials(tmp_path)), out=tmp_path, retrain=False, verbosity=-1
    )
    assert [trial.number for trial in result.study.trials] == list(range(len(result.study.trials)))
    assert all(trial.state.is_finished() for trial in result.study.trials)


def study_trials(folder):
    from search.storage import storage

    return storage.read_study(f"sqlite:///{folder}/study.db", "quickstart").trials


@pytest.mark.slow
def test_it_runs_in_a_thread_that_gets_no_signals(tmp_path):
    results = []

    def work():
        results.append(search.run("quickstart", trials=1, epochs=0.5, out=tmp_path, retrain=False))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(200)
    assert results[0].best.number == 0


def test_importing_search_brings_no_keras():
    code = "import sys, search, search.api; print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_metrics_are_those_on_disk(tmp_path):
    result = search.run("quickstart", trials=1, epochs=1, seeds=1, out=tmp_path, verbosity=-1)
    assert result.metrics == json.loads((tmp_path / "metrics.json").read_text())
    assert result.metrics["ensemble"] is None
    (model,) = result.models()
    assert np.isfinite(model.predict(np.zeros((1, 8, 8, 1), "uint8"), verbose=0)).all()
    (tmp_path / result.metrics["winners"][0]["seeds"][0]["model"]).write_bytes(b"damaged")
    with pytest.raises(SearchError, match="is not what was written"):
        result.models()
