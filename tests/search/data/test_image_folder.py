import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from search.data import datasets, fetching, formats, image_folder
from search.errors import SearchError
from tests.command import ROOT

ORIENTATION = 0x0112

# Prepares a folder in a process of its own; given the end of an image's path it stops there, in
# the middle of it. Images are read by several threads: one path, or two of them would say so.
PREPARE = """
import sys, time
from pathlib import Path
from search.data import image_folder

if sys.argv[2:]:
    decode = image_folder._decode

    def decode_slowly(path, shape):
        if path.as_posix().endswith(sys.argv[2]):
            print("half", flush=True)
            time.sleep(60)
        return decode(path, shape)

    image_folder._decode = decode_slowly
print(image_folder.prepare(Path(sys.argv[1])))
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The folder of prepared copies, in a KERAS_HOME of its own."""
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    return tmp_path / "keras" / "datasets" / "fmnist-search"


def grey(level, size=(4, 3)):
    """An image of one level; the size is (height, width)."""
    return np.full(size, level, np.uint8)


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    image.save(path)
    return path


@pytest.fixture
def flowers(tmp_path):
    """3 training and 2 test images of each of 2 classes; their levels are 0, 1, ... in order."""
    level = iter(range(99))
    for part, count in (("train", 3), ("test", 2)):
        for name in ("rose", "tulip"):
            for i in range(count):
                put(tmp_path / "flowers" / part / name / f"{i}.png", grey(next(level)))
    return tmp_path / "flowers"


def levels(folder, part):
    load = datasets.load_train if part == "train" else datasets.load_test
    x, y = load(str(folder))
    return x[:, 0, 0, 0].tolist(), y.tolist()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def refusal(folder, function=image_folder.prepare):
    with pytest.raises(SearchError) as caught:
        function(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def start(folder, *stop_at):
    return subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(folder), *stop_at],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_train_and_test_are_read_in_the_order_of_names(flowers, home):
    dataset = datasets.find(str(flowers))
    assert (dataset.name, dataset.input_shape) == ("flowers", (4, 3, 1))
    assert dataset.class_names == ("rose", "tulip")
    assert not home.exists()
    assert re.fullmatch("[0-9a-f]{64}", datasets.ensure(str(flowers)))
    assert datasets.find(str(flowers)).input_shape == (4, 3, 1)
    assert levels(flowers, "train") == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert levels(flowers, "test") == ([6, 7, 8, 9], [0, 0, 1, 1])
    x, y = datasets.load_train(str(flowers))
    assert (type(x), x.shape, x.dtype, y.dtype) == (np.ndarray, (6, 4, 3, 1), np.uint8, np.uint8)
    x[:] = 0  # shared with TensorFlow as memory that may be written; it stays in this process
    assert levels(flowers, "train")[0] == [0, 1, 2, 3, 4, 5]
    [copy] = home.iterdir()
    assert re.fullmatch("flowers-[0-9a-f]{12}", copy.name)
    assert names(copy) == ["meta.json", "x_test.npy", "x_train.npy", "y_test.npy", "y_train.npy"]


@pytest.mark.parametrize("top", ["", "train"])
def test_without_test_every_seventh_is_the_test_part(tmp_path, top):
    for name, count in (("b", 7), ("a", 15)):
        for i in range(count):
            put(tmp_path / "data" / top / name / f"{i:02}.png", grey(i))
    image_folder.prepare(tmp_path / "data")
    x, y = levels(tmp_path / "data", "train")
    assert x == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 14, 0, 1, 2, 3, 4, 5]
    assert y == [0] * 13 + [1] * 6
    assert levels(tmp_path / "data", "test") == ([6, 13, 6], [0, 0, 1])


def test_a_class_may_be_called_train(tmp_path):
    for name in ("plane", "train"):
        for i in range(7):
            put(tmp_path / "data" / name / f"{i}.png", grey(i))
    assert image_folder.describe(tmp_path / "data")[1] == ("plane", "train")


def test_what_is_no_image_is_not_read(flowers):
    before = image_folder.prepare(flowers)
    put(flowers / "train" / "rose" / ".hidden.png", grey(99))
    put(flowers / "train" / ".cache" / "x.png", grey(99))
    put(flowers / "val" / "rose" / "x.png", grey(99))
    (flowers / "train" / "rose" / "notes.txt").write_text("mine")
    (flowers / "train" / "rose" / "deeper").mkdir()
    assert image_folder.load(flowers, "train")[0].shape == (6, 4, 3, 1)
    assert image_folder.prepare(flowers) == before


