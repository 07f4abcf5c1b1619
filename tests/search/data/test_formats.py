import io
import re
import tarfile

import numpy as np
import pytest

from search.data import formats
from search.errors import SearchError

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (8, 4, 5), dtype=np.uint8)
X[0, 0, :2] = 0, 255
Y = np.array([0, 1, 2, 0, 1, 2, 1, 0])
GOOD = {"x_train": X, "y_train": Y, "x_test": X[:3] // 2, "y_test": Y[:3]}
LEFT_OUT = "left out"


@pytest.fixture
def save(tmp_path):
    """Writes GOOD with changes to a .npz file, and gives its path."""

    def write(**changed):
        path = tmp_path / "shapes.npz"
        arrays = {key: value for key, value in (GOOD | changed).items() if value is not LEFT_OUT}
        np.savez(path, **arrays)
        return path

    return write


def at(array, index, value, dtype=None):
    """A copy with another value there."""
    array = np.array(array, dtype)
    array[index] = value
    return array


def refusal(path, *parts):
    with pytest.raises(SearchError) as caught:
        [formats.read_npz(path, part) for part in parts or ("train", "test")]
    message = str(caught.value)
    assert message.startswith(f"{path} is no usable data file: ")
    assert "\n" not in message
    assert re.search(r"\. Received: .+\. Fix: .+", message)
    return message


def test_arrays_are_those_that_were_saved(save):
    path = save()
    assert formats.describe_npz(path) == ((4, 5, 1), ("0", "1", "2"))
    for part in ("train", "test"):
        x, y = formats.read_npz(path, part)
        assert (x.dtype, y.dtype) == (np.uint8, np.uint8)
        np.testing.assert_array_equal(x, GOOD[f"x_{part}"][..., np.newaxis])
        np.testing.assert_array_equal(y, GOOD[f"y_{part}"])


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x[..., np.newaxis],
        lambda x: x.astype(np.int64),
        lambda x: x.astype(">u2"),
        lambda x: np.asfortranarray(x),
        lambda x: x.astype(np.float16),
        lambda x: x + np.float32(0.3),
        lambda x: x / 255,
        lambda x: (x / 255).astype(np.float32),
        lambda x: (x / 255).astype(np.float16),
    ],
)
def test_pixels_of_every_type_become_bytes(save, convert):
    x = X.clip(0, 254)  # 254.3 is still a pixel
    path = save(x_train=convert(x), x_test=convert(x[:3]))
    for part, wanted in (("train", x), ("test", x[:3])):
        pixels, _ = formats.read_npz(path, part)
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, wanted[..., np.newaxis])


def test_whole_numbers_of_0_and_1_are_refused(save):
    said = refusal(save(x_train=GOOD["x_train"] % 2), "train")
    assert "x_train of whole numbers is 0-255" in said
    assert "multiply them by 255" in said


def test_bool_is_black_and_white(save):
    pixels, _ = formats.read_npz(save(x_train=X > 99, x_test=X[:3] > 99), "test")
    np.testing.assert_array_equal(pixels[..., 0], (X[:3] > 99) * 255)


def test_colour_stays_colour(save):
    colour = RNG.integers(0, 256, (8, 4, 5, 3), dtype=np.uint8)
    path = save(x_train=colour, x_test=colour[:3])
    assert formats.describe_npz(path)[0] == (4, 5, 3)
    np.testing.assert_array_equal(formats.read_npz(path, "train")[0], colour)


@pytest.mark.parametrize(
    ("train", "test", "is_white"),
    [
        (X / 255, np.ones((3, 4, 5)), 255),
        (X / 255, np.ones((3, 4, 5), int), 255),
        (X / 255, np.ones((3, 4, 5), bool), 255),
        (X > 9, np.ones((3, 4, 5)), 255),
        (X, np.ones((3, 4, 5), int), 1),
    ],
)
def test_the_scale_of_the_test_part_is_that_of_training(save, train, test, is_white):
    pixels, _ = formats.read_npz(save(x_train=train, x_test=test), "test")
    assert np.unique(pixels).tolist() == [is_white]


