"""The whole journey on scikit-learn's digits: search, kill, resume, retrain, test, take away."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import keras
import numpy as np
import pytest
import yaml
from PIL import Image

from search import artifacts
from search.data import datasets, fetching, image_folder
from search.errors import EXIT_NOTHING_USABLE
from search.storage import storage
from tests import invariants
from tests.command import ROOT

pytestmark = pytest.mark.slow
SMALL = ["--study", "quickstart", "--trials", "4", "--epochs", "2", "--seeds", "2", "--log", "csv"]


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "search", *arguments, "--out", str(folder)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished run whose coordinator was killed once during the search, once after it."""
    folder = tmp_path_factory.mktemp("journey") / "run"
    for word in ("trial 0", "trained for"):
        process = start(folder, *SMALL)
        for line in process.stdout:
            if word in line:
                break
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(folder, *SMALL)
    return folder


@pytest.mark.fault("A3")
def test_a3_a_winner_s_training_killed_three_times_goes_on(tmp_path):
    """Twice its coordinator, once its worker; the test set is measured once for each winner."""
    folder = tmp_path / "run"
    command = ["--study", "quickstart", "--trials", "2", "--epochs", "2", "--seeds", "2"]
    command += ["--final-epochs", "20"]
    finish(folder, *command, "--no-retrain")
    for whom in ("coordinator", "worker", "coordinator"):
        process = start(folder, *command)
        for line in process.stdout:
            if "training trial-" in line:
                break
        end = time.monotonic() + 60
        while not (workers := invariants.workers_of(folder)) and time.monotonic() < end:
            time.sleep(0.05)
        time.sleep(3)
        if whom == "worker":
            workers[0].kill()
            time.sleep(3)
        process.kill()
        process.communicate()
        invariants.wait_until_no_worker(folder, 5)
    finish(folder, *command)
    records = [v for k, v in study_of(folder).user_attrs.items() if k.startswith("retrained:")]
    assert len(records) == 2
    for record in records:
        assert artifacts.sha256(folder / record["model"]) == record["model_sha256"]
        assert artifacts.sha256(folder / record["evaluation"]) == record["evaluation_sha256"]
    log = (folder / "search.log").read_text()
    assert log.count("measured on the test set") == 2
    assert not list((folder / "models").glob(".*"))
    finish(folder, *command)
    assert (folder / "search.log").read_text().count("measured on the test set") == 2


def study_of(folder):
    return storage.read_study(f"sqlite:///{folder}/study.db", "quickstart")


def test_exactly_as_many_trials_as_asked(run_folder):
    trials = study_of(run_folder).trials
    assert [trial.number for trial in trials] == [0, 1, 2, 3]
    assert all(trial.state.is_finished() for trial in trials)


def test_metrics_are_those_of_the_stored_predictions(run_folder):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    assert metrics["schema"] == 1
    assert metrics["search"]["trials"] == 4
    (winner,) = metrics["winners"]
    accuracies = []
    for seed in winner["seeds"]:
        with np.load(run_folder / seed["evaluation"]) as saved:
            predicted = saved["probabilities"].argmax(axis=1)
            accuracies.append(float(np.mean(predicted == saved["labels"])))
            assert len(saved["history_loss"]) >= 1
    assert [seed["test"]["accuracy"] for seed in winner["seeds"]] == accuracies
    assert len({seed["seed"] for seed in winner["seeds"]}) == 2
    assert winner["test"]["mean"]["accuracy"] == pytest.approx(np.mean(accuracies))
    assert winner["test"]["std"]["accuracy"] == pytest.approx(np.std(accuracies, ddof=1))
    complete = [t for t in study_of(run_folder).trials if t.state.name == "COMPLETE"]
    assert winner["validation_accuracy"] == max(trial.value for trial in complete)


def test_every_artifact_is_the_one_that_the_study_names(run_folder):
    attrs = study_of(run_folder).user_attrs
    records = [value for key, value in attrs.items() if key.startswith("retrained:")]
    named = {r[n]: r[f"{n}_sha256"] for r in records for n in ("model", "evaluation")}
    named |= {r["pictures"]: r["pictures_sha256"] for r in records if "pictures" in r}
    named |= attrs["artifacts"]
    assert len(named) == 2 * 2 + 1 + 3
    for name, sha256 in named.items():
        assert artifacts.sha256(run_folder / name) == sha256
    kept = ("models", "evaluation", "configs")
    there = {str(p.relative_to(run_folder)) for k in kept for p in (run_folder / k).iterdir()}
    assert there | {"metrics.json"} == set(named)