def test_what_may_be_thought_to_be_read_is_said(flowers, caplog):
    image_folder.prepare(flowers)
    assert "not read" not in caplog.text
    put(flowers / "val" / "rose" / "a.png", grey(1))
    for name in ("b.webp", "c.webp", ".hidden", "notes.txt"):
        (next((flowers / "train").iterdir()) / name).touch()
    image_folder.prepare(flowers)
    first, second = caplog.messages[-2:]
    assert first == f"{flowers / 'val'} is not read: a folder's parts are train/ and test/"
    assert second.startswith(f"in {flowers} 2 .webp, 1 .txt beside images are not read")


def test_three_hundred_classes(tmp_path):
    image = put(tmp_path / "one.png", grey(7, (1, 1)))
    for label in range(300):
        folder = tmp_path / "many" / f"{label:03}"
        folder.mkdir(parents=True)
        for i in range(7):
            os.link(image, folder / f"{i}.PNG")
    image_folder.prepare(tmp_path / "many")
    y = image_folder.load(tmp_path / "many", "test")[1]
    assert y.dtype == np.uint16
    np.testing.assert_array_equal(y, np.arange(300))


def rgb(*colour):
    return np.full((4, 3, 3), colour, np.uint8)


def palette(*colour):
    return Image.fromarray(rgb(*colour)).convert("P", palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize(
    ("image", "pixel"),
    [
        (grey(9), [9]),
        (np.array([[True, False, False]] * 4), [255]),
        (np.full((4, 3), 65_535, np.uint16), [255]),
        (np.full((4, 3), 257 * 200 + 128, np.uint16), [200]),
        (np.full((4, 3), 257 * 200 + 129, np.uint16), [201]),
        (Image.new("LA", (3, 4), (200, 255)), [200]),
        (Image.new("LA", (3, 4), (200, 0)), [0]),
        (rgb(1, 2, 3), [1, 2, 3]),
        (rgb(5, 5, 5), [5, 5, 5]),
        (palette(10, 20, 30), [10, 20, 30]),
        (Image.new("RGBA", (3, 4), (200, 100, 50, 255)), [200, 100, 50]),
        (Image.new("RGBA", (3, 4), (200, 100, 50, 0)), [0, 0, 0]),
        (Image.new("RGBA", (3, 4), (200, 100, 50, 128)), [100, 50, 25]),
    ],
)
def test_images_of_every_mode(flowers, image, pixel):
    put(flowers / "train" / "rose" / "0.png", image)
    image_folder.prepare(flowers)
    x, _ = image_folder.load(flowers, "train")
    assert x[0, 0, 0].tolist() == pixel
    assert x[1, 0, 0].tolist() == [1] * len(pixel)  # grey among colours
    assert datasets.find(str(flowers)).input_shape == (4, 3, len(pixel))


def test_one_colour_image_in_the_test_part_makes_all_colour(flowers):
    put(flowers / "test" / "rose" / "0.png", rgb(1, 2, 3))
    image_folder.prepare(flowers)
    assert image_folder.load(flowers, "train")[0].shape == (6, 4, 3, 3)
    assert image_folder.load(flowers, "test")[0][0, 0, 0].tolist() == [1, 2, 3]


def test_jpeg(flowers):
    image = Image.new("CMYK", (3, 4))
    image.save(flowers / "train" / "rose" / "3.jpeg")
    Image.fromarray(grey(80)).save(flowers / "train" / "rose" / "4.JPG", quality=100)
    image_folder.prepare(flowers)
    x, _ = image_folder.load(flowers, "train")
    assert x[3:5, 0, 0].tolist() == [[255, 255, 255], [80, 80, 80]]


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (0, 2)), (3, (3, 2)), (4, (3, 0)), (5, (0, 0)),
                              (6, (0, 2)), (7, (3, 2)), (8, (3, 0))]
)  # fmt: skip
def test_exif_says_which_side_is_up(flowers, suffix, orientation, corner):
    shape = (3, 4) if orientation > 4 else (4, 3)
    image = np.zeros((shape[0] * 8, shape[1] * 8), np.uint8)  # blocks as those of JPEG
    image[:8, :8] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    for path in (flowers / "train" / "rose").iterdir():
        path.unlink()
    for i in range(2):
        path = flowers / "train" / "rose" / f"{i}.{suffix}"
        Image.fromarray(image).save(path, exif=exif, quality=100)
    assert image_folder._look(path) == (32, 24, False)
    x = image_folder.read_image(path, (32, 24, 1))
    assert [int(at) for at in np.argwhere(x[::8, ::8, 0] > 127)[0]] == list(corner)


