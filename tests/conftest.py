"""What holds for every test."""

import pytest

from tests import command


@pytest.fixture(autouse=True)
def _nothing_runs_on():
    yield
    command.end_started()
