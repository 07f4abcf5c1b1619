import gzip
import hashlib
import http.server
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest

from search import datasets
from search.errors import EXIT_USER_ERROR, SearchError

ROOT = Path(__file__).resolve().parents[2]
FASHION_MNIST = (
    Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets" / "fashion-mnist"
)
NOBODY = 65534
CLOSED = "http://127.0.0.1:9/"  # the discard port: nobody listens

# The same row as `declare` gives, in a process of its own.
ENSURE = """
import json, os, sys
import pooch, requests  # now: another user may not be able to read them
from search import datasets
from search.errors import SearchError

url, files, user = json.loads(sys.argv[1])
if user:
    os.setuid(user)
files = tuple(datasets.DataFile(*file) for file in files)
datasets.DATASETS["tiny"] = datasets.Dataset(
    name="tiny", input_shape=(2, 3, 1), class_names=("a", "b"),
    read=datasets.find("fashion_mnist").read,
    folder="tiny", url=url, train_files=files[:2], test_files=files[2:],
)
try:
    print(datasets.ensure("tiny"))
except SearchError as error:
    print(error)
"""


def idx(array, *, magic=None, sizes=None):
    sizes = sizes or array.shape
    start = magic or bytes([0, 0, 8, array.ndim])
    return start + struct.pack(f">{len(sizes)}I", *sizes) + array.tobytes()


IMAGES = np.arange(24, dtype=np.uint8).reshape(4, 2, 3)
LABELS = np.array([0, 1, 1, 0], np.uint8)
FILES = {
    "train-images.gz": gzip.compress(idx(IMAGES)),
    "train-labels.gz": gzip.compress(idx(LABELS)),
    "test-images.gz": gzip.compress(idx(IMAGES[:2] + 100)),
    "test-labels.gz": gzip.compress(idx(LABELS[:2])),
}
MD5 = {name: hashlib.md5(content).hexdigest() for name, content in FILES.items()}
CONTENT_HASH = hashlib.sha256(b"".join(FILES.values())).hexdigest()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The empty folder of a data set `tiny` in a KERAS_HOME of its own; no server answers."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    declare(monkeypatch, CLOSED)
    folder = tmp_path / "datasets" / "tiny"
    folder.mkdir(parents=True)
    return folder


def declare(monkeypatch, url):
    files = tuple(datasets.DataFile(name, md5) for name, md5 in MD5.items())
    row = datasets.Dataset(
        name="tiny",
        input_shape=(2, 3, 1),
        class_names=("a", "b"),
        read=datasets.find("fashion_mnist").read,
        folder="tiny",
        url=url,
        train_files=files[:2],
        test_files=files[2:],
    )
    monkeypatch.setitem(datasets.DATASETS, "tiny", row)