def test_exif_that_is_none_says_nothing(tmp_path):
    """Cameras and editors write such; other programs show the image."""
    path = tmp_path / "x.jpg"
    Image.new("L", (24, 32), 200).save(path, exif=b"Exif\0\0no TIFF header", dpi=(72, 72))
    assert image_folder._look(path) == (32, 24, False)
    assert image_folder.read_image(path, (32, 24, 1)).min() > 190


@pytest.mark.parametrize(("invert", "corner", "thing"), [(False, 0, 20), (True, 0, 235)])
def test_what_lies_behind_transparency_is_dark_to_the_model(tmp_path, invert, corner, thing):
    """Also behind a dark thing, which `--invert` makes bright."""
    image = np.zeros((8, 8, 4), np.uint8)
    image[2:6, 2:6] = 20, 20, 20, 255
    Image.fromarray(image).save(tmp_path / "x.png")
    read = image_folder.read_image(tmp_path / "x.png", (8, 8, 1), invert)
    assert (read[0, 0, 0], read[4, 4, 0]) == (corner, thing)


@pytest.mark.parametrize("mode", [0o700, 0o755])
def test_who_may_not_read_the_images_may_not_read_their_copy(flowers, mode):
    flowers.chmod(mode)
    image_folder.prepare(flowers)
    assert image_folder._copy_of(flowers).stat().st_mode & 0o777 == mode


def test_a_folder_whose_name_no_page_could_show_is_refused(tmp_path):
    folder = tmp_path / os.fsdecode(b"f\xe4rben")
    folder.mkdir()
    with pytest.raises(SearchError, match=r"its path is UTF-8"):
        image_folder.describe(folder)


def test_other_sizes_become_the_median_of_training(flowers, caplog):
    caplog.set_level(logging.INFO, logger="search")
    put(flowers / "train" / "rose" / "1.png", grey(1, (8, 30)))
    put(flowers / "train" / "tulip" / "0.png", grey(3, (2, 2)))
    put(flowers / "test" / "tulip" / "0.png", grey(8, (600, 700)))
    image_folder.prepare(flowers)
    assert image_folder.load(flowers, "train")[0].shape == (6, 4, 3, 1)
    assert levels(flowers, "test") == ([6, 7, 8, 9], [0, 0, 1, 1])
    said = "images of flowers are 2-600 pixels high and 2-700 wide; all are resized to 4x3"
    image_folder.prepare(flowers)
    assert caplog.messages == ["decoding the 10 images of flowers", said, said]


def test_large_images_of_several_sizes_become_128(flowers):
    for part in ("train", "test"):
        for path in (flowers / part).rglob("*.png"):
            put(path, grey(50, (500, 300)))
    put(path, grey(50, (500, 301)))
    image_folder.prepare(flowers)
    assert image_folder.load(flowers, "test")[0].shape == (4, 128, 128, 1)
    put(path, grey(50, (500, 300)))
    image_folder.prepare(flowers)
    assert image_folder.load(flowers, "test")[0].shape == (4, 500, 300, 1)


def test_resizing_takes_every_pixel_into_account(tmp_path):
    stripes = np.tile(np.array([0, 200], np.uint8), (40, 20))
    path = put(tmp_path / "stripes.png", stripes)
    small = image_folder.read_image(path, (4, 4, 1))
    np.testing.assert_allclose(small, 100, atol=6)


@pytest.mark.parametrize(
    ("shape", "invert", "pixel"),
    [((4, 3, 3), False, [10, 200, 30]), ((2, 2, 3), True, [245, 55, 225]),
     ((9, 9, 1), False, [124])],
)  # fmt: skip
def test_an_image_is_read_as_a_model_takes_it(tmp_path, shape, invert, pixel):
    path = put(tmp_path / "x.png", rgb(10, 200, 30))
    image = image_folder.read_image(path, list(shape), invert)
    assert (image.shape, image.dtype) == (shape, np.uint8)
    assert image[1, 1].tolist() == pixel


