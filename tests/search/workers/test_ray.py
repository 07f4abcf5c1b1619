"""The same study on a real Ray cluster: the engine, and what is refused before the first trial."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from search.errors import EXIT_USAGE
from search.storage import storage
from tests import invariants
from tests.benchmarks import race
from tests.command import ROOT, Command
from tests.search.test_fashion_mnist import is_cached

pytest.importorskip("ray", reason="pip install '.[ray]' brings Ray")
# Ray's Cluster leaves its log files open.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
RAY = ("--engine", "ray", "--workers", "2")
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}


def refused(*arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "quickstart", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert done.stderr.count("fmnist-search:") == 1, done.stderr
    return done.returncode, done.stderr


def images(folder, num_images):
    """Two classes of so many grey images, without a test part."""
    for label, name in enumerate(("cats", "dogs")):
        (folder / name).mkdir(parents=True)
        for at in range(num_images):
            pixels = np.full((8, 8), 100 * label + at, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{at}.png")
    return folder


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
    command = Command(tmp_path, KERAS_HOME=str(tmp_path))  # no data set is there, nor needed
    code, output = command.run("--trials", "6", *RAY)
    assert code == 0, output
    invariants.check(command.folder, command.log, 6)
    niceness = {entry["niceness"] for entry in command.entries("begin")}
    assert niceness == {os.nice(0)}  # as that of the engine's own
    hosts = {a["host"] for t in command.study().trials for a in t.user_attrs["attempts"]}
    assert hosts == {socket.gethostname()}


@pytest.mark.fault("E1")
@pytest.mark.slow
def test_e1_workers_actors_and_the_driver_are_killed(tmp_path):
    command = Command(tmp_path)
    command.slow_down()
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
    command.hurry()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    invariants.check(command.folder, command.log, 24)
    assert not any(trial.state.name == "FAIL" for trial in command.study().trials)


@pytest.mark.slow
def test_winners_come_back_whole(tmp_path):
    """The whole journey with Keras, on a folder of images that is sent: models are written on the
    node, and brought here. The run's folder is relative, as it is where none is named."""
    run = tmp_path / "run"
    images(tmp_path / "pets", 80)
    done = subprocess.run(
        [sys.executable, "-m", "search", "--study", "quickstart", "--out", "run",
         "--dataset", "pets", "--trials", "3", "--seeds", "1", *RAY],
        cwd=tmp_path, capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report: run/report.html" in done.stdout
    assert [path.suffix for path in (run / "models").iterdir()] == [".keras"]
    for path in ("metrics.json", "configs/best.yaml"):
        assert str(run) not in (run / path).read_text()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A cluster of this machine without a token, whose head works on nothing."""
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("DUMMY_LOG", str(tmp_path / "dummy.log"))  # nodes hand on their environment
    monkeypatch.setenv("DUMMY_SLEEP", "0.5")
    # A token in the home folder changes the default.
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    running = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield running
    running.shutdown()


def of(cluster):
    return ("--engine", "ray", "--address", cluster.address, "--allow-insecure-ray")


@contextmanager
def started(*arguments, prefix=(), **environment):
    """Ray, started as on a machine of its own, until the end of the block."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
         "--disable-usage-stats", "--node-ip-address", "127.0.0.1",
         *("--min-worker-port", "0", "--max-worker-port", "0"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if "runtime started" in line:
                break
        assert process.poll() is None, "".join(said)
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # Ray's processes end with it
        process.communicate()


@pytest.fixture
def far(cluster, tmp_path):
    """A node of two cores that has folders `shared` and `data` of its own, as another machine."""
    for name in ("shared", "data", "node"):
        (tmp_path / name).mkdir()
    own = " && ".join(f"mount -t tmpfs none {tmp_path / name}" for name in ("shared", "data"))
    apart = ("unshare", "--mount", *([] if os.getuid() == 0 else ["--map-root-user"]))
    if subprocess.run([*apart, "sh", "-c", own], capture_output=True).returncode:
        pytest.skip("a mount namespace is not permitted here")
    command = ("--address", cluster.address, "--num-cpus", "2")
    inside = (*apart, "sh", "-c", f'{own} && exec "$@"', "sh")
    with started(*command, prefix=inside, TMPDIR=str(tmp_path / "node")):
        yield tmp_path


@pytest.mark.slow
def test_a_cluster_that_can_give_nothing_is_refused(cluster, tmp_path):
    code, said = refused("--out", str(tmp_path / "run"), *of(cluster))
    assert (code, "the cluster has neither GPU nor CPU" in said) == (1, True), said


def packages(folder, **versions):
    """A folder in which each package has that version, whatever is installed."""
    for name, version in versions.items():
        about = folder / f"{name}-{version}.dist-info"
        about.mkdir(parents=True)
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    return os.pathsep.join([str(folder), str(ROOT)])


@pytest.mark.slow
def test_other_packages_on_a_node_are_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", packages(tmp_path / "packages", keras="3.0.1"))
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    code, said = refused("--out", str(tmp_path / "run"), *of(cluster))
    assert (code, "has other versions than this one: keras 3.0.1 (here " in said) == (1, True), said
    assert not (tmp_path / "run" / "study.db").exists()


@pytest.mark.slow
def test_a_token_of_the_command_s_own_is_not_the_cluster_s(cluster, tmp_path):
    address = ("--engine", "ray", "--address", cluster.address)
    code, said = refused("--out", str(tmp_path / "run"), *address, **TOKEN)
    assert (code, "asks for no token" in said) == (EXIT_USAGE, True), said


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_a_cluster_with_a_token_is_used_by_who_has_it(tmp_path, scheme):
    with socket.socket() as one, socket.socket() as other:
        for sock in (one, other):
            sock.bind(("127.0.0.1", 0))
        port, client = (str(sock.getsockname()[1]) for sock in (one, other))
    ports = ("--port", port, "--ray-client-server-port", client, "--include-dashboard", "false")
    command = Command(tmp_path, **TOKEN)
    address = ("--engine", "ray", "--address", f"{scheme}127.0.0.1:{client if scheme else port}")
    with started(
        "--head", "--num-cpus", "1", *ports, **TOKEN, DUMMY_LOG=str(command.log), DUMMY_SLEEP="0.1"
    ):
        code, said = refused(
            "--out", str(tmp_path / "run"), *address, **TOKEN | {"RAY_AUTH_TOKEN": "b" * 64}
        )
        assert (code, "can't be joined" in said) == (1, True), said
        code, output = command.run("--trials", "3", *address)
        assert code == 0, output
        invariants.check(command.folder, command.log, 3)


@pytest.mark.slow
def test_a_folder_that_a_node_does_not_share_is_refused(far, cluster):
    shared = far / "shared"
    code, said = refused("--out", str(far / "run"), *of(cluster), "--shared", str(shared))
    assert (code, "does not find there what was written here" in said) == (EXIT_USAGE, True), said
    assert list(shared.iterdir()) == []


# Two workers of a cluster, with a folder of images that its nodes have not.
TWO_WORKERS = """
import logging, sys
from contextlib import closing
from pathlib import Path

from search.data import image_folder
from search.workers.ray import RayEngine
from search.workers.pool import Pool

folder, images, study, address, node = sys.argv[1:]
logging.disable()
image_folder.prepare(Path(images))
engine = RayEngine(Path(folder), Path(study), address=address, insecure=True)
with closing(engine):
    pool = Pool(engine, engine.devices("2"), {"type": "open", "file": study})
    with pool:
        pool.prepare({"dataset": images})
        while len(pool.idle()) < 2:
            list(pool.poll(1))
        hosts = {slot.worker.log.split(":")[0] for slot in pool.slots}
        for path in sorted(Path(node).rglob("*.npz")):
            assert not path.is_symlink()
            print(path.name, path.stat().st_nlink, len(hosts))
            print(image_folder.packed(Path(images)) == path.read_bytes())
"""


@pytest.mark.slow
def test_images_come_to_a_node_that_has_not_their_folder(far, cluster):
    """Nor is their decoded copy on the node: all of it goes through Ray's object store."""
    done = subprocess.run(
        [sys.executable, "-c", TWO_WORKERS, str(far / "run"), str(images(far / "data" / "pets", 8)),
         str(ROOT / "tests/dummy.py"), cluster.address, str(far / "node")],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env={**os.environ, "KERAS_HOME": str(far / "data")},
    )  # fmt: skip
    assert done.stdout == "pets.npz 1 1\nTrue\n", done.stderr


@pytest.mark.slow
def test_nodes_that_join_are_used_if_they_are_alike(cluster, tmp_path, monkeypatch):
    cluster.add_node(num_cpus=1)
    command = Command(tmp_path)
    process = command.start("--trials", "1000", *of(cluster))
    command.wait_for_report()
    assert len(invariants.workers_of(command.folder)) == 1
    monkeypatch.setenv("PYTHONPATH", packages(tmp_path / "packages", keras="3.0.1"))
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    log = command.folder / "search.log"
    command._wait(lambda: "other versions than this one: keras 3.0.1" in log.read_text())
    cluster.add_node(num_cpus=1)
    command._wait(lambda: len(invariants.workers_of(command.folder)) == 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    nodes = "\n".join(line for line in log.read_text().splitlines() if "node" in line)
    assert nodes.count("it is not used") == 1
    assert nodes.count("nodes have joined: 1 more worker") == 1


@pytest.mark.fault("E1")
@pytest.mark.slow
def test_e1_a_node_is_lost_and_another_joins(cluster, tmp_path):
    lost = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    command = Command(tmp_path)
    (tmp_path / "shared").mkdir()
    arguments = (
        *("--trials", "12", "--workers", "2", *of(cluster)),
        *("--shared", str(tmp_path / "shared"), "--max-attempts", "9"),
    )
    process = command.start_slowly(*arguments)
    while len(invariants.workers_of(command.folder)) < 2:
        time.sleep(0.1)
    cluster.remove_node(lost, allow_graceful=False)
    time.sleep(2)
    cluster.add_node(num_cpus=1)
    command.hurry()
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    assert "was lost with its actor or node" in output
    invariants.check(command.folder, command.log, 12)
    assert list((tmp_path / "shared").iterdir()) == []


@pytest.mark.fault("E1")
@pytest.mark.longest
@pytest.mark.skipif(not is_cached(), reason="Fashion-MNIST is not in KERAS_HOME or ~/.keras")
def test_e1_a_real_search_outlives_one_of_its_two_nodes(cluster, tmp_path):
    """A quarter of an hour on two cores."""
    lost = cluster.add_node(num_cpus=1)
    cluster.add_node(num_cpus=1)
    out, shared = tmp_path / "run", tmp_path / "shared"
    shared.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "search", "--study", str(race.study_file("cnn", tmp_path)),
         "--trials", "12", "--epochs", "1", "--sampler", "random", "--final-epochs", "1",
         "--seeds", "2", "--out", str(out), "--shared", str(shared), *of(cluster)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    # In the middle: some trials have ended, and both nodes train, with checkpoints.
    while len(ended(out)) < 4 or len(list(shared.rglob("*.npz"))) < 2:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.5)
    cluster.remove_node(lost, allow_graceful=False)
    output, _ = process.communicate(timeout=3000)
    print(output)
    assert process.returncode == 0, output
    assert "was lost with its actor or node" in output
    trials = storage.read_study(f"sqlite:///{out}/study.db", "cnn").trials
    assert [trial.number for trial in trials] == list(range(12))
    assert {trial.state.name for trial in trials} == {"COMPLETE", "PRUNED"}
    assert max(len(trial.user_attrs["attempts"]) for trial in trials) == 2
    (winner,) = json.loads((out / "metrics.json").read_text())["winners"]
    assert len(winner["seeds"]) == 2


def ended(out):
    """Its finished trials, while it runs."""
    study = storage.read_study(f"sqlite:///{out}/study.db", "cnn")
    return [trial for trial in (study.trials if study else []) if trial.state.is_finished()]