@pytest.mark.parametrize(
    ("train", "test", "said"),
    [
        (X / 255, X[:3], "x_test is 0-1, as x_train. Received: x_test[0, 0, 1] is 255. Fix: scale"),
        (X > 9, at(np.ones((3, 4, 5)), (2, 1, 3), 1.5), "Received: x_test[2, 1, 3] is 1.5."),
        (X, X[:3] / 255, "x_test is 0-255, as x_train. Received: x_test within 0-1. Fix: scale"),
        (X * 1.0, X[:3] > 9, "x_test is 0-255, as x_train. Received: x_test within 0-1."),
    ],
)
def test_two_scales_are_refused(save, train, test, said):
    path = save(x_train=train, x_test=test)
    formats.read_npz(path, "train")
    assert said in refusal(path, "test")


@pytest.mark.parametrize("dtype", [np.int8, np.uint64, np.float32, bool])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_labels_of_every_type(save, dtype, shape):
    labels = (Y > 0).astype(dtype)
    path = save(y_train=labels.reshape(shape), y_test=labels[:3].reshape(shape))
    _, y = formats.read_npz(path, "train")
    assert y.dtype == np.uint8
    np.testing.assert_array_equal(y, Y > 0)


@pytest.mark.parametrize(
    "names",
    [["circle", "square", "star"], np.array(["circle", "square", "star"], "S")],
)
def test_class_names(save, names):
    assert formats.describe_npz(save(class_names=names))[1] == ("circle", "square", "star")


