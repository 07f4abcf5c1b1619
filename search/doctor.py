"""What a search needs of this machine, looked at before it is missed.

    fmnist-search doctor

Nothing is fetched, and nothing is written that does not vanish again.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from search import folders, provenance, run_record
from search.data import datasets, fetching, weights
from search.data.fetching import DataFile
from search.errors import EXIT_USAGE, SearchError
from search.storage import storage
from search.workers import devices
from search.workers.local import environment

OK, WARNING, PROBLEM = "ok", "warning", "problem"
BACKEND_TIMEOUT = 180  # seconds; a cold import of TensorFlow takes six, on a network disk a minute
ROOMY_BYTES = 2 * 2**30  # of disk; a large search with its models stays below
WORKER_BYTES = 1.5 * 2**30  # of memory: TensorFlow, a data set and a model, a guess
_FOREIGN_LOCKS = ("nfs", "cifs", "smb", "9p", "sshfs", "fuse")  # SQLite's WAL needs shared memory
_ASK_BACKEND = """
import json, keras
from search.training import backend
precision = backend.use_precision("auto")
print(json.dumps([keras.backend.backend(), precision, backend.visible_gpus()]))
"""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    state: str  # ok, warning (it runs, but read this), problem (it does not)
    what: str
    fix: str = ""  # in one line; empty for ok


def examine(dataset: str, out: Path) -> list[Finding]:
    """Look at everything.

    Args:
        dataset: a name, a .npz file or a folder of images.
        out: where runs are to be kept, or a run's own folder.
    """
    data = [*_data(dataset)]
    # What is there need not be fetched.
    to_fetch = 2**20 if all(found.state == OK for found in data) else folders.NEEDED_BYTES
    return [
        *_versions(),
        *_devices(),
        *_backend(),
        *data,
        *_weights(),
        *_disk("runs", _existing(out), folders.NEEDED_BYTES),
        *_disk("KERAS_HOME", _existing(fetching.keras_datasets().parent), to_fetch),
        *_folder(out),
        *_studies(out),
    ]


def is_well(findings: list[Finding]) -> bool:
    return all(finding.state != PROBLEM for finding in findings)


def to_json(findings: list[Finding]) -> str:
    content = {"ok": is_well(findings), "findings": [asdict(finding) for finding in findings]}
    return json.dumps(content, indent=2)


def _versions() -> Iterator[Finding]:
    known = provenance.collect()
    versions = known["versions"]
    yield Finding("system", OK, f"{platform.platform()}, Python {versions['python']}")
    listed = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "python")
    commit = f", commit {known['commit'][:10]}" if known["commit"] else ""
    yield Finding("versions", OK, listed + commit)


def _devices() -> Iterator[Finding]:
    cores, there = devices.cores(), os.cpu_count() or 1
    limited = "" if cores == there else f" of {there}, limited by affinity or the container"
    yield Finding("cores", OK, f"{provenance.processor()}, {cores}{limited}")
    for name in gpu_names():
        yield Finding("GPU", OK, name)
    memory = psutil.virtual_memory()
    limit = devices.memory()
    free, needed = min(memory.available, limit), WORKER_BYTES * len(devices.share_out("auto"))
    what = f"{_gib(free)} GiB free of {_gib(limit)}"
    if free >= needed:
        yield Finding("memory", OK, what)
        return
    workers = max(1, int(free / WORKER_BYTES))
    yield Finding(
        "memory",
        WARNING,
        f"{what}; {_gib(needed)} are usual",
        f"end others, or --workers {workers}",
    )


def gpu_names() -> list[str]:
    """Of the GPUs that may be used, with their memory where the driver says it."""
    visible = devices.gpus()
    if not visible:
        return []
    fields = ["--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    said = devices.ask_driver(*fields, f"--id={','.join(visible)}")
    return said.splitlines() or [f"gpu {name}" for name in visible]


def _backend() -> Iterator[Finding]:
    """As a worker will import it, in a process of its own: the import may crash or hang."""
    name = os.environ.get("KERAS_BACKEND", "tensorflow")
    device = devices.share_out("auto")[0]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_BACKEND], capture_output=True, text=True,
            timeout=BACKEND_TIMEOUT, env=environment(device),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        yield Finding(
            "Keras", PROBLEM, f"the backend {name} is not imported within {BACKEND_TIMEOUT} s",
            "look for a slow disk or a driver that hangs; install into a local folder",
        )  # fmt: skip
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        how = f"killed by signal {-done.returncode}" if done.returncode < 0 else last
        fix = "install it again: pip install --force-reinstall " + name
        if name not in ("tensorflow", "jax"):
            fix = "unset KERAS_BACKEND, or set it to tensorflow or jax"
        yield Finding("Keras", PROBLEM, f"the backend {name} can't be imported: {how[:300]}", fix)
        return
    backend, precision, gpus = json.loads(done.stdout.splitlines()[-1])
    yield Finding("Keras", OK, f"imports with the backend {backend}")
    if device.gpu is not None and not gpus:
        yield Finding(
            "GPU", WARNING, "this machine has a GPU that Keras does not see",
            "pip install '.[cuda]'; else the search runs on cores",
        )  # fmt: skip
    native = "native bfloat16" if precision == "bfloat16" else "no native bfloat16"
    yield Finding("precision", OK, f"{native}: --precision auto is {precision}")


def _data(reference: str) -> Iterator[Finding]:
    subject = f"data {reference}"
    known = datasets.DATASETS.get(reference)
    files = dict.fromkeys((*known.train_files, *known.test_files)) if known else {}
    if known and files:
        folder = fetching.keras_datasets() / known.folder
        yield _files(subject, folder, tuple(files), "the first run that needs it fetches it")
        return
    try:
        found = datasets.find(reference)
        if not Path(reference).expanduser().is_dir():  # a folder's copy would be written
            datasets.ensure(reference)
    except SearchError as error:
        yield Finding(subject, PROBLEM, str(error), "mend the data, or take another --dataset")
        return
    shape = " x ".join(map(str, found.input_shape))
    yield Finding(subject, OK, f"images of {shape}, {found.num_classes} classes")


def _weights() -> Iterator[Finding]:
    folder = fetching.keras_datasets().with_name("models")
    fix = "the first run that begins from them fetches them (59 MB); others need none"
    yield _files("VGG16's weights", folder, (weights.PUBLISHED,), fix)


def _files(subject: str, folder: Path, files: tuple[DataFile, ...], fetched: str) -> Finding:
    """Whether published files are there and what was published."""
    wrong = fetching.wrong_files(folder, files)
    damaged = [file.name for file in wrong if (folder / file.name).exists()]
    if damaged:
        what = f"{', '.join(damaged)} in {folder}: damaged, or not the published file"
        return Finding(subject, PROBLEM, what, "delete it; the next run fetches it again")
    if wrong:
        missing = f"{len(wrong)} of {len(files)} files are" if len(files) > 1 else "it is"
        what = f"{missing} not in {folder}"
        return Finding(subject, WARNING, what, fetched)
    return Finding(subject, OK, f"intact in {folder}")


def _disk(name: str, folder: Path, needed: int) -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(f"disk of {name}", PROBLEM, f"{folder}: {error.strerror}", "take another")
        return
    what = f"{_gib(free)} GiB free at {folder}"
    if free < needed:
        fix = f"free some: a run needs {needed >> 20} MB"
        yield Finding(f"disk of {name}", PROBLEM, what, fix)
    elif free < ROOMY_BYTES:
        yield Finding(f"disk of {name}", WARNING, what, "enough for one run; free some")
    else:
        yield Finding(f"disk of {name}", OK, what)


def _folder(out: Path) -> Iterator[Finding]:
    """Whether a run can be kept there: files, locks and SQLite as a run uses them."""
    folder = _existing(out)
    other = "take another --out, on a disk of this machine"
    if not folder.is_dir():
        yield Finding("run folder", PROBLEM, f"{folder} is no folder", "take another --out")
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=folder) as scratch:
            problem = _unlockable(Path(scratch)) or _without_wal(Path(scratch))
    except OSError as error:
        what = f"{folder} can't be written: {error.strerror}"
        yield Finding("run folder", PROBLEM, what, "make it writable, or take another --out")
        return
    kind = _file_system(folder)
    if problem:
        yield Finding("run folder", PROBLEM, f"{folder} ({kind}): {problem}", other)
    elif kind.startswith(_FOREIGN_LOCKS):
        what = f"{folder} is on {kind}, where other machines' locks may not be seen"
        yield Finding("run folder", WARNING, what, other)
    else:
        yield Finding("run folder", OK, f"{folder} is writable and locks ({kind})")


def _unlockable(scratch: Path) -> str:
    with open(scratch / "lock", "w") as first, open(scratch / "lock") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ""
        except OSError as error:
            return f"files can't be locked ({error.strerror})"
    return "locks are granted twice"


def _without_wal(scratch: Path) -> str:
    try:
        with closing(sqlite3.connect(scratch / "wal.db")) as connection:
            (mode,) = connection.execute("PRAGMA journal_mode=wal").fetchone()
            connection.execute("CREATE TABLE t (x)")
    except sqlite3.Error as error:
        return f"SQLite does not work there ({error})"
    return "" if mode == "wal" else f"SQLite's write-ahead log does not work there ({mode})"


def _studies(out: Path) -> Iterator[Finding]:
    """The runs that are kept there: sound, and this version's."""
    files = sorted({*out.glob("study.db"), *out.glob("*/study.db")})
    bad = [(file, problem) for file in files if (problem := _unusable(file))]
    for file, problem in bad:
        what = f"{file}: {problem}"
        yield Finding("run", PROBLEM, what, "take another --out, or move it away to begin anew")
    if len(files) > len(bad):
        count = len(files) - len(bad)
        yield Finding("runs", OK, f"{count} {'study' if count == 1 else 'studies'} in {out}, sound")


def _unusable(file: Path) -> str:
    url = f"sqlite:///{file}"
    try:
        for name in storage.at(url).names():
            study = storage.read_study(url, name)
            if study and not run_record.is_readable(study):
                return f"another version began {name!r}: only that one goes on with it"
    except SearchError as error:
        return "" if error.exit_code == EXIT_USAGE else str(error)  # moved: no fault
    return ""


def _existing(path: Path) -> Path:
    """The path, or its nearest folder that is there."""
    path = path.expanduser().absolute()
    return next((at for at in (path, *path.parents) if os.path.exists(at)), path)


def _file_system(folder: Path) -> str:
    mounts = [
        (len(Path(part.mountpoint).parts), part.fstype)
        for part in psutil.disk_partitions(all=True)
        if folder.resolve().is_relative_to(part.mountpoint)
    ]
    return max(mounts, default=(0, "unknown"))[1]


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f}"
