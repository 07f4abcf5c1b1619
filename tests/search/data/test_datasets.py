import dataclasses
import gzip
import hashlib
import http.server
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pooch
import pytest
from PIL import Image

from search.data import datasets
from search.errors import EXIT_USAGE, EXIT_USER_ERROR, SearchError
from tests.command import ROOT

FASHION_MNIST = (
    Path(os.environ.get("KERAS_HOME") or "~/.keras").expanduser() / "datasets" / "fashion-mnist"
)
NOBODY = 65534
CLOSED = "http://127.0.0.1:9/"  # the discard port: nobody listens

# The same row as `declare` gives, in a process of its own.
ENSURE = """
import json, os, sys
import pooch, requests  # now: another user may not be able to read them
from search.data import datasets
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


@pytest.fixture(autouse=True)
def _no_waiting_between_downloads(monkeypatch):
    """pooch tries again a second later."""
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=lambda seconds: None))


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
HASH = {name: "md5:" + hashlib.md5(content).hexdigest() for name, content in FILES.items()}
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
    files = tuple(datasets.DataFile(name, digest) for name, digest in HASH.items())
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
        [sys.executable, "-c", ENSURE, json.dumps([url, list(HASH.items()), user])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_loads_nothing_heavy():
    heavy = "{'keras', 'tensorflow', 'jax', 'sklearn', 'pooch', 'requests', 'PIL'}"
    code = f"import sys; from search.data import datasets; print({heavy} & set(sys.modules))"
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
    start = (
        "A data set is one of cifar10, digits, fashion_mnist, mnist, or FILE.npz, or a folder of "
        f"images. Received: '{name}'."
    )
    assert str(caught.value) == f"{start} {hint}".strip()


@pytest.mark.fault("D3")
def test_cached_files_need_no_network(folder):
    put(folder)
    assert datasets.ensure("tiny") == CONTENT_HASH


def test_an_empty_cache_is_filled(folder, server):
    folder.rmdir()
    assert datasets.ensure("tiny") == CONTENT_HASH
    assert server.requests == list(FILES)
    assert names(folder) == sorted(FILES)


@pytest.mark.fault("D1")
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


@pytest.mark.fault("D1")
@pytest.mark.parametrize(("num_wrong", "is_mended"), [(1, True), (2, False)])
def test_a_wrong_download_is_fetched_again_once(folder, server, num_wrong, is_mended):
    put(folder)
    (folder / "train-labels.gz").unlink()
    server.wrong = num_wrong
    if is_mended:
        assert datasets.ensure("tiny") == CONTENT_HASH
    else:
        with pytest.raises(SearchError, match="the server's file has another hash"):
            datasets.ensure("tiny")
    assert server.requests == ["train-labels.gz"] * 2
    assert names(folder) == sorted(FILES if is_mended else set(FILES) - {"train-labels.gz"})


@pytest.mark.fault("D3")
def test_without_network_one_line_says_what_to_do(folder):
    put(folder)
    (folder / "train-labels.gz").unlink()
    (folder / "test-labels.gz").write_bytes(b"damaged")
    with pytest.raises(SearchError) as caught:
        datasets.ensure("tiny")
    message = str(caught.value)
    for name in ("train-labels.gz", "test-labels.gz"):
        assert f"{name} ({HASH[name]})" in message
    assert "train-images.gz" not in message
    assert f"into {folder}," in message
    assert "`fmnist-search --study quickstart`, which needs no network" in message
    assert "\n" not in message
    assert caught.value.exit_code == EXIT_USER_ERROR


@pytest.mark.fault("D2")
def test_eight_first_runs_fetch_each_file_once(folder, server):
    folder.rmdir()
    runs = [start_ensure(server.url) for _ in range(8)]
    assert {run.communicate(timeout=120)[0].strip() for run in runs} == {CONTENT_HASH}
    assert server.requests == list(FILES)
    assert names(folder) == sorted(FILES)


@pytest.mark.fault("D2")
def test_a_killed_download_leaves_no_partial_file(folder, server):
    server.stuck = 1
    with start_ensure(server.url) as run:
        assert server.sent_half.wait(20)
        run.send_signal(signal.SIGKILL)
    assert not set(names(folder)) & set(FILES)
    assert datasets.ensure("tiny") == CONTENT_HASH
    assert names(folder) == sorted(FILES)


@pytest.mark.fault("S6")
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
        output, errors = start_ensure(CLOSED, user=user).communicate(timeout=120)
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


@pytest.mark.fault("D1")
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


@pytest.mark.parametrize(
    ("counts", "num_monitor"),
    [
        ([9_000, 6], 375),  # of the rare class 1 in val
        ([9_000, 9_000, 2, 3, 4], 750),
        ([40] * 300, 500),
        ([22] * 300, 1_100),  # 4 a class would be more than there are
        ([2, 2], 2),
        ([2] * 300, 300),
        ([2, 7_000], 291),
        ([24] * 2_600, 2_600),
    ],
)
def test_unbalanced_and_many_classes_can_be_split(counts, num_monitor):
    y = np.repeat(np.arange(len(counts)), counts).astype(np.uint16)
    at = datasets.split(y)
    assert set(y[at.train]) == set(range(len(counts)))
    assert sorted([*at.train, *at.val]) == list(range(len(y)))
    assert set(at.monitor) <= set(at.val)
    assert len(at.monitor) == num_monitor


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


@pytest.mark.parametrize(
    ("reference", "resolved"),
    [
        ("fashion_mnist", "fashion_mnist"),
        ("digits", "digits"),  # though there is a folder of that name
        ("unknown", "unknown"),
        ("", ""),
        ("./digits", "{}/digits"),
        ("flowers", "{}/flowers"),
        ("flowers/", "{}/flowers"),
        (".", "{}"),
        ("../x", "{parent}/x"),
        ("x.npz", "{}/x.npz"),
        ("X.NPZ", "{}/X.NPZ"),
        (Path("a/b.npz"), "{}/a/b.npz"),
        ("/data/x.npz", "/data/x.npz"),
        ("~/x.npz", "/home/me/x.npz"),
        ("~", "/home/me"),
    ],
)
def test_a_reference_means_the_same_everywhere(tmp_path, monkeypatch, reference, resolved):
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("digits", "flowers"):
        (tmp_path / name).mkdir()
    wanted = resolved.format(tmp_path, parent=tmp_path.parent)
    assert datasets.resolve(reference, tmp_path) == wanted
    assert datasets.resolve(wanted, Path("/elsewhere")) == wanted


@pytest.mark.parametrize(
    ("reference", "said"),
    [("none.npz", "is not there"), ("no/folder", "is not there"), ("./x.csv", "is neither")],
)
def test_a_path_without_data_is_wrong_usage(tmp_path, reference, said):
    (tmp_path / "x.csv").write_text("1,2")
    resolved = datasets.resolve(reference, tmp_path)
    for function in (datasets.find, datasets.ensure, datasets.load_train):
        with pytest.raises(SearchError, match=f"Received: {resolved}, which {said}") as caught:
            function(resolved)
        assert caught.value.exit_code == EXIT_USAGE


def test_data_that_may_not_be_read_are_named():
    # Not tmp_path, into which pytest lets only the owner; root may read everything, nobody not.
    with tempfile.TemporaryDirectory() as home:
        Path(home).chmod(0o755)
        locked = [Path(home) / "x.npz", Path(home) / "flowers"]
        locked[0].touch(mode=0o000)
        locked[1].mkdir(mode=0o000)
        user = os.geteuid()
        for path in locked:
            os.seteuid(user or NOBODY)
            try:
                with pytest.raises(SearchError, match=f"^{path}.*Permission denied. Fix: check"):
                    datasets.find(str(path))
            finally:
                os.seteuid(user)


@pytest.fixture
def shapes(tmp_path):
    """The path of a .npz file of the user's: 7 training and 2 test images of 2 classes."""
    x = np.arange(7 * 6, dtype=np.uint8).reshape(7, 2, 3)
    y = np.arange(7) % 2
    path = tmp_path / "shapes.npz"
    np.savez_compressed(
        path, x_train=x, y_train=y, x_test=x[:2], y_test=y[:2], class_names=["line", "dot"]
    )
    return str(path)


