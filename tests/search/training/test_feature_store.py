import errno
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from contextlib import contextmanager

import keras
import numpy as np
import pytest
from keras import layers

from search.errors import SearchError
from search.training import backend, feature_files, features
from search.training.feature_store import FeatureStore
from tests.command import ROOT

SIZE = 8
NUM_IMAGES = 2_600  # chunks of 512: five whole ones and a short one
LARGE = 10**9
NUM_BYTES = 2 * NUM_IMAGES * 32 + 4 * 2_000 * 32  # on disk: float16, and the sample

# The same, slowly, in a process of its own: one line for every chunk.
COMPUTE = f"""
import pathlib, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.search.training import test_feature_store as t

store = t.FeatureStore(pathlib.Path(sys.argv[1]), t.LARGE)
for seed in (0, 1):
    parts = t.cut(seed)
    predict = parts.prefix.predict_on_batch
    parts.prefix.predict_on_batch = lambda x: time.sleep(0.3) or predict(x)
    with store.open(parts, t.images(), data="d", tell=lambda *done: print(*done, flush=True)):
        print("open", flush=True)
        sys.stdin.readline()
"""


class Times(layers.Layer):
    """One whose code changes, though not its configuration."""

    factor = 1.0

    def call(self, x):
        return x * Times.factor


def times():
    return [Times()]


def built(seed=0, units=32, scale=1.0, head_scale=1.0, before=None):
    """A frozen layer and a head: its activations are (units,)."""
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 1), dtype="uint8"),
            layers.Rescaling(scale / 255),
            *(before() if before else ()),
            layers.Flatten(),
            layers.Dense(units, activation="relu", trainable=False),
            layers.Dense(3, activation="softmax", kernel_initializer=scaled(head_scale)),
        ]
    )
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return features.cut(model)


cut = functools.cache(built)


def scaled(scale):
    return keras.initializers.RandomNormal(stddev=0.1 * scale, seed=1)


def images(n=NUM_IMAGES):
    return np.random.default_rng(0).integers(0, 256, (n, SIZE, SIZE, 1)).astype(np.uint8)


@contextmanager
def counted(parts):
    """A list of how many images the prefix is asked for."""
    predict = parts.prefix.predict_on_batch
    batches = []
    parts.prefix.predict_on_batch = lambda x: batches.append(len(x)) or predict(x)
    yield batches
    parts.prefix.predict_on_batch = predict


def stored(folder, parts, x=None, max_bytes=LARGE, data="d", **options):
    """A copy of the activations, and of how many images the prefix was asked."""
    x = images() if x is None else x
    store = FeatureStore(folder, max_bytes)
    with counted(parts) as batches, store.open(parts, x, data=data, **options) as array:
        return np.array(array), sum(batches)


def entries(folder):
    return sorted(path.name.partition("-")[2] for path in folder.iterdir() if path.is_dir())


def entry(folder, pattern="*-float*"):
    (path,) = folder.glob(pattern)
    return path


def exact(parts, x):
    return parts.prefix.predict(x, verbose=0, batch_size=256)


@pytest.fixture(autouse=True)
def _new_process(monkeypatch):
    monkeypatch.setattr(feature_files, "verified", set())
    yield
    keras.config.set_dtype_policy("float32")
    Times.factor = 1.0


