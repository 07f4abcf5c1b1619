"""Nothing half-written: a file appears under its name when it is complete, or not at all.

    with write_atomically("runs/cnn/models/best.keras", inside="runs/cnn") as temporary:
        model.save(temporary)

The bytes go to a dot-named file in the same folder (a rename is atomic only within one file
system), reach the disk by fsync and then take the name by `os.replace`. A killed writer leaves the
old file and a `.partial` one, which `remove_partials` takes away.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from search.errors import EXIT_DAMAGED, SearchError

PARTIAL = ".partial"


@contextmanager
def write_atomically(
    path: str | Path, *, inside: str | Path | None = None, num_bytes: int | None = None
) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `path` when the block ends without an error.

    Args:
        path: the final name; its folder is made where missing.
        inside: a folder that the real path must not leave through a symbolic link.
        num_bytes: how much will be written, as nearly as is known; only the message of a full
            disk uses it.

    Yields:
        A path in the same folder with the same suffix (Keras saves only to `.keras`). The block
        creates that file.

    Raises:
        SearchError: if `path` is a symbolic link or lies outside `inside`, or the file cannot be
            written (disk full, no permission). The earlier file of that name is then untouched.
    """
    final = Path(path)
    refuse_symlink(final, inside=inside)
    # The suffix stays last: keras.Model.save and numpy.savez look at it.
    temporary = final.with_name(f".{final.stem}.{secrets.token_hex(4)}{PARTIAL}{final.suffix}")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        os.replace(temporary, final)
        _flush(final.parent)
    except OSError as error:
        raise SearchError(_why_unwritten(final, temporary, error, num_bytes)) from error
    finally:
        with suppress(OSError):  # nothing is there after the rename, or where no folder was made
            temporary.unlink()


def write_text(path: str | Path, text: str, *, inside: str | Path | None = None) -> None:
    """Writes UTF-8 text as `write_atomically` does, and raises what it raises."""
    content = text.encode()
    with write_atomically(path, inside=inside, num_bytes=len(content)) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any, *, inside: str | Path | None = None) -> None:
    """Writes `value` as indented JSON, as `write_atomically` does.

    Raises:
        ValueError: if `value` holds NaN or an infinity, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n", inside=inside)


def read_json(path: Path) -> Any:
    """What `write_json` has written; None where there is no file.

    Raises:
        SearchError: if it can't be read.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise SearchError(f"{path} can't be read: {error}", exit_code=EXIT_DAMAGED) from None


def refuse_symlink(path: str | Path, *, inside: str | Path | None = None) -> None:
    """Raises SearchError if writing to `path` would write somewhere else.

    Args:
        path: a file, existing or not. It must not be a symbolic link itself.
        inside: where given, no folder on the way to `path` may lead out of it. The folder itself
            may be a link: people keep `runs/` on another disk.
    """
    path = Path(path)
    if path.is_symlink():
        raise SearchError(
            f"Files are not written through symbolic links. Received: {path} -> "
            f"{os.readlink(path)}. Fix: remove the link"
        )
    if inside is None:
        return
    real_parent, real_root = path.parent.resolve(), Path(inside).resolve()
    if not real_parent.is_relative_to(real_root):
        raise SearchError(
            f"Files of {inside} are written inside it. Received: {path}, whose real folder is "
            f"{real_parent}. Fix: remove the symbolic link that leads there"
        )


def remove_partials(folder: str | Path) -> None:
    """Removes what killed writers left in `folder` itself; only while nobody writes there."""
    for left in Path(folder).glob(f".*{PARTIAL}*"):
        if left.is_file():
            left.unlink(missing_ok=True)


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's bytes, as 64 hexadecimal digits.

    Raises:
        SearchError: if the file is missing or unreadable.
    """
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise SearchError(
            f"{path} cannot be read: {error.strerror}. Fix: put it back or make it again",
            exit_code=EXIT_DAMAGED,
        ) from error


def verified_models(metrics: Mapping[str, Any], folder: Path) -> list[Path]:
    """The models that a metrics.json names, the best winner's first.

    Raises:
        SearchError: if one is missing or not what was written.
    """
    paths = []
    for winner in metrics["winners"]:
        for seed in winner["seeds"]:
            path = folder / seed["model"]
            if sha256(path) != seed["model_sha256"]:
                raise SearchError(
                    f"{path} is not what was written; the search's own command makes it again",
                    exit_code=EXIT_DAMAGED,
                )
            paths.append(path)
    return paths


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _why_unwritten(final: Path, temporary: Path, error: OSError, num_bytes: int | None) -> str:
    why = f"{final} could not be written: {error.strerror or error}."
    if not final.parent.is_dir():
        return f"{why} Fix: make the folder {final.parent} writable, or choose another"
    written = temporary.stat().st_size if temporary.exists() else 0
    is_known = num_bytes is not None and num_bytes >= written
    needed = f"{num_bytes} bytes" if is_known else f"more than {written} bytes"
    free = shutil.disk_usage(final.parent).free + written  # which is about to be removed
    return f"{why} It needs {needed}, {free} are free. Fix: free that much, or check permissions"
