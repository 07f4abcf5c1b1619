"""Which studies there are. Names and docstrings are read from source: a study imports Keras."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from search.errors import EXIT_USAGE, SearchError

if TYPE_CHECKING:
    from studies.study import Study

_FOLDER = Path(__file__).parents[1] / "studies"


@dataclass(frozen=True)
class Entry:
    """A study that can be named on the command line."""

    name: str
    file: Path
    summary: str  # first line of the docstring


def studies() -> list[Entry]:
    """Those that are installed, by name."""
    files = sorted(_FOLDER.glob("*.py"))
    return [_read(file) for file in files if file.stem not in ("__init__", "study")]


def find(reference: str) -> Entry:
    """The study of that name, or in that file.

    Raises:
        SearchError: naming the known ones and the nearest, or what is wrong with the file.
    """
    from studies.study import NAME_RULE

    if reference.endswith(".py"):
        if not _is_file(file := Path(reference)):
            raise SearchError(
                f"--study: there is no file {reference[:200]!a}; check the path",
                exit_code=EXIT_USAGE,
            )
        _refuse_anybody_s(file.resolve())
        return _read(file.resolve())
    if not NAME_RULE.fullmatch(reference):
        raise SearchError(
            f"--study takes 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot, or a path that "
            f"ends in .py. Received: {reference[:80]!a}",
            exit_code=EXIT_USAGE,
        )
    known = {entry.name: entry for entry in studies()}
    if reference in known:
        return known[reference]
    nearest = difflib.get_close_matches(reference, known, n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise SearchError(
        f"there is no study {reference!r}.{hint} Known: {', '.join(known)}; or give a path that "
        "ends in .py",
        exit_code=EXIT_USAGE,
    )


def load(file: Path) -> Study:
    """Import the study (this runs the file's code); only workers do it.

    Raises:
        ValueError: if the file has no `study = Study(...)`.
        Exception: whatever the file raises.
    """
    from studies.study import Study

    if file.parent == _FOLDER:
        module = importlib.import_module(f"studies.{file.stem}")
    else:
        module = _import_file(file)
    study = getattr(module, "study", None)
    if not isinstance(study, Study):
        raise ValueError(f"{file} needs a line `study = Study(...)`. Received: study={study!r}")
    named = {
        field: _import(value, file.parent)
        for field in ("space", "objective")
        if isinstance(value := getattr(study, field), str)
    }
    return dataclasses.replace(study, **named) if named else study


def is_installed(file: Path) -> bool:
    """Whether the study is one of this package's own, which any machine has."""
    return file.parent == _FOLDER


def _import(reference: str, folder: Path) -> Any:
    """What `file.py:name` (relative to the folder) or `package.module:name` refers to."""
    source, _, name = reference.rpartition(":")
    if not source or not name.isidentifier():
        raise ValueError(
            "A space or objective given as text is 'file.py:name' or 'module:name'. "
            f"Received: {reference!r}"
        )
    module = _import_file(folder / source) if source.endswith(".py") else _import_module(source)
    if not hasattr(module, name):
        raise ValueError(f"{source} has no {name!r}. Received: {reference!r}")
    return getattr(module, name)


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The workers can't import {name!r} ({error}): install it, or name its file as "
            "'file.py:name'"
        ) from None


def _import_file(file: Path) -> ModuleType:
    file = file.expanduser().resolve()
    if not file.is_file():
        raise ValueError(f"There is no file {file}")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))  # so that it can import what lies beside it
    # Its own name in sys.modules: a study in random.py must not become `random`.
    spec = importlib.util.spec_from_file_location(f"study_in_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or has a null byte
        return False


def _refuse_anybody_s(file: Path) -> None:
    """A study's file is run: it may not be one that anybody on this machine could have written."""
    if file.stat().st_mode & stat.S_IWOTH:
        raise SearchError(
            f"--study runs the file's code, and anybody may write {file}. Fix: chmod o-w, once you "
            "have read it",
            exit_code=EXIT_USAGE,
        )


def _read(file: Path) -> Entry:
    try:
        tree = ast.parse(file.read_text(), str(file))
    except (SyntaxError, UnicodeDecodeError, OSError) as error:
        raise SearchError(f"the study file {file} can't be read: {error}") from None
    name = _study_name(tree)
    if name is None:
        raise SearchError(
            f'the study file {file} needs a line `study = Study(name="...", ...)` with the name '
            "written out"
        )
    summary = (ast.get_docstring(tree) or "").partition("\n")[0]
    return Entry(_valid_name(name, file), file, summary)


def _valid_name(name: str, file: Path) -> str:
    from studies.study import NAME_RULE

    if not NAME_RULE.fullmatch(name):
        raise SearchError(
            f"a study's name is 1 to 64 of A-Z a-z 0-9 . _ - without a leading dot. "
            f"Received: name={name[:80]!a} in {file}"
        )
    return name


def _study_name(tree: ast.Module) -> str | None:
    for statement in tree.body:
        match statement:
            case ast.Assign(targets=[ast.Name(id="study")], value=ast.Call(keywords=keywords)):
                for keyword in keywords:
                    if keyword.arg == "name" and isinstance(keyword.value, ast.Constant):
                        return str(keyword.value.value)
    return None
