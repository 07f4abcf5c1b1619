import ast
import os
import re
import subprocess
import sys

import pytest

from search import catalogue
from search.errors import EXIT_USAGE, EXIT_USER_ERROR, SearchError
from tests.command import ROOT

STUDY = '''"""What it asks.

Goal: ...
"""
from studies.study import Study

study = Study(name="mine", objective=lambda trial: 0.0)
'''


@pytest.fixture
def write(tmp_path):
    def write(content, name="mine.py"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


@pytest.fixture
def loading(monkeypatch, tmp_path):
    """Loading changes the process: it is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = dict(sys.modules)
    yield catalogue.load
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
            sys.modules.update({name: before[name]} if name in before else {})


def test_installed_studies_are_listed_by_their_source():
    entries = {entry.name: entry for entry in catalogue.studies()}
    assert {"cnn", "quickstart"} <= set(entries)
    assert entries["quickstart"].summary.startswith("The whole journey in half a minute")
    for entry in entries.values():
        assert entry.file.stem == entry.name
        assert entry.summary == ast.get_docstring(ast.parse(entry.file.read_text())).split("\n")[0]


def test_listing_imports_no_study_and_nothing_heavy():
    code = (
        "import sys; from search import catalogue; catalogue.studies(); catalogue.find('cnn');"
        "print({'keras', 'optuna', 'keras_tuner', 'studies.cnn', 'spaces.cnn'} & set(sys.modules))"
    )
    listed = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert listed.stdout.strip() == "set()"


def test_a_study_is_found_by_name_or_by_file(write):
    assert catalogue.find("cnn").file == ROOT / "studies" / "cnn.py"
    path = write(STUDY)
    assert catalogue.find(str(path)) == catalogue.Entry("mine", path, "What it asks.")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("cn", " Did you mean 'cnn'?"), ("quick-start", " Did you mean 'quickstart'?"), ("xyz", "")],
)
def test_an_unknown_name_lists_the_known_and_the_nearest(name, hint):
    with pytest.raises(SearchError) as caught:
        catalogue.find(name)
    known = ", ".join(entry.name for entry in catalogue.studies())
    assert str(caught.value) == (
        f"there is no study {name!r}.{hint} Known: {known}; or give a path that ends in .py"
    )
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.fault("X1")
@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("", "''"),
        ("../up", "'../up'"),
        (".hidden", "'.hidden'"),
        ("a b", "'a b'"),
        ("two\nlines", r"'two\nlines'"),
        ("\x1b[2Jred", r"'\x1b[2Jred'"),
        ("küche", r"'k\xfcche'"),
        ("x" * 500, f"'{'x' * 80}'"),
    ],
)
def test_a_bad_name_is_shown_escaped_and_cut(name, shown):
    with pytest.raises(SearchError, match="takes 1 to 64 of A-Z") as caught:
        catalogue.find(name)
    assert str(caught.value).endswith(f"Received: {shown}")
    assert caught.value.exit_code == EXIT_USAGE


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SearchError, match=r"--study: there is no file '.*none\.py'") as caught:
        catalogue.find(str(tmp_path / "none.py"))
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("study = Study(name='mine'", r"'\(' was never closed"),
        ("def f(:\n", "invalid syntax"),
        (b"\xff\xfe\x00 no text", "can't decode byte 0xff"),
        (b"study = 1\0", "null bytes"),
    ],
)
def test_a_file_that_is_no_python_is_refused(write, content, why):
    path = write(content)
    with pytest.raises(SearchError, match=f"{path} can't be read: .*{why}") as caught:
        catalogue.find(str(path))
    assert caught.value.exit_code == EXIT_USER_ERROR


@pytest.mark.parametrize(
    "content",
    [
        "",
        "name = 'mine'\nstudy = Study(name=name)",
        "study = Study(name=f'{1}')",
        "study = Study('mine')",
        "study = other",
        "other = Study(name='mine')",
        "def make():\n    study = Study(name='mine')",
    ],
)
def test_a_file_without_a_name_that_is_written_out_is_refused(write, content):
    path = write(content)
    rule = re.escape(f'{path} needs a line `study = Study(name="...", ...)` with the name written')
    with pytest.raises(SearchError, match=rule):
        catalogue.find(str(path))


@pytest.mark.fault("X1")
@pytest.mark.parametrize(
    ("name", "shown"),
    [("../../etc", "'../../etc'"), ("", "''"), ("\x1b[2J", r"'\x1b[2J'"), (".x", "'.x'")],
)
def test_a_bad_name_inside_a_file_is_refused_escaped(write, name, shown):
    path = write(f"study = Study(name={name!r})")
    rule = f"a study's name is 1 to 64 .*Received: name={re.escape(shown)} in {path}"
    with pytest.raises(SearchError, match=rule):
        catalogue.find(str(path))


def test_finding_does_not_run_the_file(write):
    path = write(STUDY + "\nraise SystemExit('it was run')\n")
    assert catalogue.find(str(path)).name == "mine"


def test_a_study_is_loaded_with_what_lies_beside_it(write, loading):
    write("VALUE = 0.25\n", "values_of_mine.py")
    path = write("from values_of_mine import VALUE\n" + STUDY.replace("0.0", "VALUE"))
    assert loading(path).objective(None) == 0.25


def test_an_installed_study_is_loaded_as_the_module_it_is(loading, write):
    study = loading(ROOT / "studies" / "quickstart.py")
    assert study is sys.modules["studies.quickstart"].study


@pytest.mark.parametrize("line", ["", "study = None", "study = 'mine'", "study = Study"])
def test_a_file_without_a_study_is_refused(write, loading, line):
    path = write(f"from studies.study import Study\n{line}\n")
    with pytest.raises(ValueError, match=f"{path} needs a line `study = Study"):
        loading(path)


def test_what_the_file_raises_is_raised(write, loading):
    with pytest.raises(ValueError, match=r"epochs is a number above 0. Received: -1"):
        loading(write(STUDY.replace('"mine"', '"mine", epochs=-1')))


@pytest.mark.parametrize("name", ["search.py", "json.py", "studies.py"])
def test_a_file_may_have_the_name_of_a_module(write, loading, name):
    path = write(STUDY, name)
    module = sys.modules.get(path.stem)
    assert loading(path).name == "mine"
    assert sys.modules.get(path.stem) is module