def test_models_load_in_plain_keras(run_folder, tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "out = model.predict(np.zeros((2, 8, 8, 1), 'uint8'), verbose=0)\n"
        "assert 'search' not in sys.modules and 'spaces' not in sys.modules\n"
        "print(out.dtype, out.shape, float(np.abs(out.sum(axis=1) - 1).max()) < 1e-5)"
    )
    model = next((run_folder / "models").iterdir())
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, str(model)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout == "float32 (2, 10) True\n", done.stderr


def test_the_config_names_all_that_is_needed(run_folder):
    config = yaml.safe_load((run_folder / "configs" / "best.yaml").read_text())
    trial = study_of(run_folder).trials[config["trial"]]
    assert config["params"] == trial.params
    assert config["validation"]["accuracy"] == trial.value
    assert set(config["provenance"]["versions"]) >= {"python", "keras", "optuna", "tensorflow"}
    assert re.fullmatch("[0-9a-f]{64}", config["dataset"]["sha256"])


def test_the_newest_snapshot_holds_the_winners_too(run_folder):
    newest = max((run_folder / "snapshots").iterdir())
    kept = storage.read_study(f"sqlite:///{newest}", "quickstart").user_attrs
    assert kept == study_of(run_folder).user_attrs


def test_typed_again_it_says_that_all_is_done(run_folder):
    before = {p: p.stat().st_mtime_ns for p in run_folder.rglob("*.keras")}
    logs = {p: p.stat().st_mtime_ns for p in (run_folder / "logs").iterdir()}
    output = finish(run_folder, *SMALL)
    assert "4 of 4 trials finished" in output
    # No worker was started.
    assert {p: p.stat().st_mtime_ns for p in (run_folder / "logs").iterdir()} == logs
    assert {p: p.stat().st_mtime_ns for p in run_folder.rglob("*.keras")} == before


def test_show_and_export(run_folder):
    shown = finish(run_folder, "show", "--study", "quickstart")
    assert "4 trials" in shown
    exported = finish(run_folder, "export", "--study", "quickstart", "--format", "json")
    best = json.loads(exported)[0]
    assert best["params"] == study_of(run_folder).trials[best["trial"]].params
    rows = finish(run_folder, "export", "--study", "quickstart", "--format", "csv").splitlines()
    assert rows[0].startswith("trial,validation_accuracy,")


