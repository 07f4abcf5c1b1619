"""The table of faults, each by the tests that show it.

python -m tests.faults         # the fast ones, in minutes
python -m tests.faults --all   # the slow ones, too
python -m tests.faults K3 S1   # these rows
"""

import argparse
import sys
from collections import defaultdict

import pytest

ROWS = {
    "K1": "workers killed at random",
    "K2": "workers and the coordinator killed at random",
    "K3": "a kill at each point of the protocol",
    "K4": "a trial that always kills its worker",
    "K5": "a worker stopped, and continued later",
    "K6": "a worker in an endless loop",
    "K7": "Ctrl-C once and twice, SIGTERM, SIGHUP",
    "K8": "two coordinators on one study",
    "K9": "eight processes create one study",
    "K10": "the foreground group killed",
    "S1": "any call of the storage fails",
    "S2": "PostgreSQL restarted, and away for a minute",
    "S3": "the study's file locked for 30 s",
    "S4": "the disk full",
    "S5": "the study's file damaged",
    "S6": "folders that can't be written, no home",
    "S7": "10 000 trials in the study",
    "S8": "another question under the same name",
    "D1": "data damaged",
    "D2": "eight first runs, a download killed",
    "D3": "no network",
    "N1": "a loss that is not finite",
    "N2": "an objective that returns nonsense",
    "N3": "no memory",
    "N4": "a point that can't be built",
    "A1": "a kill at each write of a file",
    "A2": "an artifact changed or deleted",
    "A3": "a winner's training killed",
    "A4": "the same seed, interrupted or not",
    "T1": "a clock that jumps",
    "E1": "Ray: actors and the driver killed",
    "X1": "names that are no names",
    "X2": "symbolic links in the run's folder",
    "X3": "crafted models, pickles, YAML",
    "X4": "a password in a URL",
    "X5": "the dashboard from elsewhere",
    "X6": "a study that anybody may write",
}


class Table:
    """Chooses tests by the rows that they show, and keeps how they went."""

    def __init__(self, rows: list[str]):
        self._rows = set(rows)
        self._of: dict[str, list[str]] = {}  # test -> rows
        self.seconds: dict[str, float] = defaultdict(float)
        self.outcomes: dict[str, list[str]] = defaultdict(list)

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]):
        chosen = []
        for item in items:
            rows = [row for mark in item.iter_markers("fault") for row in mark.args]
            if unknown := set(rows) - set(ROWS):
                raise pytest.UsageError(f"{item.nodeid} shows no row of the table: {unknown}")
            if self._rows & set(rows):
                self._of[item.nodeid] = rows
                chosen.append(item)
        items[:] = chosen

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for row in self._of.get(report.nodeid, ()):
            self.seconds[row] += report.duration
            if report.when == "call" or report.outcome != "passed":
                self.outcomes[row].append(report.outcome)

    def lines(self) -> list[str]:
        shown = ["| id | fault | tests | seconds | result |", "|---|---|---|---|---|"]
        for row, fault in ROWS.items():
            if row not in self._rows:
                continue
            outcomes = self.outcomes[row]
            result = next((o for o in ("failed", "skipped", "passed") if o in outcomes), "not run")
            line = f"| {row} | {fault} | {len(outcomes)} | {self.seconds[row]:.0f} | {result} |"
            shown.append(line)
        return shown


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("rows", nargs="*", help="such as K3; all where none is named")
    parser.add_argument("--all", action="store_true", help="the slow tests, too")
    arguments = parser.parse_args()
    table = Table(arguments.rows or list(ROWS))
    which = "" if arguments.all else "not slow and not longest"
    code = pytest.main(["-q", "-n", "0", "-m", which, "tests"], plugins=[table])
    print("\n".join(table.lines()))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
