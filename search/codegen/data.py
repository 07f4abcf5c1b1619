"""How a script reads its data: the code of `load_data()` for each kind of data set.

code = data_code(DataSource(name="digits", input_shape=(8, 8, 1), num_classes=10))
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from search.codegen.layout import quoted
from search.data.datasets import SPLIT_SEED

_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the number of channels


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Where the data is."""

    # fashion_mnist, mnist, cifar10, digits; or the absolute path of a .npz file with x_train,
    # y_train, x_test and y_test, or of a folder of images as search/data/image_folder.py reads it.
    name: str
    input_shape: tuple[int, int, int]  # height, width, channels
    num_classes: int


@dataclass(frozen=True, kw_only=True)
class DataCode:
    """The data's part in a script."""

    code: str  # the function load_data() -> (x_train, y_train), (x_test, y_test)
    imports: tuple[str, ...] = ()
    constants: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()  # packages, beside Keras and NumPy


def data_code(source: DataSource) -> DataCode:
    """The code for a data source.

    Raises:
        ValueError: if it is none of those that a script can read.
    """
    if source.name in _KERAS:
        return DataCode(code=_KERAS[source.name])
    if source.name == "digits":
        return DataCode(code=_DIGITS, imports=_DIGITS_IMPORTS, needs=("scikit-learn",))
    path = Path(source.name)
    if not path.is_absolute():
        known = ", ".join([*_KERAS, "digits"])
        raise ValueError(
            f"A script reads {known}, or the absolute path of a .npz file or a folder. "
            f"Received: {source.name!r}"
        )
    constants = (f"DATA = Path({quoted(source.name)})",)
    if path.suffix.lower() == ".npz":
        return DataCode(code=_NPZ, imports=("from pathlib import Path",), constants=constants)
    if source.input_shape[2] not in _MODES:
        raise ValueError(
            f"Images in files have {' or '.join(map(str, _MODES))} channels. "
            f"Received: input_shape={source.input_shape}"
        )
    return DataCode(
        code=_FOLDER.replace("MODE", quoted(_MODES[source.input_shape[2]])),
        imports=("from pathlib import Path", "from PIL import Image, ImageOps"),
        constants=(*constants, f"IMAGE_SHAPE = {source.input_shape}  # height, width, channels"),
        needs=("Pillow",),
    )


_GREY = '''\
def load_data():
    """Images (n, 28, 28, 1) uint8, labels (n,); Keras fetches them once."""
    (x_train, y_train), (x_test, y_test) = keras.datasets.{name}.load_data()
    return (x_train[..., np.newaxis], y_train), (x_test[..., np.newaxis], y_test)'''

_KERAS = {
    "fashion_mnist": _GREY.format(name="fashion_mnist"),
    "mnist": _GREY.format(name="mnist"),
    "cifar10": '''\
def load_data():
    """Images (n, 32, 32, 3) uint8, labels (n,); Keras fetches them once."""
    (x_train, y_train), (x_test, y_test) = keras.datasets.cifar10.load_data()
    return (x_train, y_train.squeeze()), (x_test, y_test.squeeze())''',
}

_DIGITS_IMPORTS = (
    "from sklearn.datasets import load_digits",
    "from sklearn.model_selection import train_test_split",
)
_DIGITS = f'''\
def load_data():
    """Images (n, 8, 8, 1) uint8, labels (n,); a fifth of scikit-learn's digits is the test set."""
    digits = load_digits()
    x = np.rint(digits.images * (255 / 16)).astype("uint8")[..., np.newaxis]
    y = digits.target
    train, test = train_test_split(
        np.arange(len(y)), test_size=360, stratify=y, random_state={SPLIT_SEED:_}
    )
    train, test = np.sort(train), np.sort(test)
    return (x[train], y[train]), (x[test], y[test])'''

_NPZ = '''\
def load_data():
    """Images (n, height, width, channels) uint8, labels (n,)."""
    with np.load(DATA) as arrays:
        x_train, y_train = arrays["x_train"], arrays["y_train"]
        x_test, y_test = arrays["x_test"], arrays["y_test"]
    # Pixels are 0 to 255 in the file, or 0 to 1.
    scale = 255 if x_train.dtype.kind in "bf" and x_train.max() <= 1 else 1
    train = as_pixels(x_train, scale), y_train.reshape(-1).astype("int64")
    return train, (as_pixels(x_test, scale), y_test.reshape(-1).astype("int64"))


def as_pixels(images, scale):
    if images.dtype != "uint8":
        images = np.rint(images * np.float32(scale)).astype("uint8")
    return images[..., np.newaxis] if images.ndim == 3 else images'''

_FOLDER = '''\
def load_data():
    """Images (n, *IMAGE_SHAPE) uint8; labels (n,) by the order of the class folders' names."""
    names = {folder.name for folder in class_folders(DATA)}
    # Else "train" is a class like the others.
    has_train = "train" in names and bool(class_folders(DATA / "train"))
    has_test = has_train and (DATA / "test").is_dir()
    train, test = [], []  # (path, label)
    for label, folder in enumerate(class_folders(DATA / "train" if has_train else DATA)):
        paths = image_paths(folder)
        if has_test:
            test_paths = image_paths(DATA / "test" / folder.name)
        else:  # every 7th of a class
            test_paths = paths[6::7]
            del paths[6::7]
        train += [(path, label) for path in paths]
        test += [(path, label) for path in test_paths]
    return read_images(train), read_images(test)


def class_folders(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def image_paths(folder):
    paths = (path for path in folder.iterdir() if path.name[0] != ".")
    return sorted(path for path in paths if path.suffix.lower() in (".png", ".jpg", ".jpeg"))


def read_images(paths):
    x = np.stack([read_image(path) for path, _ in paths])
    return x, np.array([label for _, label in paths])


def read_image(path):
    """The right side up, resized, on black where it is transparent."""
    height, width, _ = IMAGE_SHAPE
    with Image.open(path) as file:
        image = file
        # A PNG's EXIF counts where it stands before the pixels; odd EXIF says nothing.
        if file.format != "PNG" or "exif" in file.info:
            try:
                image = ImageOps.exif_transpose(file)
            except Exception:
                image = file
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray(np.rint(np.asarray(image) / 257).astype("uint8"))
        if image.has_transparency_data:
            black = Image.new("RGBA", image.size, "black")
            image = Image.alpha_composite(black, image.convert("RGBA"))
        image = image.convert(MODE).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(image).reshape(IMAGE_SHAPE)'''