def truncate(path):
    path.write_bytes(path.read_bytes()[:45])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncate, "Received: image file is truncated"),
        (lambda path: path.write_bytes(b""), "Received: other content. Fix: replace it or take it"),
        (lambda path: path.write_text("<svg/>"), "Received: other content"),
        (lambda path: Image.new("L", (3, 4)).save(path, "GIF"), "Received: other content"),
        (lambda path: path.unlink() or path.mkdir(), "Is a directory"),
        (lambda path: path.unlink() or path.symlink_to("none"), "No such file"),
    ],
)
def test_a_damaged_image_is_named(flowers, home, spoil, said):
    path = flowers / "test" / "tulip" / "0.png"
    spoil(path)
    message = refusal(flowers)
    assert message.startswith(f"{path} is no usable ")
    assert said in message
    assert not home.exists() or not names(home)
    with pytest.raises(SearchError, match=f"^{path} is no usable"):
        image_folder.read_image(path, (4, 3, 1))


def test_an_image_like_a_bomb_is_refused(flowers, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    assert "exceeds limit of 10 pixels" in refusal(flowers)


def remove(*places):
    def change(folder):
        for place in places:
            shutil.rmtree(folder / place)

    return change


def rename(old, new):
    return lambda folder: (folder / old).rename(folder / new)


@pytest.mark.parametrize(
    ("change", "named", "said"),
    [
        (remove("train", "test"), "", "2 or more folders, one for each class. Received: none. Fix: "
         "lay images out as DIR/train/CLASS/*.png (.jpg, .jpeg) and maybe DIR/test/CLASS/*, or"),
        (remove("train"), "", "Received: test. Fix: "),
        (remove("train/rose"), "train", "Received: tulip. Fix: "),
        (remove("train/rose", "train/tulip"), "train", "Received: none. Fix: "),
        (remove("test/tulip"), "test", "Received: rose. Fix: "),
        (rename("test/tulip", "test/tulp"), "", "Received: 'tulip' only in train. Fix: give both"),
        (lambda folder: put(folder / "test" / "lily" / "0.png", grey(0)), "",
         "train/ and test/ have the same class folders. Received: 'lily' only in test."),
        (lambda folder: [path.unlink() for path in (folder / "train/rose").iterdir()], "train/rose",
         "it holds images (.png, .jpg, .jpeg). Received: 0 other files. Fix: put images there"),
        (lambda folder: [(folder / f"train/rose/{i}.png").unlink() for i in (0, 1)], "train/rose",
         "a class has 2 images or more to train on. Received: 1. Fix: add images"),
        (remove("test"), "",
         "without test/ a class has 7 images, of which one is to test. Received: 3 of 'rose'."),
    ],
)  # fmt: skip
def test_another_layout_is_refused(flowers, change, named, said):
    change(flowers)
    for function in (image_folder.prepare, image_folder.describe):
        message = refusal(flowers, function)
        assert message.startswith(f"{flowers / named} is no usable ")
        assert said in message


def test_a_copy_is_made_once(flowers, monkeypatch):
    first = image_folder.prepare(flowers)
    monkeypatch.setattr(image_folder, "_decode", None)
    monkeypatch.setattr(image_folder, "_look", None)
    assert image_folder.prepare(flowers) == first
    assert image_folder.describe(flowers) == ((4, 3, 1), ("rose", "tulip"))


def test_an_intact_copy_needs_no_permission_to_write(flowers, monkeypatch):
    first = image_folder.prepare(flowers)
    monkeypatch.setattr(fetching, "alone_in", None)
    assert image_folder.prepare(flowers) == first


def test_training_opens_no_test_pixels(flowers, home):
    image_folder.prepare(flowers)
    [copy] = home.iterdir()
    (copy / "x_test.npy").unlink()
    assert len(image_folder.load(flowers, "train")[0]) == 6
    with pytest.raises(SearchError, match=f"{copy} is damaged: .*x_test.*Fix: delete it"):
        image_folder.load(flowers, "test")


@pytest.mark.parametrize(
    "change",
    [
        lambda path: put(path, grey(77)),
        lambda path: put(path.with_name("9.png"), grey(77)),
        lambda path: path.unlink(),
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: path.rename(path.with_name("4.png")),
    ],
)
def test_a_changed_folder_is_refused_by_workers_and_prepared_again(flowers, home, change):
    image_folder.prepare(flowers)
    before = image_folder.load(flowers, "train")[0]
    change(flowers / "train" / "rose" / "1.png")
    for part in ("train", "test"):
        with pytest.raises(SearchError, match=f"{flowers} are not those that this run prepared"):
            image_folder.load(flowers, part)
    image_folder.describe(flowers)  # looks, and leaves the copy to `prepare`
    with pytest.raises(SearchError, match="are not those that this run prepared"):
        image_folder.load(flowers, "train")
    image_folder.prepare(flowers)
    image_folder.load(flowers, "train")
    assert len(names(home)) == 1
    assert before[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4, 5]  # mapped by a worker of another run


def test_a_folder_that_was_never_prepared_is_refused(flowers):
    with pytest.raises(SearchError, match=r"not those that this run prepared.*begin it again"):
        image_folder.load(flowers, "train")


def cut(path):
    os.truncate(path, path.stat().st_size - 1)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink, lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["x_train.npy", "y_test.npy", "meta.json"])
