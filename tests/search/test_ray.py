"""The same study on a real Ray cluster: the engine, and what is refused before the first trial."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from search.errors import EXIT_USAGE
from tests import invariants
from tests.command import Command

pytest.importorskip("ray", reason="pip install '.[ray]' brings Ray")
ROOT = Path(__file__).parents[2]
RAY = ("--engine", "ray", "--workers", "2")


def refused(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "quickstart", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.stderr.count("fmnist-search:") == 1, done.stderr
    return done.returncode, done.stderr


def test_a_cluster_s_options_need_the_engine(tmp_path):
    code, said = refused("--out", str(tmp_path / "run"), "--address", "auto")
    assert (code, "--address is of use with --engine ray only" in said) == (EXIT_USAGE, True)


@pytest.mark.slow
def test_a_cluster_that_asks_for_no_token_is_refused(tmp_path):
    code, said = refused("--out", str(tmp_path), "--engine", "ray", "--address", "localhost:6379")
    assert (code, "--allow-insecure-ray" in said) == (EXIT_USAGE, True)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["localhost:{}", "ray://localhost:{}", "nonsense", "a:b"])
def test_an_address_where_nothing_listens_is_one_line(tmp_path, address):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    began = time.monotonic()
    code, said = refused(
        *("--out", str(tmp_path), "--engine", "ray", "--allow-insecure-ray"),
        *("--address", address.format(port)),
    )
    assert (code, "of a cluster that runs" in said) == (EXIT_USAGE, True)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_without_ray_it_says_what_to_install(tmp_path):
    script = "import sys; sys.modules['ray'] = None\nfrom search.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "--study", str(ROOT / "tests/dummy.py"),
         "--out", str(tmp_path), "--engine", "ray"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("--engine ray needs Ray: pip install '.[ray]'\n")


@pytest.mark.slow
def test_a_study_runs_as_it_does_here(tmp_path):
    command = Command(tmp_path)
    code, output = command.run("--trials", "6", *RAY)
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    hosts = {a["host"] for t in command.study().trials for a in t.user_attrs["attempts"]}
    assert hosts == {socket.gethostname()}


@pytest.mark.fault("E1")
@pytest.mark.slow
def test_e1_workers_actors_and_the_driver_are_killed(tmp_path):
    command = Command(tmp_path, DUMMY_SLEEP="0.5")
    arguments = ("--trials", "24", "--max-attempts", "50", *RAY)
    rng = random.Random(1)
    process = command.start(*arguments)
    for kill in range(6):
        command.wait_for_worker()
        time.sleep(rng.uniform(0.5, 1.5))
        workers = invariants.workers_of(command.folder)
        assert process.poll() is None, process.stdout.read()
        if workers and kill % 3 != 2:
            worker = rng.choice(workers)
            (worker if kill % 2 else worker.parent()).kill()  # its parent is the actor
        elif kill % 3 == 2:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            invariants.wait_until_no_worker(command.folder, 10)
            process = command.start(*arguments)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    invariants.check(command.folder, command.log, 24)
    assert not any(trial.state.name == "FAIL" for trial in command.study().trials)


@pytest.mark.slow
def test_winners_come_back_whole(tmp_path):
    """The whole journey with Keras: models are written on the node, and brought here."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "quickstart", "--out", str(run),
         "--trials", "3", "--seeds", "1", *RAY],
        cwd=ROOT, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.suffix for path in (run / "models").iterdir()] == [".keras"]
    assert (run / "metrics.json").exists()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Two nodes of one core each on this machine, and a head that works on nothing."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("DUMMY_LOG", str(tmp_path / "dummy.log"))  # nodes hand on their environment
    monkeypatch.setenv("DUMMY_SLEEP", "0.5")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield running
    running.shutdown()


@pytest.mark.fault("E1")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # Ray's cluster leaves its log files open
def test_e1_a_node_is_lost_and_another_joins(cluster, tmp_path):
    lost = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    command = Command(tmp_path)
    (tmp_path / "shared").mkdir()
    arguments = (
        *("--trials", "12", *RAY, "--address", cluster.address, "--allow-insecure-ray"),
        *("--shared", str(tmp_path / "shared"), "--max-attempts", "9"),
    )
    process = command.start(*arguments)
    command.wait_for_report()
    while len(invariants.workers_of(command.folder)) < 2:
        time.sleep(0.1)
    cluster.remove_node(lost, allow_graceful=False)
    time.sleep(2)
    cluster.add_node(num_cpus=1)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "was lost with its actor or node" in output
    invariants.check(command.folder, command.log, 12)
    assert list((tmp_path / "shared").iterdir()) == []