def test_a_file_of_the_users(shapes):
    dataset = datasets.find(shapes)
    assert (dataset.name, dataset.input_shape) == ("shapes.npz", (2, 3, 1))
    assert (dataset.class_names, dataset.num_classes) == (("line", "dot"), 2)
    assert datasets.ensure(shapes) == hashlib.sha256(Path(shapes).read_bytes()).hexdigest()
    x, y = datasets.load_test(shapes)
    assert (x.shape, y.tolist()) == ((2, 2, 3, 1), [0, 1])
    part = datasets.load_split(shapes)
    assert [len(array) for array in part] == [5, 5, 2, 2, 2, 2]


def test_a_file_of_the_users_is_checked_whole(shapes):
    with np.load(shapes) as saved:
        arrays = dict(saved)
    np.savez(shapes, **(arrays | {"y_test": np.array([0, 2])}))
    datasets.find(shapes)
    datasets.load_train(shapes)
    with pytest.raises(SearchError, match=r"y_test\[1\] is 2"):
        datasets.ensure(shapes)


def test_a_folder_of_images_in_another_process(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    for i in range(14):
        path = tmp_path / "two" / str(i // 7) / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 3), i, np.uint8)).save(path)
    datasets.ensure(str(tmp_path / "two"))
    code = (
        "import sys; from search.data import datasets; print(*datasets.load_test(sys.argv[1])[1])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "two")],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "algorithm", "shape"),
    [("mnist", "sha256", (28, 28, 1)), ("cifar10", "md5", (32, 32, 3))],
)
def test_a_published_file_of_both_parts(folder, server, monkeypatch, name, algorithm, shape):
    home = folder.parent
    [file] = {file.name for file in datasets.DATASETS[name].train_files}
    monkeypatch.setitem(FILES, file, ARCHIVES[name]())
    digest = f"{algorithm}:{hashlib.new(algorithm, FILES[file]).hexdigest()}"
    files = (datasets.DataFile(file, digest),)
    row = dataclasses.replace(
        datasets.DATASETS[name], url=server.url, train_files=files, test_files=files
    )
    monkeypatch.setitem(datasets.DATASETS, name, row)
    assert datasets.find(name).input_shape == shape
    assert datasets.ensure(name) == hashlib.sha256(FILES[file]).hexdigest()
    assert server.requests == [file]
    assert (home / file).is_file()
    (home / file).write_bytes(b"damaged")
    datasets.ensure(name)
    assert server.requests == [file] * 2
    for load, labels in (
        (datasets.load_train, [*range(10)] * 2),
        (datasets.load_test, [*range(10)]),
    ):
        x, y = load(name)
        assert (x.shape, x.dtype, y.dtype) == ((len(labels), *shape), np.uint8, np.uint8)
        assert y.tolist() == labels
        assert x[:, 0, 0, 0].tolist() == labels


def mnist():
    y = np.arange(20) % 10
    x = np.zeros((20, 28, 28), np.uint8) + y[:, np.newaxis, np.newaxis].astype(np.uint8)
    stream = io.BytesIO()
    np.savez_compressed(stream, x_train=x, y_train=y, x_test=x[:10], y_test=y[:10])
    return stream.getvalue()


def cifar10():
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for at, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            labels = range(10) if name == "test_batch" else range(at * 4, at * 4 + 4)
            content = b"".join(bytes([label % 10]) * 3073 for label in labels)
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


ARCHIVES = {"mnist": mnist, "cifar10": cifar10}


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