@pytest.fixture
def other_process(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", COMPUTE, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


# What is stored


def test_activations_are_computed_once(tmp_path):
    parts = cut()
    told = []
    first, asked = stored(tmp_path, parts, tell=lambda *done: told.append(done))
    assert first.dtype == np.float16
    np.testing.assert_allclose(first, exact(parts, images()), atol=1e-3)
    assert told == [(min(n, NUM_IMAGES), NUM_IMAGES) for n in range(0, 3_073, 512)]
    again, few = stored(tmp_path, built())  # built again: names have other numbers
    np.testing.assert_array_equal(again, first)
    assert asked >= NUM_IMAGES
    assert few == 8
    assert entries(tmp_path) == ["float16"]


def test_they_are_mapped_and_can_be_trained_on(tmp_path):
    parts = built()
    with FeatureStore(tmp_path, LARGE).open(parts, images(), data="d") as array:
        rows = backend.Rows(array, np.arange(100, 1_124))
        order = np.arange(1_024, dtype=np.int32)
        y = np.arange(1_024) % 3
        batches = backend.training_batches(rows, y, order, 128)
        told = parts.rest.fit(batches, steps_per_epoch=8, shuffle=False, verbose=0)
        assert parts.rest.evaluate(backend.validation_batches(rows, y), verbose=0)[1] > 0
    assert told.history["loss"]
    assert array.ctypes.data % backend._ALIGNMENT == 0


@pytest.mark.parametrize(
    ("other", "data"),
    [
        ({"seed": 1}, "d"),
        ({"scale": 2.0}, "d"),
        ({"before": lambda: [layers.MaxPooling2D()]}, "d"),
        ({}, "other"),
    ],
    ids=["weights", "layer", "graph", "data"],
)
def test_other_activations_have_another_key(tmp_path, other, data):
    x = images(300)
    stored(tmp_path, cut(), x)
    _, asked = stored(tmp_path, cut(**other), x, data=data)
    assert asked >= 300
    assert entries(tmp_path) == ["float16", "float16"]


def test_float32_for_a_rest_that_needs_it(tmp_path):
    x = images(600)
    sensitive, asked = stored(tmp_path, cut(head_scale=1e4), x)
    assert (sensitive.dtype, asked) == (np.float32, 2 * 600 + 0 + 8)
    np.testing.assert_array_equal(sensitive, exact(cut(), x))
    # What is there serves every rest.
    assert stored(tmp_path, cut(), x)[1] == 8


def test_another_rest_on_stored_activations_is_asked_again(tmp_path):
    x = images(600)
    assert stored(tmp_path, cut(), x)[0].dtype == np.float16
    assert stored(tmp_path, cut(head_scale=1e4), x)[0].dtype == np.float32
    assert entries(tmp_path) == ["float16", "float32"]


def test_float32_once_a_trained_rest_needs_it(tmp_path):
    x, store = images(600), FeatureStore(tmp_path, LARGE)

    def opened(parts):
        return store.open(parts, x, data="d")

    parts = built()
    with opened(parts) as kept:
        assert store.holds(parts, x, kept, data="d")
        parts.rest.set_weights([1e4 * weights for weights in parts.rest.get_weights()])
        assert not store.holds(parts, x, kept, data="d")
    parts = built()
    with opened(parts) as kept:  # though this one, untrained, would not need it
        assert kept.dtype == np.float32
        np.testing.assert_array_equal(kept, exact(parts, x))
        assert store.holds(parts, x, kept, data="d")


@pytest.mark.parametrize("is_kept", [False, True])
def test_where_float32_has_no_room(tmp_path, is_kept):
    """Float16 stays for trials; a model that is to be kept is then trained on images."""
    x, parts = images(600), built()
    store = FeatureStore(tmp_path, 600 * 32 * (2 + 4) + 10_000)
    with store.open(parts, x, data="d") as kept:
        parts.rest.set_weights([1e4 * weights for weights in parts.rest.get_weights()])
        inputs = parts.prefix.inputs[0]
        whole = keras.Model(inputs, parts.rest(parts.prefix.outputs[0])) if is_kept else None
        assert not store.holds(parts, x, kept, data="d", whole=whole)
    if not is_kept:
        with store.open(built(), x, data="d") as kept:
            assert kept.dtype == np.float16
        return
    with pytest.raises(SearchError, match=r"in float32\..*Fix: --cache-size"):
        stored(tmp_path, built(), x, max_bytes=600 * 32 * (2 + 4) + 10_000)


def test_float32_takes_the_place_of_float16(tmp_path):
    x, parts = images(600), built()
    use(tmp_path, 1)
    other = entry(tmp_path)  # not used for longer
    store = FeatureStore(tmp_path, LARGE)
    with store.open(parts, x, data="d") as kept:
        parts.rest.set_weights([1e4 * weights for weights in parts.rest.get_weights()])
        store.holds(parts, x, kept, data="d")
    used = sum(file.stat().st_size for file in tmp_path.glob("*-float16/*"))
    stored(tmp_path, built(), x, max_bytes=used + 600 * 32 * 4 + 5_000)
    assert entries(tmp_path) == ["float16", "float32"]
    assert other.exists()


SAMPLE = np.linspace(0, NUM_IMAGES - 1, 2_000).astype(int)


@pytest.mark.parametrize("where", [0, np.setdiff1d(np.arange(1_024, NUM_IMAGES), SAMPLE)[0]])
def test_float32_where_a_number_is_too_large(tmp_path, where):
    """In the sample, and beside it in the third chunk."""
    x = images() // 128  # 0 and 1
    x[where] = 255
    parts = cut(scale=255 * 3e2, head_scale=1e-7)
    got, _ = stored(tmp_path, parts, x)
    assert got.dtype == np.float32
    assert got.max() > np.finfo(np.float16).max
    np.testing.assert_allclose(got, exact(parts, x), rtol=1e-5)
    assert entries(tmp_path) == ["float32"]


def test_bfloat16_weights_have_a_key():
    keras.config.set_dtype_policy("bfloat16")
    try:
        keys = {feature_files.key_of(built(seed), images(), "d") for seed in (0, 0, 1)}
    finally:
        keras.config.set_dtype_policy("float32")
    assert len(keys) == 2


def test_bfloat16_activations(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    parts = built()
    got, _ = stored(tmp_path, parts, images(600))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, exact(parts, images(600)).astype(np.float16))


# Damage


def flip(file, at):
    with file.open("r+b") as stream:
        stream.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: flip(path / "features.npy", -1_000),
        lambda path: flip(path / "features.npy", 20),  # the header
        lambda path: flip(path / "sample.npy", -1_000),
        lambda path: os.truncate(path / "features.npy", 5_000),
        lambda path: os.truncate(path / "features.npy", 0),  # as a crash of the machine leaves it
        lambda path: os.truncate(path / "sample.npy", 0),
        lambda path: (path / "meta.json").write_text("[]"),
        lambda path: (path / "meta.json").unlink(),
        lambda path: (path / "sample.npy").unlink(),
    ],
    ids=[
        "number",
        "header",
        "sample",
        "short",
        "empty",
        "empty sample",
        "meta",
        "no meta",
        "no sample",
    ],
)
def test_what_is_damaged_is_computed_again(tmp_path, damage, monkeypatch):
    x = images(600)
    first, _ = stored(tmp_path, cut(), x)
    damage(entry(tmp_path))
    monkeypatch.setattr(feature_files, "verified", set())
    again, asked = stored(tmp_path, cut(), x)
    np.testing.assert_array_equal(again, first)
    assert asked >= 600
    assert stored(tmp_path, cut(), x)[1] == 8