class Server(http.server.ThreadingHTTPServer):
    """Serves FILES; `wrong` and `stuck` say for which next requests it does not."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = []
        self.wrong = 0
        self.stuck = 0
        self.sent_half = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        name = self.path.removeprefix("/")
        server.requests.append(name)
        body = FILES[name]
        if server.wrong:
            server.wrong -= 1
            body = b"an error page, served as a file"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if not server.stuck:
            self.wfile.write(body)
            return
        server.stuck -= 1
        self.wfile.write(body[: len(body) // 2])
        server.sent_half.set()
        self.rfile.read(1)  # until the client is gone

    def log_message(self, *_):
        pass


@pytest.fixture
def server(folder, monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        declare(monkeypatch, server.url)
        yield server
        server.shutdown()
        thread.join()


def put(folder, **changed):
    for name, content in (FILES | changed).items():
        (folder / name).write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def start_ensure(url, *, user=None):
    return subprocess.Popen(
        [sys.executable, "-c", ENSURE, json.dumps([url, list(MD5.items()), user])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_loads_nothing_heavy():
    heavy = "{'keras', 'tensorflow', 'jax', 'sklearn', 'pooch', 'requests'}"
    code = f"import sys; from search import datasets; print({heavy} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("name", "hint"),
    [("fashion-mnist", "Did you mean 'fashion_mnist'?"), ("digit", "Did you mean 'digits'?"),
     ("xyz", "")],
)  # fmt: skip
def test_an_unknown_name_lists_the_known(name, hint):
    with pytest.raises(SearchError) as caught:
        datasets.find(name)
    start = f"A data set is one of digits, fashion_mnist. Received: '{name}'."
    assert str(caught.value) == f"{start} {hint}".strip()


def test_cached_files_need_no_network(folder):
    put(folder)
    assert datasets.ensure("tiny") == CONTENT_HASH


def test_an_empty_cache_is_filled(folder, server):
    folder.rmdir()
    assert datasets.ensure("tiny") == CONTENT_HASH
    assert server.requests == list(FILES)
    assert names(folder) == sorted(FILES)


@pytest.mark.parametrize(
    "content",
    [
        FILES["train-labels.gz"][:-3],
        FILES["train-labels.gz"] + b"extra",
        gzip.compress(idx(1 - LABELS)),
        gzip.compress(idx(LABELS, magic=b"\0\0\x0d\1")),
        b"",
    ],
    ids=["truncated", "extra", "wrong-labels", "bad-magic", "empty"],
)
def test_a_wrong_file_is_fetched_again(folder, server, content):
    put(folder, **{"train-labels.gz": content})
    assert datasets.ensure("tiny") == CONTENT_HASH
    assert server.requests == ["train-labels.gz"]
    assert (folder / "train-labels.gz").read_bytes() == FILES["train-labels.gz"]


@pytest.mark.parametrize(("num_wrong", "is_mended"), [(1, True), (2, False)])
def test_a_wrong_download_is_fetched_again_once(folder, server, num_wrong, is_mended):
    put(folder)
    (folder / "train-labels.gz").unlink()
    server.wrong = num_wrong
    if is_mended:
        assert datasets.ensure("tiny") == CONTENT_HASH
    else:
        with pytest.raises(SearchError, match="the server's file has another MD5"):
            datasets.ensure("tiny")
    assert server.requests == ["train-labels.gz"] * 2
    assert names(folder) == sorted(FILES if is_mended else set(FILES) - {"train-labels.gz"})


def test_without_network_one_line_says_what_to_do(folder):
    put(folder)
    (folder / "train-labels.gz").unlink()
    (folder / "test-labels.gz").write_bytes(b"damaged")
    with pytest.raises(SearchError) as caught:
        datasets.ensure("tiny")
    message = str(caught.value)
    for name in ("train-labels.gz", "test-labels.gz"):
        assert f"{name} (MD5 {MD5[name]})" in message
    assert "train-images.gz" not in message
    assert f"into {folder}," in message
    assert "`fmnist-search --study quickstart`, which needs no network" in message
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_USER_ERROR


def test_eight_first_runs_fetch_each_file_once(folder, server):
    folder.rmdir()
    runs = [start_ensure(server.url) for _ in range(8)]
    assert {run.communicate(timeout=30)[0].strip() for run in runs} == {CONTENT_HASH}
    assert server.requests == list(FILES)
    assert names(folder) == sorted(FILES)


def test_a_killed_download_leaves_no_partial_file(folder, server):
    server.stuck = 1
    with start_ensure(server.url) as run:
        assert server.sent_half.wait(20)
        run.send_signal(signal.SIGKILL)
    assert not set(names(folder)) & set(FILES)
    assert datasets.ensure("tiny") == CONTENT_HASH
    assert names(folder) == sorted(FILES)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_read_only_cache(monkeypatch, damaged):
    # Not tmp_path, into which pytest lets only the owner; root may write everywhere, nobody not.
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home) / "datasets" / "tiny"
        folder.mkdir(parents=True)
        put(folder, **({"test-labels.gz": b"damaged"} if damaged else {}))
        for path in (Path(home), folder.parent, folder):
            path.chmod(0o555)
        monkeypatch.setenv("KERAS_HOME", home)
        user = NOBODY if os.geteuid() == 0 else None
        output, errors = start_ensure(CLOSED, user=user).communicate(timeout=20)
        for path in (Path(home), folder.parent, folder):
            path.chmod(0o755)
    if not damaged:
        assert output.strip() == CONTENT_HASH, errors
        return
    assert "(Permission denied). Fix: put test-labels.gz" in output, errors
    assert output.count("\n") == 1


def test_training_data_without_any_test_file(folder):
    put(folder)
    for name in ("test-images.gz", "test-labels.gz"):
        (folder / name).unlink()
    x, y = datasets.load_train("tiny")
    assert (x.dtype, y.dtype) == (np.uint8, np.uint8)
    np.testing.assert_array_equal(x, IMAGES[..., np.newaxis])
    np.testing.assert_array_equal(y, LABELS)
    with pytest.raises(SearchError, match=r"test-images\.gz"):
        datasets.load_test("tiny")


def test_test_data_are_the_other_files(folder):
    put(folder)
    x, y = datasets.load_test("tiny")
    np.testing.assert_array_equal(x, IMAGES[:2, ..., np.newaxis] + 100)
    np.testing.assert_array_equal(y, LABELS[:2])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train-images.gz", FILES["train-images.gz"][:-9], "a complete gzip file"),
        ("train-images.gz", FILES["train-images.gz"] + b"extra", "a complete gzip file"),
        ("train-images.gz", idx(IMAGES), "a complete gzip file"),
        ("train-images.gz", gzip.compress(b""), "starts with the bytes 00000803"),
        ("train-images.gz", FILES["train-labels.gz"], "00000803. Received: 00000801"),
        ("train-labels.gz", gzip.compress(idx(LABELS) + b"x"), "holds 4 bytes. Received: 5"),
        ("train-labels.gz", gzip.compress(idx(LABELS)[:-1]), "holds 4 bytes. Received: 3"),
        ("train-labels.gz", gzip.compress(idx(LABELS[:3])), "each of 4. Received: 3"),
        ("train-labels.gz", gzip.compress(idx(LABELS + 1)), "labels are 0-1. Received: 2"),
        ("train-images.gz", gzip.compress(idx(IMAGES, sizes=(4, 3, 2))), r"are \(2, 3, 1\)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "content",
)
def test_a_malformed_file_is_named(folder, name, content, said):
    put(folder, **{name: content})
    with pytest.raises(SearchError, match=f"{folder / name} is no usable data file: .*{said}"):
        datasets.load_train("tiny")


@pytest.mark.parametrize(
    ("num_images", "num_val", "num_monitor"),
    [(60_000, 10_000, 2_500), (12_000, 2_000, 500), (5_000, 833, 833), (60, 10, 10), (30, 10, 10)],
)
def test_split_is_stratified_disjoint_and_complete(num_images, num_val, num_monitor):
    y = np.random.default_rng(0).permutation(np.arange(num_images) % 10)
    at = datasets.split(y)
    assert (len(at.val), len(at.monitor)) == (num_val, num_monitor)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([at.train, at.val])), np.arange(num_images)
    )
    assert set(at.monitor) <= set(at.val)
    for part in at:
        counts = np.bincount(y[part], minlength=10)
        assert counts.max() - counts.min() <= 1
    for part, again in zip(at, datasets.split(y), strict=True):
        np.testing.assert_array_equal(part, again)


def test_split_is_the_same_in_every_version():
    # Results of two versions can be compared only while this holds.
    at = datasets.split(np.arange(6_000) % 10)
    assert at.val[:8].tolist() == [0, 1, 9, 12, 17, 24, 30, 37]
    assert at.monitor[:8].tolist() == [17, 56, 85, 88, 112, 113, 154, 163]


@pytest.mark.parametrize("y", [np.arange(10), np.array([0, 0, 0, 0, 0, 0, 1])])
def test_a_class_of_one_image_cannot_be_split(y):
    with pytest.raises(SearchError, match=f"at least 2 images of every class.*{len(y)} images"):
        datasets.split(y)


def test_digits_come_with_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "none"))
    x, y = datasets.load_train("digits")
    x_test, y_test = datasets.load_test("digits")
    assert (x.shape, x.dtype, y.dtype) == ((1437, 8, 8, 1), np.uint8, np.uint8)
    assert (x_test.shape, y_test.shape) == ((360, 8, 8, 1), (360,))
    assert set(np.unique(x)) == {round(level * 255 / 16) for level in range(17)}
    assert not {image.tobytes() for image in x} & {image.tobytes() for image in x_test}
    assert np.bincount(y_test).min() >= 35
    assert datasets.ensure("digits") == datasets.ensure("digits")
    assert not (tmp_path / "none").exists()
    part = datasets.load_split("digits")
    assert [len(array) for array in part] == [1197, 1197, 240, 240, 240, 240]


@pytest.mark.skipif(
    not FASHION_MNIST.is_dir(),
    reason="Fashion-MNIST is not in KERAS_HOME",
)
def test_fashion_mnist():
    assert datasets.ensure("fashion_mnist").startswith("1ad69a47dbce37a98443e5e5")
    part = datasets.load_split("fashion_mnist")
    assert part.x_train.shape == (50_000, 28, 28, 1)
    assert part.x_train.dtype == np.uint8
    for y, of_each in ((part.y_train, 5_000), (part.y_val, 1_000), (part.y_monitor, 250)):
        assert np.bincount(y).tolist() == [of_each] * 10
    x_test, y_test = datasets.load_test("fashion_mnist")
    assert x_test.shape == (10_000, 28, 28, 1)
    assert np.bincount(y_test).tolist() == [1_000] * 10
