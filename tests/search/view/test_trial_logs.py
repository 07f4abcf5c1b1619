import contextlib
import csv
import os
import subprocess
import sys
import threading
import types

import psutil
import pytest

from search.errors import EXIT_USAGE, EXIT_USER_ERROR, SearchError
from search.view.trial_logs import KINDS, open_logs
from tests.command import ROOT

METRICS = {"accuracy": 0.5, "loss": 1.25, "val_accuracy": 0.75, "val_loss": 1.5}
PARAMS = {"optimizer": "adam", "rate": 0.001, "layers": 3, "flip": True, "decay": None}

ON_A_FULL_DISK = """
import logging, resource, sys
from search.view.trial_logs import open_logs

logging.basicConfig(format="%(name)s: %(message)s")
logs = open_logs(*sys.argv[1:])
resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
for step in range(1, 40):
    for trial in ("trial-0", "trial-1"):
        logs.report(trial, step, 0.5, {"loss": 1.0}, {"rate": 0.1})
logs.end("trial-0", "COMPLETE", 0.5, {"rate": 0.1})
logs.history("trial-0-seed-0", {"loss": [1.0]}, {"rate": 0.1})
logs.close()
print("the search went on")
"""

WITHOUT_TENSORBOARD = """
import sys
from search.errors import SearchError
from search.view.trial_logs import open_logs

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "tensorboard":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NotInstalled())
open_logs("csv", sys.argv[1]).close()
try:
    open_logs("tensorboard", sys.argv[1])
except SearchError as error:
    print(error)
    sys.exit(error.exit_code)
"""