def test_optunas_own_tools_read_the_study(run_folder):
    done = subprocess.run(
        [sys.executable, "-m", "optuna", "trials", "--storage",
         f"sqlite:///{run_folder}/study.db", "--study-name", "quickstart", "-f", "json"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    if "No module named optuna.__main__" in done.stderr:  # the command is a script of its own
        command = Path(sys.executable).with_name("optuna")
        done = subprocess.run([str(command), *done.args[3:]], capture_output=True, text=True)
    assert len(json.loads(done.stdout)) == 4, done.stderr


def test_optunas_dashboard_reads_the_study(run_folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    dashboard = subprocess.Popen(
        [str(Path(sys.executable).with_name("optuna-dashboard")), "--port", str(port),
         f"sqlite:///{run_folder}/study.db"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        studies = get(f"http://127.0.0.1:{port}/api/studies")["study_summaries"]
        assert [study["study_name"] for study in studies] == ["quickstart"]
        detail = get(f"http://127.0.0.1:{port}/api/studies/{studies[0]['study_id']}")
        assert len(detail["trials"]) == 4
    finally:
        dashboard.kill()
        dashboard.wait()


def test_the_winners_figures_stand_in_its_note(run_folder):
    study = study_of(run_folder)
    notes = study._storage.get_study_system_attrs(study._study_id)
    best = study.best_trial
    assert notes[f"dashboard:{best._trial_id}:note_str:0"].startswith("## Winner 1: test accuracy")
    assert all(f"dashboard:{trial._trial_id}:note_ver" in notes for trial in study.trials)
    assert notes["dashboard:note_str:0"].startswith(f"## Trial {best.number}: test accuracy")
    assert study.metric_names == ["validation accuracy"]


def test_the_winners_plots_stand_beside_the_study(run_folder):
    study = study_of(run_folder)
    attrs = study._storage.get_study_system_attrs(study._study_id)
    plots = {key.split(":")[2] for key in attrs if key.startswith("dashboard:plot_data:")}
    assert plots == {f"winner-1-{name}" for name in ("accuracy", "loss", "confusion")}


def get(url: str) -> dict:
    for _ in range(300):
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.1)  # it is starting
    raise AssertionError(f"{url} does not answer")


@pytest.mark.fault("S8")
def test_another_space_or_epochs_is_refused_with_what_differs(run_folder, tmp_path):
    before = (run_folder / "study.db").read_bytes()
    process = start(run_folder, "--study", "quickstart", "--trials", "5", "--epochs", "3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "epochs was 2.0 and is now 3.0" in output
    source = (ROOT / "studies" / "quickstart.py").read_text()
    changed = tmp_path / "quickstart.py"
    changed.write_text(source.replace("max_shift = 1", "max_shift = 2"))
    process = start(run_folder, "--study", str(changed), "--trials", "5", "--epochs", "2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "shift was" in output
    assert (run_folder / "study.db").read_bytes() == before


def test_another_study_s_models_are_not_overwritten(run_folder, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text((ROOT / "studies" / "quickstart.py").read_text().replace("quickstart", "mine"))
    kept = [run_folder / "metrics.json", *(run_folder / "models").iterdir()]
    before = [artifacts.sha256(path) for path in kept]
    for arguments, said in (
        (["--study", file], "holds a run of study 'quickstart', whose models would be overwritten"),
        (["predict", "--study", file, file], "are those of study 'quickstart', not of 'mine'"),
    ):
        process = start(run_folder, *map(str, arguments))
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 2
        assert said in " ".join(output.split())
    assert [artifacts.sha256(path) for path in kept] == before


def test_the_ensemble_is_the_mean_of_all_models(run_folder):
    metrics = json.loads((run_folder / "metrics.json").read_text())
    (winner,) = metrics["winners"]
    saved = [np.load(run_folder / seed["evaluation"]) for seed in winner["seeds"]]
    mean = sum(each["probabilities"] for each in saved) / 2
    right = mean.argmax(axis=1) == saved[0]["labels"]
    assert metrics["ensemble"]["models"] == 2
    assert metrics["ensemble"]["test"]["accuracy"] == pytest.approx(right.mean())
    assert metrics["ensemble"]["test"]["loss"] != winner["test"]["mean"]["loss"]


def test_each_trial_and_winner_has_its_csv(run_folder):
    trials = study_of(run_folder).trials
    for trial in trials:
        rows = (run_folder / "csv" / f"trial-{trial.number}.csv").read_text().splitlines()
        assert rows[0].startswith("step,value,")
        assert "learning_rate" in rows[0]
        logged = {int(row.split(",")[0]): float(row.split(",")[1]) for row in rows[1:]}
        assert logged == trial.intermediate_values
    winners = {path.stem for path in (run_folder / "models").iterdir()}
    assert winners < {path.stem for path in (run_folder / "csv").iterdir()}


@pytest.mark.slow
def test_the_exported_script_trains_the_winner_without_this_project(run_folder, tmp_path):
    text = finish(run_folder, "export", "--study", "quickstart", "--format", "python")
    (tmp_path / "model.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-P", "model.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    winner = json.loads((run_folder / "metrics.json").read_text())["winners"][0]
    assert f"parameters: {winner['parameters']}" in done.stdout
    accuracy = float(re.search(r"test accuracy: ([\d.]+)", done.stdout)[1])
    # The same images in the same order from the same weights: what is left is rounding.
    assert accuracy == pytest.approx(winner["seeds"][0]["test"]["accuracy"], abs=0.02)


@pytest.mark.slow
def test_a_config_trained_again_gives_the_figures_of_its_file(run_folder, tmp_path):
    config = run_folder / "configs" / "best.yaml"
    output = finish(tmp_path, "train", str(config), "--seeds", "1")
    assert re.search(r"test accuracy +0\.\d+ +0\.\d+ ± 0\.\d+ +[+-]0\.\d+", output)
    now = json.loads((tmp_path / "metrics.json").read_text())
    was = json.loads((run_folder / "metrics.json").read_text())
    assert now["winners"][0]["parameters"] == was["winners"][0]["parameters"]
    assert now["config"] == yaml.safe_load(config.read_text())
    (seed,) = now["winners"][0]["seeds"]
    first = was["winners"][0]["seeds"][0]
    assert seed["seed"] == first["seed"]
    assert seed["test"]["accuracy"] == pytest.approx(first["test"]["accuracy"], abs=0.02)
    before = artifacts.sha256(tmp_path / seed["model"])
    again = finish(tmp_path, "train", str(config), "--seeds", "1")
    assert "trained for" not in again
    assert artifacts.sha256(tmp_path / seed["model"]) == before
    # Under another precision it is another model.
    precision = {"float32": "bfloat16", "bfloat16": "float32"}[now["training"]["precision"]]
    other = finish(tmp_path, "train", str(config), "--seeds", "1", "--precision", precision)
    assert "trained for" in other
    assert artifacts.sha256(tmp_path / seed["model"]) != before


def test_images_are_classified_by_winner_and_ensemble(run_folder, tmp_path):
    x, _ = datasets.load_train("digits")
    images = []
    for number in range(3):
        images.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(x[number, :, :, 0]).resize((40, 40)).convert("RGB").save(images[-1])
    seen = np.stack([image_folder.read_image(Path(image), (8, 8, 1)) for image in images])
    models = [keras.models.load_model(path) for path in sorted((run_folder / "models").iterdir())]
    votes = [model.predict(seen, verbose=0) for model in models]
    for model, expected in (("winner", votes[0]), ("ensemble", np.mean(votes, axis=0))):
        output = finish(run_folder, "predict", "--study", "quickstart", "--model", model, *images)
        for image, row in zip(images, expected, strict=True):
            assert re.search(rf"{image} +{row.argmax()} +{row.max():.1%}", output), output


@pytest.mark.parametrize(
    ("content", "rule"),
    [(None, "there is no image"), (b"no image", "broken.png")],
)
def test_a_file_that_is_no_image_is_one_line(run_folder, tmp_path, content, rule):
    path = tmp_path / "broken.png"
    if content:
        path.write_bytes(content)
    process = start(run_folder, "predict", "--study", "quickstart", str(path))
    output, _ = process.communicate(timeout=60)
    assert process.returncode in (1, 2)
    (line,) = [line for line in output.splitlines() if line.startswith("fmnist-search: ")]
    assert rule in line
    assert "Traceback" not in output


@pytest.mark.fault("A2")
def test_a_changed_model_is_noticed_and_made_again(run_folder):
    model = run_folder / "models" / sorted(os.listdir(run_folder / "models"))[0]
    before = artifacts.sha256(model)
    model.write_bytes(b"tampered with")
    output = finish(run_folder, *SMALL)
    assert f"{model} is missing or not what was written" in output
    assert artifacts.sha256(model) != before  # trained again; the file holds its time of writing
    record = study_of(run_folder).user_attrs[f"retrained:{model.stem}"]
    assert artifacts.sha256(model) == record["model_sha256"]
    test_every_artifact_is_the_one_that_the_study_names(run_folder)


@pytest.mark.slow
def test_more_seeds_train_only_what_is_missing(run_folder):
    before = {p.name: artifacts.sha256(p) for p in (run_folder / "models").iterdir()}
    finish(run_folder, "retrain", "--study", "quickstart", "--seeds", "3")
    after = {p.name: artifacts.sha256(p) for p in (run_folder / "models").iterdir()}
    assert len(after) == 3
    assert before.items() <= after.items()
    assert len(json.loads((run_folder / "metrics.json").read_text())["winners"][0]["seeds"]) == 3


@pytest.mark.slow
def test_what_a_search_was_told_outlasts_the_retraining_of_its_winner(tmp_path):
    folder = tmp_path / "run"
    told = ["--trials", "2", "--workers", "1", "--precision", "float32"]
    told += ["--sampler", "random", "--pruner", "none"]
    final = ["--final-epochs", "3"]
    finish(folder, "--study", "quickstart", "--epochs", "1", *told, *final, "--no-retrain")
    run = study_of(folder).user_attrs["run"]
    before, (made_with,) = run["told"], run["made_with"]
    assert made_with["versions"]["keras"]
    assert before == {
        "trials": 2,
        "workers": 1,
        "sampler": "random",
        "pruner": "none",
        "precision": "float32",
        "final_epochs": 3.0,
        "top": 1,
        "seeds": 3,
    }
    finish(folder, "retrain", "--study", "quickstart", "--seeds", "1")
    assert study_of(folder).user_attrs["run"]["told"] == before | {"seeds": 1}
    figures = json.loads((folder / "metrics.json").read_text())
    assert figures["winners"][0]["schedule_epochs"] == 3
    training = figures["training"]
    assert training.items() >= {k: before[k] for k in ("sampler", "pruner", "precision")}.items()
    command = (
        "fmnist-search --study quickstart --epochs 1 --seed 0 --trials 2 --sampler random "
        "--pruner none --precision float32 --top 1 --seeds 1 --final-epochs 3 --workers 1"
    )
    assert command in (folder / "report.html").read_text()
    # Typed once more, the first command leaves alone what `retrain` was told.
    finish(folder, "--study", "quickstart", "--epochs", "1", *told)
    assert json.loads((folder / "metrics.json").read_text()) == figures
    assert figures["tested"] == 1
    # Another length trains another model: both have been tested.
    finish(folder, "retrain", "--study", "quickstart", "--final-epochs", "2")
    figures = json.loads((folder / "metrics.json").read_text())
    assert (figures["tested"], len(figures["winners"][0]["seeds"])) == (2, 1)
    assert "has been used for 2 models" in (folder / "report.html").read_text()


def test_other_data_are_refused_also_where_all_is_done(tmp_path):
    path = tmp_path / "mine.npz"
    (x, y), test = datasets.load_train("digits"), datasets.load_test("digits")

    def write(y):
        np.savez(path, x_train=x, y_train=y, x_test=test[0], y_test=test[1])

    write(y)
    command = ["--study", "quickstart", "--dataset", str(path), "--trials", "1", "--epochs", "0.5"]
    finish(tmp_path / "run", *command, "--seeds", "1")
    logs = [path.stat().st_mtime_ns for path in (tmp_path / "run" / "logs").iterdir()]
    finish(tmp_path / "run", *command)  # all is done: no worker is started
    assert [path.stat().st_mtime_ns for path in (tmp_path / "run" / "logs").iterdir()] == logs
    write(np.roll(y, 1))  # labels are put right, say
    process = start(tmp_path / "run", *command)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 2
    assert "data was" in output


def test_ctrl_c_is_heard_while_another_process_prepares_the_images(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for name in ("rose", "tulip"):
        (tmp_path / "flowers" / name).mkdir(parents=True)
        for number in range(14):
            image = Image.new("L", (8, 8), 9 * number)
            image.save(tmp_path / "flowers" / name / f"{number}.png")
    copies = tmp_path / "keras" / "datasets" / "fmnist-search"
    copies.mkdir(parents=True)
    command = ["--study", "quickstart", "--dataset", str(tmp_path / "flowers")]
    with fetching.alone_in(copies):
        process = start(tmp_path / "run", *command)
        end = time.monotonic() + 60
        while not list(tmp_path.glob("run/logs/*")) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(8)  # until the study is described, and the data are asked for
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted; nothing is lost" in output


def test_a_search_without_a_usable_trial_ends_alike_when_it_is_typed_again(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from studies.study import Study\n"
        "study = Study(name='mine', objective=lambda trial: float('nan'), trials=2)\n"
    )
    for _ in range(2):
        process = start(tmp_path / "run", "--study", str(file))
        output, _ = process.communicate(timeout=100)
        assert process.returncode == EXIT_NOTHING_USABLE, output
        assert "are finished and none is complete" in output


def test_a_gpu_that_keras_does_not_see_is_pointed_out(tmp_path):
    driver = tmp_path / "bin" / "nvidia-smi"  # a machine whose driver knows a GPU
    driver.parent.mkdir()
    driver.write_text("#!/bin/sh\necho 'GPU 0: a card (UUID: GPU-1)'\n")
    driver.chmod(0o755)
    hidden = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "quickstart", "--trials", "1", "--epochs", "1",
         "--no-retrain", "--out", str(tmp_path / "run")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=hidden | {"PATH": f"{driver.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 worker," in done.stderr  # one for the GPU
    assert "a GPU that Keras does not see" in done.stderr
    assert "pip install '.[cuda]'" in done.stderr
