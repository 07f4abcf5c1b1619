"""Whether the fault tests bite: each must fail on a build that is broken where it looks.

    python -m tests.broken_builds        # all
    python -m tests.broken_builds K3 A1  # these rows

Exits with 1 if a test passes on a broken build, or a break no longer applies.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Break(NamedTuple):
    """What is broken, by replacing one piece of text that occurs once."""

    row: str
    what: str
    file: str
    old: str
    new: str
    test: str


BREAKS = (
    Break(
        "K1", "the end of a worker's socket is ignored", "search/workers/pool.py",
        "# or it speaks no sense\n                is_lost = True",
        "# or it speaks no sense\n                is_lost = False",
        "workers/test_pool.py::test_a_dead_worker_is_lost_and_replaced",
    ),
    Break(
        "K2", "a coordinator's death counts as an attempt", "search/trial.py",
        'sum(attempt.get("reason") != COORDINATOR_ENDED for attempt in self._attempts)',
        "len(self._attempts)",
        "test_coordinator.py::test_a_coordinator_s_deaths_are_no_attempts",
    ),
    Break(
        "K3", "how a trial ends is not written down first", "search/trial.py",
        '        self._set("ending", ending)\n', "",
        "test_coordinator.py::test_an_end_that_a_kill_cuts_off_is_finished_by_the_next",
    ),
    Break(
        "K3", "a worker is answered before what it said is stored", "search/coordinator.py",
        "self._when_stored.append(partial(pool.answer, slot, **content))",
        "pool.answer(slot, **content)",
        "test_coordinator.py::"
        "test_what_the_workers_say_at_once_is_one_transaction_and_answered_after_it",
    ),
    Break(
        "K4", "one attempt too many", "search/trial.py",
        "self.num_counted >= max_attempts", "self.num_counted > max_attempts",
        "test_coordinator.py::test_a_trial_that_is_lost_too_often_fails_with_its_last_words",
    ),
    Break(
        "K5", "what an old attempt says is heard", "search/workers/pool.py",
        'task is None or (message["trial"], message["attempt"]) != (task.trial, task.attempt)',
        "task is None",
        "workers/test_pool.py::test_what_an_old_attempt_says_is_dropped",
    ),
    Break(
        "K8", "the lock is shared", "search/storage/storage.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "storage/test_storage.py::test_a_second_process_is_refused_and_told_who_holds_the_lock",
    ),
    Break(
        "S1", "a storage's failure is not tried again", "search/storage/patience.py",
        "            if not passes(error):\n                raise", "            raise",
        "storage/test_storage_faults.py::test_s1_a_transaction_that_fails_is_made_once",
    ),
    Break(
        "S1", "a trial whose answer was lost is made twice", "search/storage/patience.py",
        "if num_trials > self._num_before:", "if num_trials < self._num_before:",
        "storage/test_storage_faults.py::test_s1_a_trial_whose_answer_is_lost_is_made_once",
    ),
    Break(
        "S3", "a locked file is taken for a damaged one", "search/storage/sqlite_file.py",
        "                raise  # somebody writes: that says nothing of what is written\n",
        "                return str(error)\n",
        "storage/test_storage_faults.py::test_s3_a_locked_file_is_not_a_damaged_one",
    ),
    Break(
        "S5", "a damaged file is opened", "search/storage/sqlite_file.py",
        'return "it is empty" if path.stat().st_size == 0 else _quick_check(path)', 'return ""',
        "storage/test_storage.py::test_a_damaged_file_is_refused_and_left_as_it_is",
    ),
    Break(
        "S8", "another question is not refused", "search/run_record.py",
        "if name in stored and stored[name] != now[name]", "if False",
        "test_run_record.py::test_another_question_is_refused_and_the_differences_are_named",
    ),
    Break(
        "D1", "a file's hash is not compared", "search/data/fetching.py",
        "_hash(folder / file.name, file.hash) != file.hash",
        "_hash(folder / file.name, file.hash) is None",
        "data/test_datasets.py::test_a_wrong_file_is_fetched_again",
    ),
    Break(
        "N1", "a report that is not finite is sent", "search/workers/protocol.py",
        "        if not math.isfinite(value):\n            raise Diverged", 
        "        if value is None:\n            raise Diverged",
        "workers/test_protocol.py::test_a_value_that_is_not_finite_is_never_sent",
    ),
    Break(
        "N3", "others run beside a trial that ran out of memory", "search/coordinator.py",
        "if any(trial.is_alone for trial in self._running.values()):", "if False:",
        "test_coordinator.py::test_a_trial_out_of_memory_runs_once_more_alone",
    ),
    Break(
        "N3", "others run beside a winner's training that ran out of memory",
        "search/winners/retrain.py",
        "any(job.is_alone for job in running.values())", "False",
        "winners/test_retrain.py::test_a_job_out_of_memory_runs_once_more_alone",
    ),
    Break(
        "A1", "a save that is not atomic", "search/artifacts.py",
        'final.with_name(f".{final.stem}.{secrets.token_hex(4)}{PARTIAL}{final.suffix}")', "final",
        "test_artifacts.py::test_sigkill_leaves_the_old_or_the_new_file",
    ),
    Break(
        "A2", "an artifact is believed", "search/winners/retrain.py",
        "intact = path.is_file() and artifacts.sha256(path) == job.record[hash_name]",
        "intact = True",
        "winners/test_retrain.py::test_a_deleted_prediction_is_measured_again_without_training",
    ),
    Break(
        "X2", "links are followed", "search/artifacts.py",
        "    if path.is_symlink():\n", "    if False:\n",
        "test_artifacts.py::test_nothing_is_written_through_a_symlink",
    ),
    Break(
        "X4", "a refused URL is shown", "search/storage/storage.py",
        "{before[:20]!r}", "{url!r}",
        "storage/test_storage.py::test_any_other_url_is_refused_without_its_password",
    ),
    Break(
        "X6", "a study that anybody may write is run", "search/catalogue.py",
        "if file.stat().st_mode & stat.S_IWOTH:", "if False:",
        "test_machine_faults.py::test_x6_a_study_that_anybody_may_write_is_not_run",
    ),
)  # fmt: skip


def try_out(broken: Break, tree: Path) -> str:
    """Break a copy, run the test there, mend the copy; how it went."""
    file = tree / broken.file
    sound = file.read_text()
    if sound.count(broken.old) != 1:
        return f"does not apply: {broken.file} has it {sound.count(broken.old)} times"
    file.write_text(sound.replace(broken.old, broken.new))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, f"tests/search/{broken.test}"],
            cwd=tree, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "failed"  # it waited for what the build no longer does
    finally:
        file.write_text(sound)
    named = {0: "PASSED", 1: "failed"}
    return named.get(done.returncode, f"no result: {done.stdout.splitlines()[-1:]}")


def main() -> int:
    rows = sys.argv[1:]
    chosen = [broken for broken in BREAKS if not rows or broken.row in rows]
    print("| row | broken | test | seconds | result |\n|---|---|---|---|---|")
    is_well = True
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs"))
        for broken in chosen:
            began = time.monotonic()
            result = try_out(broken, tree)
            seconds = time.monotonic() - began
            test = broken.test.partition("::")[2]
            print(
                f"| {broken.row} | {broken.what} | {test} | {seconds:.0f} | {result} |", flush=True
            )
            is_well = is_well and result == "failed"
    return 0 if is_well else 1


if __name__ == "__main__":
    sys.exit(main())