def test_a_damaged_copy_is_made_again(flowers, home, spoil, name):
    first = image_folder.prepare(flowers)
    [copy] = home.iterdir()
    spoil(copy / name)
    assert image_folder.prepare(flowers) == first
    assert levels(flowers, "train") == ([0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 1, 1])
    assert home.is_dir()
    assert names(home) == [copy.name]


def test_packed_images_are_read_as_those_of_the_folder(flowers, tmp_path):
    image_folder.prepare(flowers)
    packed = tmp_path / "flowers.npz"
    packed.write_bytes(image_folder.packed(flowers))
    assert formats.describe_npz(packed) == image_folder.describe(flowers)
    for part in ("train", "test"):
        for there, here in zip(
            formats.read_npz(packed, part), image_folder.load(flowers, part), strict=True
        ):
            np.testing.assert_array_equal(there, here, strict=True)


def test_the_hash_is_of_content(flowers, tmp_path):
    first = image_folder.prepare(flowers)
    shutil.copytree(flowers, tmp_path / "elsewhere" / "other")
    assert image_folder.prepare(tmp_path / "elsewhere" / "other") == first
    shutil.copytree(flowers, tmp_path / "elsewhere" / "flowers")
    assert image_folder.prepare(tmp_path / "elsewhere" / "flowers") == first
    hashes = {first}
    for change in (
        lambda: put(flowers / "train" / "rose" / "0.png", grey(50)),
        lambda: put(flowers / "test" / "rose" / "0.png", grey(51)),
        lambda: rename("train/rose/2.png", "train/tulip/3.png")(flowers),
        lambda: [rename(f"{part}/rose", f"{part}/lily")(flowers) for part in ("train", "test")],
    ):
        change()
        hashes.add(image_folder.prepare(flowers))
    assert len(hashes) == 5


def test_a_killed_preparation_is_done_again(flowers, home):
    with start(flowers, "train/rose/1.png") as run:
        assert run.stdout.readline() == "half\n"
        run.send_signal(signal.SIGKILL)
    assert [name[:7] for name in names(home)] == [".fetch-"]
    with pytest.raises(SearchError, match="not those that this run prepared"):
        image_folder.load(flowers, "train")
    image_folder.prepare(flowers)
    assert [name[:8] for name in names(home)] == ["flowers-"]
    assert levels(flowers, "test") == ([6, 7, 8, 9], [0, 0, 1, 1])


def test_two_processes_prepare_at_once(flowers, home):
    runs = [start(flowers) for _ in range(3)]
    assert len({run.communicate(timeout=120)[0].strip() for run in runs}) == 1
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert [name[:8] for name in names(home)] == ["flowers-"]


def test_a_full_disk_is_one_line(flowers, home):
    for path in flowers.rglob("*.png"):
        put(path, grey(3, (100, 100)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        message = refusal(flowers)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert f"{flowers} could not be prepared in {home}: File too large. Fix: make it" in message
    assert "0.1 MB free, or set KERAS_HOME" in message
    assert names(home) == []


def test_a_home_that_is_no_folder_is_one_line(flowers, tmp_path):
    (tmp_path / "keras").write_text("a file")
    assert "Not a directory. Fix: make it writable" in refusal(flowers)


def test_without_a_home_one_line_says_so(flowers, monkeypatch):
    monkeypatch.delenv("KERAS_HOME")
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert "Received: no home folder (none). Fix: set KERAS_HOME" in refusal(flowers)


def no_home(path):
    raise RuntimeError("none")
