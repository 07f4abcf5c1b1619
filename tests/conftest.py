"""What holds for every test."""

import gc

import pytest
from optuna.storages._rdb.storage import _VersionManager

from tests import command


def pytest_collection_finish() -> None:
    """What has been imported stays: each full collection would look at all of it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _optunas_migrations_are_read_once():
    """Optuna reads the scripts anew, several times, for each file that it opens."""
    read, scripts = _VersionManager._create_alembic_script, []

    def read_once(self):
        if not scripts:
            scripts.append(read(self))
        return scripts[0]

    _VersionManager._create_alembic_script = read_once
    yield
    _VersionManager._create_alembic_script = read


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    command.end_started()