IN_THE_COORDINATOR = """
import sys
from search.view.trial_logs import open_logs

for kind in ("csv", "tensorboard"):
    logs = open_logs(kind, sys.argv[1])
    logs.report("trial-0", 1, 0.5, {"loss": 1.0}, {"rate": 0.1})
    logs.end("trial-0", "COMPLETE", 0.5, {"rate": 0.1})
    logs.history("trial-0-seed-0", {"loss": [1.0]}, {"rate": 0.1})
    logs.close()
print(sorted({name.partition(".")[0] for name in sys.modules} & {"keras", "tensorflow"}))
"""


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def rows(folder, name):
    with (folder / "csv" / f"{name}.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.reader(stream))


@pytest.fixture
def opened(tmp_path):
    """Opens logs below tmp_path, which are closed after the test."""
    with contextlib.ExitStack() as stack:
        yield lambda kind: stack.enter_context(contextlib.closing(open_logs(kind, tmp_path)))


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a run as TensorBoard does where TensorFlow isn't installed: sooner."""
    name = "tensorboard.compat.notf"
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return lambda name: EventAccumulator(str(tmp_path / "tensorboard" / name)).Reload()


def scalars(run):
    return {tag: [(e.step, e.value) for e in run.Scalars(tag)] for tag in run.Tags()["scalars"]}


def session_start(run):
    from tensorboard.plugins.hparams import metadata

    content = run.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    return metadata.parse_session_start_info_plugin_data(content)


def status(run):
    from tensorboard.plugins.hparams import api_pb2, metadata

    content = run.PluginTagToContent("hparams").get("_hparams_/session_end_info")
    if content is None:
        return None
    return api_pb2.Status.Name(metadata.parse_session_end_info_plugin_data(content).status)


# CSV


def test_csv_rows_are_there_as_soon_as_they_are_reported(tmp_path, opened):
    logs = opened("csv")
    logs.report("trial-12", 1, 0.75, METRICS, PARAMS)
    header = ["step", "value", "accuracy", "loss", "val_accuracy", "val_loss"]
    first = ["1", "0.75", "0.5", "1.25", "0.75", "1.5"]
    assert rows(tmp_path, "trial-12") == [header, first]
    logs.report("trial-12", 2, 0.1 + 0.2, dict(reversed(METRICS.items())), PARAMS)
    second = ["2", "0.30000000000000004", "0.5", "1.25", "0.75", "1.5"]
    assert rows(tmp_path, "trial-12") == [header, first, second]
    logs.end("trial-12", "COMPLETE", 0.9, PARAMS)
    assert rows(tmp_path, "trial-12") == [header, first, second]
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["trial-12.csv"]


def test_csv_gets_a_column_for_a_metric_that_comes_later(tmp_path, opened):
    logs = opened("csv")
    logs.report("trial-0", 1, 0.1, {"loss": 3.0}, {})
    logs.report("trial-0", 2, 0.2, {"loss": 2.0, "précision, top 5": 0.5}, {})
    logs.report("trial-0", 3, 0.3, {}, {})
    logs.report("trial-0", 4, 0.4, {"loss": 1.0}, {})
    assert rows(tmp_path, "trial-0") == [
        ["step", "value", "loss", "précision, top 5"],
        ["1", "0.1", "3.0", ""],
        ["2", "0.2", "2.0", "0.5"],
        ["3", "0.3", "", ""],
        ["4", "0.4", "1.0", ""],
    ]
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["trial-0.csv"]


def test_csv_step_and_value_are_the_trials_whatever_the_metrics_are_called(tmp_path, opened):
    opened("csv").report("trial-0", 1, 0.5, {"value": 7.0, "step": 8.0, "f1": 9.0}, {})
    assert rows(tmp_path, "trial-0") == [["step", "value", "f1"], ["1", "0.5", "9.0"]]


def test_csv_of_a_retrained_winner_has_no_value(tmp_path, opened):
    logs = opened("csv")
    for _ in range(2):  # retrained once more, it replaces the first
        logs.history("trial-3-seed-0", {"loss": [2.0, 1.0], "rate": [0.5]}, PARAMS)
    assert rows(tmp_path, "trial-3-seed-0") == [
        ["step", "loss", "rate"],
        ["1", "2.0", "0.5"],
        ["2", "1.0", ""],
    ]


def test_csv_that_a_killed_process_has_left_half_written_is_removed(tmp_path, opened):
    opened("csv").report("trial-0", 1, 0.5, METRICS, PARAMS)
    (tmp_path / "csv" / ".trial-0.0123abcd.partial.csv").write_text("step,val")
    opened("csv")
    assert [path.name for path in (tmp_path / "csv").iterdir()] == ["trial-0.csv"]


def test_csv_of_a_trial_without_a_report_does_not_exist(tmp_path, opened):
    logs = opened("csv")
    logs.end("trial-0", "FAIL", None, PARAMS)
    logs.history("trial-0-seed-0", {}, PARAMS)
    assert list((tmp_path / "csv").iterdir()) == []


# TensorBoard


def test_tensorboard_shows_a_trial_while_it_runs(tmp_path, opened, read):
    logs = opened("tensorboard")
    logs.report("trial-12", 1, 0.75, METRICS, PARAMS)
    logs.report("trial-12", 2, 0.875, METRICS | {"val_accuracy": 0.875}, PARAMS)
    run = read("trial-12")
    assert scalars(run) == {
        "accuracy": [(1, 0.5), (2, 0.5)],
        "loss": [(1, 1.25), (2, 1.25)],
        "val_accuracy": [(1, 0.75), (2, 0.875)],
        "val_loss": [(1, 1.5), (2, 1.5)],
    }
    assert status(run) is None


def test_tensorboard_shows_the_reports_of_an_objective_without_metrics(tmp_path, opened, read):
    logs = opened("tensorboard")
    for step in (0, 10, 20):
        logs.report("trial-0", step, step / 4, {}, PARAMS)
    assert scalars(read("trial-0")) == {"value": [(0, 0.0), (10, 2.5), (20, 5.0)]}


def test_tensorboard_shows_hyperparameters_and_the_value(tmp_path, opened, read):
    logs = opened("tensorboard")
    logs.report("trial-12", 4, 0.75, METRICS, PARAMS)
    logs.end("trial-12", "COMPLETE", 0.625, PARAMS)
    run = read("trial-12")
    start = session_start(run)
    assert start.group_name == "trial-12"
    assert {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()} == {
        "optimizer": "adam",
        "rate": 0.001,
        "layers": 3,
        "flip": True,
        "decay": "None",
    }
    assert scalars(run)["value"] == [(4, 0.625)]
    assert status(run) == "STATUS_SUCCESS"


@pytest.mark.parametrize(
    ("state", "expected"), [("PRUNED", "STATUS_UNKNOWN"), ("FAIL", "STATUS_FAILURE")]
)
@pytest.mark.parametrize("num_reports", [0, 1])
def test_tensorboard_shows_how_other_trials_ended(
    tmp_path, opened, read, state, expected, num_reports
):
    logs = opened("tensorboard")
    for step in range(num_reports):
        logs.report("trial-0", step, 0.75, METRICS, PARAMS)
    logs.end("trial-0", state, None, PARAMS)
    run = read("trial-0")
    assert status(run) == expected
    assert session_start(run).hparams["layers"].number_value == 3
    assert "value" not in scalars(run)


def test_tensorboard_shows_what_a_later_process_ends(tmp_path, opened, read):
    opened("tensorboard").report("trial-0", 1, 0.75, METRICS, PARAMS)  # and is killed
    opened("tensorboard").end("trial-0", "COMPLETE", 0.5, PARAMS)
    run = read("trial-0")
    assert scalars(run)["loss"] == [(1, 1.25)]
    assert scalars(run)["value"] == [(0, 0.5)]
    assert status(run) == "STATUS_SUCCESS"


def test_a_tensorboard_that_is_open_is_told_to_forget_only_a_lost_attempt(tmp_path, opened, read):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.compat.proto.event_pb2 import SessionLog

    opened("tensorboard").report("trial-0", 1, 0.5, METRICS, PARAMS)
    opened("tensorboard").end("trial-0", "COMPLETE", 0.5, PARAMS)
    begun, ended = sorted((tmp_path / "tensorboard" / "trial-0").iterdir())

    def says_start(path):
        events = EventFileLoader(str(path)).Load()
        return any(event.session_log.status == SessionLog.START for event in events)

    assert says_start(begun)
    assert not says_start(ended)


def test_tensorboard_shows_a_retrained_winner(tmp_path, opened, read):
    logs = opened("tensorboard")
    for _ in range(2):  # retrained once more, it replaces the first
        logs.history("trial-3-seed-0", {"loss": [2.0, 1.0]}, PARAMS)
    run = read("trial-3-seed-0")
    assert scalars(run) == {"loss": [(1, 2.0), (2, 1.0)]}
    assert session_start(run).group_name == "trial-3-seed-0"
    assert status(run) == "STATUS_SUCCESS"


# Both


def logged_steps(kind, folder, read):
    if kind == "csv":
        return [(int(row[0]), float(row[2])) for row in rows(folder, "trial-0")[1:]]
    assert len(list((folder / "tensorboard" / "trial-0").iterdir())) == 1
    return scalars(read("trial-0"))["loss"]


@pytest.mark.parametrize("first_step", [0, 1, 3])
@pytest.mark.parametrize("same_process", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_retried_attempt_replaces_the_lost_one(
    tmp_path, opened, read, kind, same_process, first_step
):
    logs = opened(kind)
    for step in (1, 2, 3):
        logs.report("trial-0", step, 0.5, {"loss": 1.0, "lost": 1.0}, PARAMS)
    if not same_process:
        logs = opened(kind)
    for step in (first_step, 10):
        logs.report("trial-0", step, 0.5, {"loss": 2.0}, PARAMS)
    assert logged_steps(kind, tmp_path, read) == [(first_step, 2.0), (10, 2.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_open_while_their_trials_run(tmp_path, opened, kind):
    def num_open():
        return sum(str(tmp_path) in file.path for file in psutil.Process().open_files())

    num_threads = threading.active_count()
    logs = opened(kind)
    for step in (1, 2, 1, 2):  # the second attempt of each
        for trial in range(8):
            logs.report(f"trial-{trial}", step, 0.5, METRICS, PARAMS)
    assert num_open() == 8
    for trial in range(6):
        logs.end(f"trial-{trial}", "PRUNED", None, PARAMS)
    assert num_open() == 2
    logs.history("trial-0-seed-0", {"loss": [1.0]}, PARAMS)
    assert num_open() == 2
    assert threading.active_count() == num_threads
    logs.close()
    logs.close()
    assert num_open() == 0


def test_without_a_kind_nothing_is_written(tmp_path):
    logs = open_logs(None, tmp_path / "run")
    logs.report("trial-0", 1, 0.5, METRICS, PARAMS)
    logs.end("trial-0", "COMPLETE", 0.5, PARAMS)
    logs.history("trial-0-seed-0", {"loss": [1.0]}, PARAMS)
    logs.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path, kind):
    (tmp_path / kind).write_text("in the way")
    with pytest.raises(SearchError, match=f"{kind} can't be made a folder: File exists") as caught:
        open_logs(kind, tmp_path)
    assert caught.value.exit_code == EXIT_USER_ERROR


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, kind):
    (tmp_path / kind).mkdir(mode=0o500)
    with pytest.raises(SearchError, match="make this folder writable"):
        open_logs(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_that_leads_elsewhere_is_refused(tmp_path, kind):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / kind).symlink_to("elsewhere")
    with pytest.raises(SearchError, match="symbolic link"):
        open_logs(kind, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trial_that_leads_elsewhere_is_left_alone(tmp_path, opened, kind, caplog):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "events.out.tfevents.1").write_text("not ours")
    logs = opened(kind)
    name = "trial-0.csv" if kind == "csv" else "trial-0"
    (tmp_path / kind / name).symlink_to(elsewhere)
    logs.report("trial-0", 1, 0.5, METRICS, PARAMS)
    assert (elsewhere / "events.out.tfevents.1").read_text() == "not ours"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_ends_the_logs_not_the_search(tmp_path, kind):
    done = run(ON_A_FULL_DISK, kind, tmp_path)
    assert done.stdout == "the search went on\n"
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        f"search: no more logs go to {tmp_path / kind}: [Errno 27] File too large; "
        "the search goes on"
    ]
    assert not (tmp_path / kind / "trial-0-seed-0").exists()


def test_a_missing_package_is_told_with_its_command(tmp_path):
    done = run(WITHOUT_TENSORBOARD, tmp_path)
    assert done.returncode == EXIT_USAGE
    assert "No module named 'tensorboard'. Fix: pip install '.[tensorboard]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_coordinator_imports_no_tensorflow(tmp_path):
    done = run(IN_THE_COORDINATOR, tmp_path)
    assert (done.stdout, done.stderr) == ("[]\n", "")
    assert len(list(tmp_path.rglob("*tfevents*"))) == 2