@pytest.mark.parametrize(("num_classes", "dtype"), [(2, "u1"), (256, "u1"), (300, "u2")])
def test_any_number_of_classes(save, num_classes, dtype):
    x, y = np.zeros((num_classes * 2, 1, 1), np.uint8), np.arange(num_classes * 2) % num_classes
    path = save(x_train=x, y_train=y, x_test=x, y_test=y)
    assert len(formats.describe_npz(path)[1]) == num_classes
    read = formats.read_npz(path, "train")[1]
    assert read.dtype == dtype
    np.testing.assert_array_equal(read, y)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        # keys and types
        ({"x_test": LEFT_OUT, "foo": 1}, "x_train, y_train, y_test, foo; missing: x_test."),
        ({"x_train": np.array([X[0], X[1, :2]], object)}, "x_train is an array of numbers."),
        ({"x_train": X.astype(complex)}, "type complex128. Fix: np.stack"),
        ({"y_train": Y.astype(str)}, "Received: type <U21. Fix: np.unique(names"),
        ({"y_test": np.array([None] * 3)}, "y_test is an array of numbers. Received: type object."),
        # shapes
        ({"x_train": X[0]}, "is (n, h, w), (n, h, w, 1) or (n, h, w, 3). Received: (4, 5)."),
        ({"x_train": X.reshape(8, 20)}, "Received: (8, 20)."),
        ({"x_train": np.zeros((8, 3, 9, 9))}, "(8, 3, 9, 9). Fix: np.moveaxis(x_train, 1, -1)"),
        ({"x_train": np.zeros((8, 9, 9, 4))}, "Received: (8, 9, 9, 4)."),
        ({"x_train": X[:0], "y_train": Y[:0]}, "(n,) class numbers. Received: shape (0,)"),
        ({"x_train": X[:, :0]}, "x_train holds images. Received: shape (8, 0, 5)."),
        ({"x_test": X[:0], "y_test": Y[:0]}, "x_test holds images. Received: shape (0, 4, 5)."),
        ({"y_train": np.eye(3)[Y]}, "shape (8, 3). Fix: np.argmax(y_train, axis=1)"),
        ({"y_test": np.eye(3)[Y[:3]]}, "shape (3, 3). Fix: np.argmax(y_test, axis=1)"),
        ({"y_train": np.array(1)}, "y_train is (n,) class numbers. Received: shape ()."),
        ({"y_train": Y[:7]}, "a label for each of the 8 images of x_train. Received: 7."),
        ({"x_test": X}, "a label for each of the 8 images of x_test. Received: 3."),
        ({"x_test": X[:3, :, :4]}, "of x_test are (4, 5, 1) as those of x_train. Received: (4"),
        ({"x_test": np.zeros((3, 4, 5, 3))}, "Received: (4, 5, 3)."),
        # pixels
        ({"x_train": at(X, (7, 3, 4), np.nan, float)}, "Received: x_train[7, 3, 4] is nan."),
        ({"x_test": at(X[:3], (2, 0, 0), np.inf, float)}, "Received: x_test[2, 0, 0] is inf."),
        ({"x_train": at(X, (1, 2, 3), -1, int)}, "Received: x_train[1, 2, 3] is -1."),
        ({"x_train": at(X, (1, 2, 3), -0.25, float)}, "Received: x_train[1, 2, 3] is -0.25."),
        ({"x_test": at(X[:3], (1, 2, 3), 256, int)}, "pixels of x_test are 0-255, or floats 0-1."),
        ({"x_train": at(X, (1, 2, 3), 255.5, float)}, "Received: x_train[1, 2, 3] is 255.5."),
        # labels
        ({"y_train": at(Y, 4, -1)}, "whole numbers from 0. Received: y_train[4] is -1."),
        ({"y_train": at(Y, 4, 1.5, float)}, "y_train[4] is 1.5."),
        ({"y_train": at(Y, 4, np.nan, float)}, "y_train[4] is nan."),
        ({"y_test": at(Y[:3], 1, np.inf, float)}, "y_test[1] is inf."),
        ({"y_test": at(Y[:3], 1, 3)}, "classes are 0-2, by y_train. Received: y_test[1] is 3."),
        ({"class_names": ["a", "b"]}, "0-1, by class_names. Received: y_train[2] is 2."),
        ({"y_train": Y * 0}, "at least 2 classes. Received: 1."),
        ({"y_train": Y + 1}, "y_train has at least 2 of every class. Received: 0 of class 0."),
        ({"y_train": at(Y, 4, 10**12)}, "Received: 0 of class 3."),
        ({"y_train": at(Y, 4, 1e300, float)}, "Received: y_train[4] is 1e+300."),
        ({"y_train": at(Y, slice(None), [0, 1, 2, 0, 1, 0, 1, 0])}, "Received: 1 of class 2."),
        ({"y_test": at(Y[:3], 1, 0)}, "at least 1 of every class. Received: 0 of class 1."),
        # names
        ({"class_names": ["a", "b", "c", "d"]}, "Received: 0 of class 3 ('d')."),
        ({"class_names": ["a", "b", "a"]}, "none is empty. Received: class_names[2] is 'a'."),
        ({"class_names": ["a", "", "b"]}, "Received: class_names[1] is ''."),
        ({"class_names": "abc"}, "class_names is a row. Received: shape ()."),
        ({"class_names": np.array(["a", "b", None])}, "array of names. Received: type object."),
        ({"class_names": np.ones(3)}, "class_names is an array of names. Received: type float64."),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)  # fmt: skip
def test_unsound_arrays_are_refused(save, changed, said):
    assert said in refusal(save(**changed))


def test_the_first_of_many_wrong_elements_is_named(save):
    x = np.zeros((5_000, 2, 2))
    x[3_000, 1, 0] = x[3_000, 1, 1] = x[4_000, 0, 0] = np.nan
    path = save(x_train=x, y_train=np.arange(5_000) % 3, x_test=x[:3, :, :])
    assert "x_train[3000, 1, 0] is nan" in refusal(path, "train")


def test_test_pixels_are_not_needed_to_train(save):
    path = save()
    content = path.read_bytes()
    place = content.index(GOOD["x_test"].tobytes())
    path.write_bytes(content[:place] + b"damaged" + content[place + 7 :])
    assert formats.describe_npz(path)[0] == (4, 5, 1)
    formats.read_npz(path, "train")
    assert "x_test is complete. Received: Bad CRC-32" in refusal(path, "test")