def test_code_of_the_users_that_has_changed(tmp_path):
    first, _ = stored(tmp_path, built(before=times), images(600))
    Times.factor = 2.0
    again, asked = stored(tmp_path, built(before=times), images(600))
    assert asked >= 600
    assert not np.allclose(first, again, atol=1e-3)


def test_hashes_are_checked_once_in_a_process(tmp_path, monkeypatch):
    x = images(600)
    stored(tmp_path, cut(), x)
    monkeypatch.setattr(feature_files, "verified", set())
    hashed = []
    check = feature_files._intact_chunks
    monkeypatch.setattr(
        feature_files, "_intact_chunks", lambda *given: hashed.append(1) or check(*given)
    )
    for _ in range(3):
        stored(tmp_path, cut(), x)
    assert len(hashed) == 1


# Kills, and several processes


def until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return
    raise AssertionError(f"ended without saying {word!r}")


@pytest.mark.slow
def test_two_processes(tmp_path, other_process):
    """They compute once; what one uses, the other does not evict; a killed one is replaced."""
    until(other_process, "512")
    told = []
    got, asked = stored(tmp_path, cut(), tell=lambda *done: told.append(done[0]))
    assert told  # by the process that waits, of the one that computes
    assert asked == 8
    np.testing.assert_allclose(got, exact(cut(), images()), atol=1e-3)

    until(other_process, "open")
    with pytest.raises(SearchError, match="are in use"):
        stored(tmp_path, cut(seed=2), max_bytes=int(NUM_BYTES * 1.5))
    other_process.stdin.write("\n")
    other_process.stdin.flush()

    until(other_process, "1024")  # of the next
    told = []

    def kill(done, of):
        told.append(done)
        if len(told) == 2:
            assert entries(tmp_path) == ["", "", "float16"]  # two .partial
            other_process.send_signal(signal.SIGKILL)

    got, asked = stored(tmp_path, cut(seed=1), tell=kill)
    assert told[0] >= 1_024
    assert told[-1] == NUM_IMAGES
    assert asked <= NUM_IMAGES - 1_024 + 2 * 8
    np.testing.assert_allclose(got, exact(cut(seed=1), images()), atol=1e-3)


def killed_after(folder, chunks, parts):
    """What a kill leaves after some chunks: here, an exception that cleans nothing up."""

    def tell(done, of):
        if done == chunks * 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), counted(parts):
        stored(folder, parts, tell=tell)
    return entry(folder, "*.partial")


@pytest.mark.parametrize(("damaged", "left"), [(None, 4), (2, 2), (0, 0)])
def test_only_sound_chunks_are_kept(tmp_path, damaged, left):
    partial = killed_after(tmp_path, 4, cut())
    if damaged is not None:
        flip(partial / "features.npy", 128 + damaged * 512 * 64 + 100)
    got, asked = stored(tmp_path, cut())
    assert asked == NUM_IMAGES - left * 512 + 2 * 8  # the sample is there
    np.testing.assert_array_equal(got, stored(tmp_path / "new", cut())[0])


