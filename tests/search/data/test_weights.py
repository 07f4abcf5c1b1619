import functools
import hashlib
import http.server
import importlib.util
import os
import socketserver
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pooch
import pytest

from search.data import weights
from search.data.fetching import DataFile
from search.errors import EXIT_USAGE, SearchError
from tests.command import ROOT

CONTENT = b"\x89HDF\r\n\x1a\n and 58 889 256 bytes less"
MD5 = "md5:" + hashlib.md5(CONTENT).hexdigest()
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = weights.PUBLISHED.name
CLOSED = "http://127.0.0.1:9/"  # the discard port: nobody listens


@pytest.fixture(autouse=True)
def _no_waiting_between_downloads(monkeypatch):
    """pooch tries again a second later."""
    monkeypatch.setattr(pooch.core, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Keras's folder in a KERAS_HOME of its own; no server answers."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(weights, "PUBLISHED", DataFile(NAME, MD5))
    monkeypatch.setattr(weights, "URL", CLOSED)
    return tmp_path / "keras" / "models"


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(folder, tmp_path_factory, monkeypatch):
    """The folder of a server that answers."""
    served = tmp_path_factory.mktemp("served")
    handler = functools.partial(Silent, directory=served)
    with socketserver.TCPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setattr(weights, "URL", f"http://127.0.0.1:{server.server_address[1]}/")
        yield served
        server.shutdown()
        thread.join()


def put(folder, content=CONTENT, name=NAME):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)
    return folder / name


def test_keras_publishes_this_file():
    # The package's source, since importing keras.applications takes seconds.
    source = Path(importlib.util.find_spec("keras").origin).parent / "src/applications/vgg16.py"
    text = source.read_text().replace('"\n    "', "")
    assert f'"{weights.URL}{weights.PUBLISHED.name}"' in text
    assert f'file_hash="{weights.PUBLISHED.hash.removeprefix("md5:")}"' in text


def test_importing_loads_nothing_heavy():
    heavy = "{'keras', 'tensorflow', 'jax', 'h5py', 'pooch', 'requests'}"
    code = f"import sys; from search.data import weights; print({heavy} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"


def test_no_weights_are_random_and_say_so(folder):
    assert weights.ensure("none") == ("none", "", "random weights")
    assert not folder.exists()


def test_cached_weights_need_no_network(folder):
    path = put(folder)
    found = weights.ensure("imagenet")
    assert found == (str(path), SHA256, "ImageNet weights")


@pytest.mark.parametrize("cached", [None, CONTENT[:-1]], ids=["missing", "truncated"])
def test_what_is_missing_or_wrong_is_fetched(folder, served, cached):
    put(served)
    if cached:
        put(folder, cached)
    assert weights.ensure("imagenet")[:2] == (str(folder / NAME), SHA256)
    assert [path.name for path in folder.iterdir()] == [NAME]


@pytest.mark.parametrize("cached", [None, CONTENT[:-1]], ids=["missing", "truncated"])
def test_without_network_one_line_says_what_to_do(folder, cached):
    if cached:
        put(folder, cached)
    with pytest.raises(SearchError) as caught:
        weights.ensure("imagenet")
    message = str(caught.value)
    assert f"could not be fetched from {CLOSED} (" in message
    assert f"put {NAME} ({MD5}) into {folder}, or" in message
    assert "`--weights FILE`" in message
    assert "`--weights none`" in message
    assert "\n" not in message


def test_a_wrong_download_is_not_kept(folder, served):
    put(served, b"an error page, served as a file")
    with pytest.raises(SearchError, match=r"\(the server's file has another hash\)"):
        weights.ensure("imagenet")
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "label"),
    [(CONTENT, "ImageNet weights"), (CONTENT + b".", "weights of mine.h5")],
    ids=["published", "another"],
)
def test_a_file_is_known_by_its_content(folder, tmp_path, content, label):
    path = put(tmp_path, content, "mine.h5")
    found = weights.ensure(str(path))
    assert found == (str(path), hashlib.sha256(content).hexdigest(), label)


def test_a_saved_model_is_a_file_of_weights(folder, tmp_path):
    path = tmp_path / "mine.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", "{}")
    assert weights.ensure(str(path)).label == "weights of mine.keras"


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("imagnet", None, "is not there"),
        ("folder.h5", "folder", "is no file"),
        ("mine.npz", CONTENT, "ends otherwise"),
        ("mine.h5", b"text", "is no HDF5 file"),
        ("mine.weights.h5", b"", "is no HDF5 file"),
        ("mine.keras", CONTENT, "is no Keras model"),
    ],
)
def test_what_is_no_file_of_weights_is_refused(folder, tmp_path, name, content, what):
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(SearchError) as caught:
        weights.ensure(str(path))
    assert str(caught.value) == (
        "--weights is imagenet, none, or a file of weights (.h5, .hdf5, .keras). "
        f"Received: {path}, which {what}. Fix: check the path"
    )
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    path = put(tmp_path, name="mine.h5")
    path.chmod(0)
    with pytest.raises(SearchError, match=r"which can't be read \(Permission denied\)"):
        weights.ensure(str(path))


@pytest.mark.parametrize(
    ("reference", "absolute"),
    [
        ("imagenet", "imagenet"),
        ("none", "none"),
        ("mine.h5", "/here/mine.h5"),
        ("../mine.h5", "/mine.h5"),
        ("~/mine.h5", "/home/me/mine.h5"),
        (Path("/there/mine.h5"), "/there/mine.h5"),
    ],
)
def test_a_path_means_the_same_in_every_process(monkeypatch, reference, absolute):
    monkeypatch.setenv("HOME", "/home/me")
    assert weights.resolve(reference, Path("/here")) == absolute