@pytest.mark.fault("X3")
def test_nothing_is_unpickled(tmp_path, save):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("sprung").touch, ())

    refusal(save(x_train=np.array([Trap()] * 8)))
    refusal(save(class_names=np.array([Trap()] * 3)))
    assert not (tmp_path / "sprung").exists()


def truncated(content):
    return content[: len(content) // 2]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda _: b"", "complete .npz file. Received: File is not a zip file. Fix: np.savez"),
        (lambda _: b"x,y\n1,2\n", "File is not a zip file"),
        (truncated, "File is not a zip file"),
        (lambda content: content.replace(b"x_train", b"x_trane"), "; missing: x_train."),
        (lambda content: content.replace(b"NUMPY", b"NUMPI", 1), "x_train is complete. Received: "),
        (lambda content: content.replace(X.tobytes(), bytes(X.size)), "Received: Bad CRC-32"),
        (lambda content: content.replace(b"(8, 4, 5)", b"(9, 4, 5)"), "complete. Received: "),
    ],
)  # fmt: skip
def test_other_content_is_refused(save, spoil, said):
    path = save()
    path.write_bytes(spoil(path.read_bytes()))
    assert said in refusal(path)


def test_a_missing_file_is_named(tmp_path):
    assert "it can be read. Received: No such file" in refusal(tmp_path / "none.npz")


SIZE = 1 + 3 * 32 * 32


def cifar10(path, **changed):
    """The published layout with 2 images a file; a file that is None is left out."""
    batches = {f"data_batch_{i}": records(i, i + 1) for i in (5, 4, 3, 2, 1)}
    batches = batches | {"test_batch": records(9, 8)} | changed
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"", **batches}.items():
            if content is not None:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def records(*labels):
    """Images whose pixel at (row, column, channel) is label + channel * 50 + row - column."""
    channel, row, column = np.ogrid[:3, :32, :32]
    image = channel * 50 + row - column + 40
    return b"".join(bytes([n]) + (image + n).astype(np.uint8).tobytes() for n in labels)


def test_cifar10_is_read_from_its_archive(tmp_path):
    path = cifar10(tmp_path / "cifar.tar.gz")
    x, y = formats.read_cifar10(path, "train")
    assert y.tolist() == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    assert (x.shape, x.dtype, y.dtype) == ((10, 32, 32, 3), np.uint8, np.uint8)
    row, column, channel = np.ogrid[:32, :32, :3]
    for image, label in zip(x, y, strict=True):
        np.testing.assert_array_equal(image, channel * 50 + row - column + 40 + label)
    x, y = formats.read_cifar10(path, "test")
    assert y.tolist() == [9, 8]
    assert x[0, 31, 0].tolist() == [80, 130, 180]
    assert [entry.name for entry in tmp_path.iterdir()] == ["cifar.tar.gz"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"data_batch_4": None},
            "it holds cifar-10-batches-bin/data_batch_4.bin. Received: ['cifar",
        ),
        ({"data_batch_2": records(1)[:-1]}, f"data_batch_2.bin holds records of {SIZE} bytes"),
        ({"data_batch_2": b""}, "Received: 0 bytes"),
        ({"data_batch_3": records(1, 10)}, "labels are 0-9. Received: 10"),
    ],
)
def test_another_archive_is_refused(tmp_path, changed, said):
    path = cifar10(tmp_path / "cifar.tar.gz", **changed)
    formats.read_cifar10(path, "test")
    with pytest.raises(SearchError, match=f"^{path} is no usable data file: ") as caught:
        formats.read_cifar10(path, "train")
    assert said in str(caught.value)


@pytest.mark.parametrize("spoil", [lambda _: b"", truncated, lambda _: b"no archive at all"])
def test_a_damaged_archive_is_refused(tmp_path, spoil):
    path = cifar10(tmp_path / "cifar.tar.gz")
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(SearchError, match=r"it is a complete \.tar\.gz file\. Received: "):
        formats.read_cifar10(path, "test")