@pytest.mark.parametrize(
    "damage",
    [lambda file: os.truncate(file, 200), lambda file: os.truncate(file, 0), os.unlink],
    ids=["short", "empty", "gone"],
)
def test_a_partial_computation_whose_sample_is_damaged(tmp_path, damage):
    partial = killed_after(tmp_path, 4, cut())
    damage(partial / "sample.npy")
    got, asked = stored(tmp_path, cut())
    assert asked >= NUM_IMAGES
    np.testing.assert_array_equal(got, stored(tmp_path / "new", cut())[0])


def test_a_partial_computation_of_other_code_is_not_continued(tmp_path):
    killed_after(tmp_path, 4, built(before=times))
    Times.factor = 2.0
    got, _ = stored(tmp_path, built(before=times))
    np.testing.assert_array_equal(got, stored(tmp_path / "new", built(before=times))[0])


def test_a_partial_computation_for_another_rest_begins_again(tmp_path):
    killed_after(tmp_path, 4, cut())
    got, _ = stored(tmp_path, cut(head_scale=1e4))
    np.testing.assert_array_equal(got, exact(cut(), images()))


# Limits


def use(folder, seed, max_bytes=LARGE):
    stored(folder, cut(seed=seed), max_bytes=max_bytes)


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    keys = {}
    for seed in (0, 1, 2):
        use(tmp_path, seed)
        (keys[seed],) = {p.name for p in tmp_path.glob("*-float16")} - set(keys.values())
        os.utime(tmp_path / keys[seed] / "meta.json", (seed, seed))
    use(tmp_path, 0)  # the first is now the last that was used
    use(tmp_path, 3, max_bytes=3 * NUM_BYTES + 10_000)
    left = {p.name for p in tmp_path.glob("*-float16")}
    assert keys[1] not in left
    assert {keys[0], keys[2]} < left
    assert len(left) == 3


def test_what_is_in_use_is_not_evicted(tmp_path):
    limit = NUM_BYTES + 50_000
    store = FeatureStore(tmp_path, limit)
    with store.open(cut(), images(), data="d") as array:
        before = np.array(array)
        with pytest.raises(SearchError, match=r"0\.42 MB in float16.*0\.42 MB are in use") as got:
            use(tmp_path, 1, limit)
        np.testing.assert_array_equal(array, before)
    assert "\n" not in str(got.value)
    use(tmp_path, 1, limit)
    assert len(list(tmp_path.glob("*-float16"))) == 1


def test_what_a_kill_left_makes_room(tmp_path):
    killed_after(tmp_path, 4, cut())
    use(tmp_path, 1, NUM_BYTES + 50_000)
    assert entries(tmp_path) == ["float16"]


def test_more_than_the_limit(tmp_path):
    with counted(cut()) as batches, pytest.raises(SearchError) as got:
        stored(tmp_path, cut(), max_bytes=100_000)
    assert str(got.value) == (
        "The activations of 2600 images, (32,) each, need 0.42 MB in float16. --cache-size allows "
        "0.10 MB, of which 0.00 MB are in use. Fix: --cache-size 1G"
    )
    assert not batches


def test_less_than_is_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(SearchError, match=r"has 0\.10 MB free\. Fix: free that much"):
        stored(tmp_path, cut())


def test_what_others_have_not_written_yet_is_not_free(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")(int(1.5 * NUM_BYTES))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)

    def another(done, of):
        if done == 0:
            stored(tmp_path, cut(seed=1))

    with pytest.raises(SearchError, match=r"has 0\.2\d MB free"):
        stored(tmp_path, cut(), tell=another)
    usage = namedtuple("usage", "free")(3 * NUM_BYTES)
    assert stored(tmp_path, cut(), tell=another)[0].dtype == np.float16


def test_a_full_disk(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SearchError, match="No space left on device"):
        stored(tmp_path, cut())
    monkeypatch.undo()
    assert stored(tmp_path, cut())[0].dtype == np.float16


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(stream, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(SearchError, match=r"No locks available.*local disk"):
        stored(tmp_path, cut())


def test_activations_that_differ_each_time(tmp_path):
    parts = built()
    predict = parts.prefix.predict_on_batch
    rng = np.random.default_rng(0)
    parts.prefix.predict_on_batch = lambda x: predict(x) * rng.random()
    with pytest.raises(SearchError, match="differ each time"):
        stored(tmp_path, parts, images(300))
