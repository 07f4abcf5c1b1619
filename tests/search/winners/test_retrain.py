"""Which winners are trained how long, on how many cores, and what is done again."""

import time
from pathlib import Path

import pytest

from search import artifacts
from search.errors import Interrupted, SearchError
from search.settings import Settings
from search.storage import storage
from search.view.progress import View
from search.winners.retrain import Retraining, jobs_of
from search.workers import devices
from tests.scripted import LOST, LOST_FOR_MEMORY, ScriptedPool

SPEED = {"fast": 1e6, "slow": 1.0}  # images/s of the trial: its retraining takes no time, or hours


def settings(**changed):
    return Settings(
        **{
            "name": "mine",
            "file": "mine.py",
            "kind": "space",
            "dataset": "digits",
            "epochs": 4,
            "final_epochs": None,
            "images_per_report": 1000,
            "batch_size": 10,
            "trials": 3,
            "sampler": "random",
            "pruner": "none",
            "first_rung": 1,
            "reduction_factor": 2,
            **changed,
        }
    )


@pytest.fixture
def study(tmp_path):
    """Three complete trials of 8 reports; trial 1 is the best, at its sixth report."""
    study = storage.at(f"sqlite:///{tmp_path}/study.db").open("mine")
    study.set_user_attr("run", {"num_reports": 8, "precision": "float32"})
    for value in (0.7, 0.9, 0.8):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        for step in range(1, 9):
            trial.report(value - abs(step - 6) / 100, step)
        study.tell(trial, value)
    return study


def retrain(study, folder, pool, speed="fast", save=None, **changed):
    made = settings(**changed)
    retraining = Retraining(
        jobs_of(study, made),
        made,
        images_per_epoch=2000,
        folder=folder,
        view=View(-1),
        save=save or (lambda job: study.set_user_attr(job.key, job.record)),
    )
    for job in retraining.jobs:
        job.images_per_second = SPEED[speed]
    retraining.run(pool)
    return retraining


def test_fewer_winners_than_were_asked_for_is_said(study, caplog):
    assert len(jobs_of(study, settings(top=3, seeds=1))) == 3
    assert not caplog.messages
    assert len(jobs_of(study, settings(top=5, seeds=1))) == 3
    (said,) = caplog.messages
    assert said.startswith("--top 5: no more than 3 trials are complete")


def worker(folder, pool):
    """Writes what a worker would, and notes the threads that it had."""

    def script(trial, attempt):
        return work(trial, pool.given[-1][2])

    def work(trial, task):
        slot = next(slot for slot in pool.slots if slot.task and slot.task.content is task)
        pool.threads.append((task["task"], slot.device.threads))
        path = folder / task["path"].removeprefix(str(folder) + "/")
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{task['task']} {trial} {task.get('seed')}")
        yield {
            "type": "finished",
            "outcome": "complete",
            "rss": 1,
            "sha256": artifacts.sha256(path),
            "pictures_sha256": pictures(task),
            "history": {"loss": [1.0]},
            "parameters": 7,
            "flops": 9,
            "epochs": 3.0,
            "kept_epochs": 3.0,
            "trained_on": "",
            "pretrained": False,
            "train": {},
            "validation": {},
        }

    return script


def pictures(task):
    if not task.get("pictures"):
        return None
    path = Path(task["pictures"])
    path.write_text(f"pictures {path.name}")
    return artifacts.sha256(path)


def pool_of(folder, num_slots=2):
    pool = ScriptedPool(None, num_slots)
    pool.threads = []
    pool._script = worker(folder, pool)
    return pool


def given(pool, task="retrain"):
    return [content for _, _, content in pool.given if content["task"] == task]


def test_the_best_trials_are_trained_with_each_seed(study, tmp_path):
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, top=2, seeds=3)
    assert [number for number, _, _ in pool.given[:6]] == [1, 1, 1, 2, 2, 2]
    assert len({content["seed"] for content in given(pool)}) == 6
    assert [content["task"] for _, _, content in pool.given[6:]] == ["evaluate"] * 6


@pytest.mark.parametrize(
    ("final_epochs", "epochs", "share"),
    [(None, 4, 6 / 8), (20, 20, 1.0)],  # as served it best on the trial's schedule; stretched
)
def test_how_long_a_winner_is_trained(study, tmp_path, final_epochs, epochs, share):
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, seeds=1, final_epochs=final_epochs)
    (content,) = given(pool)
    assert (content["epochs"], content["share"]) == (epochs, share)


@pytest.mark.parametrize(
    ("speed", "seeds", "threads"),
    [
        ("slow", 3, [1, 1, 2]),  # the third has the machine to itself
        ("slow", 1, [2]),
        ("slow", 4, [1, 1, 1, 1]),
        ("fast", 3, [1, 1, 1]),  # a new worker would cost more than it saves
    ],
)
def test_fewer_jobs_than_slots_share_all_cores(study, tmp_path, monkeypatch, speed, seeds, threads):
    monkeypatch.setattr(devices, "cores", lambda: 2)
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, speed, seeds=seeds)
    assert [count for task, count in pool.threads if task == "retrain"] == threads


def test_no_job_waits_for_others_where_there_are_no_more_threads_to_have(study, tmp_path):
    pool, busy = pool_of(tmp_path), []
    plain, pool.can_widen = pool._script, lambda: False
    pool.at_start = lambda: busy.append(len(pool.busy()))

    def words(num_steps, rest):
        for _ in range(num_steps):
            yield {"type": "progress"}
        yield from rest

    # The first takes longer.
    pool._script = lambda *given: words(5 if len(busy) == 1 else 0, plain(*given))
    retrain(study, tmp_path, pool, "slow", seeds=3)
    assert busy[:3] == [0, 1, 1]


def test_no_job_waits_for_a_slot_whose_worker_waits_for_a_node(study, tmp_path):
    pool, polls = pool_of(tmp_path), iter(range(100))

    def idle():
        assert next(polls, None) is not None, "it would wait for ever"
        return [slot for slot in pool.slots[1:] if slot.task is None]

    pool.idle = idle
    assert retrain(study, tmp_path, pool, seeds=1).is_done()


def test_what_is_there_is_not_done_again(study, tmp_path):
    retrain(study, tmp_path, pool_of(tmp_path), seeds=2)
    pool = pool_of(tmp_path)
    retraining = retrain(study, tmp_path, pool, seeds=3)
    assert [content["task"] for _, _, content in pool.given] == ["retrain", "evaluate"]
    assert retraining.is_done()


def test_another_length_is_trained_and_measured_again(study, tmp_path):
    retrain(study, tmp_path, pool_of(tmp_path), seeds=1)
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, seeds=1, final_epochs=9)
    assert [content["task"] for _, _, content in pool.given] == ["retrain", "evaluate"]


@pytest.mark.fault("A2")
def test_a_deleted_prediction_is_measured_again_without_training(study, tmp_path):
    retrain(study, tmp_path, pool_of(tmp_path), seeds=1)
    next((tmp_path / "evaluation").iterdir()).unlink()
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, seeds=1)
    assert [content["task"] for _, _, content in pool.given] == ["evaluate"]


def test_pictures_are_those_of_the_first_seed_and_made_again_where_missing(study, tmp_path):
    retraining = retrain(study, tmp_path, pool_of(tmp_path), seeds=2)
    first, second = (job.record for job in retraining.jobs)
    pictures = tmp_path / first["pictures"]
    assert first["pictures_sha256"] == artifacts.sha256(pictures)
    assert "pictures" not in second
    pictures.unlink()
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, seeds=2)
    assert [content["task"] for _, _, content in pool.given] == ["evaluate"]


def test_where_the_first_seed_diverges_the_pictures_are_those_of_the_next(study, tmp_path):
    pool = pool_of(tmp_path, num_slots=1)
    work = pool._script

    def diverges_first(trial, attempt):
        if pool.given[-1][2].get("path", "").endswith("trial-1-seed-0.keras"):
            yield {"type": "finished", "outcome": "diverged", "reason": "loss was nan", "rss": 1}
        yield from work(trial, attempt)

    pool._script = diverges_first
    retraining = retrain(study, tmp_path, pool, top=2, seeds=3)
    shown = {job.stem for job in retraining.jobs if "pictures" in job.record}
    assert shown == {"trial-1-seed-1", "trial-2-seed-0"}
    drawn = [Path(of["pictures"]).name for of in given(pool, "evaluate") if of["pictures"]]
    assert drawn == ["trial-1-seed-1-pictures.npz", "trial-2-seed-0-pictures.npz"]
    record = retraining.jobs[1].record
    assert record["pictures_sha256"] == artifacts.sha256(tmp_path / record["pictures"])


def test_a_seed_that_cannot_be_measured_has_diverged_and_the_next_gets_the_pictures(
    study, tmp_path
):
    pool = pool_of(tmp_path, num_slots=1)
    work = pool._script

    def not_finite(trial, attempt):
        task = pool.given[-1][2]
        if task["path"].endswith("trial-1-seed-0.npz"):
            reason = "outputs that are not finite for 3 of 10 test images"
            yield {"type": "finished", "outcome": "diverged", "reason": reason, "rss": 1}
        yield from work(trial, attempt)

    pool._script = not_finite
    first, second = retrain(study, tmp_path, pool, seeds=2).jobs
    assert first.record["diverged"].startswith("outputs that are not finite")
    assert "model" not in first.record
    assert "evaluation" in second.record
    assert second.record["pictures"] == "evaluation/trial-1-seed-1-pictures.npz"
    # Measured beside the first, which was to have them, it gets them from the same command.
    for name in ("pictures", "pictures_sha256"):
        del second.record[name]
    study.set_user_attr(second.key, second.record)
    pool = pool_of(tmp_path)
    _, second = retrain(study, tmp_path, pool, seeds=2).jobs
    assert [content["task"] for _, _, content in pool.given] == ["evaluate"]
    assert "pictures" in second.record


def test_another_precision_is_trained_and_measured_again(study, tmp_path):
    first = retrain(study, tmp_path, pool_of(tmp_path), seeds=1)
    assert first.jobs[0].record["precision"] == "float32"
    study.set_user_attr("run", {"num_reports": 8, "precision": "bfloat16"})
    pool = pool_of(tmp_path)
    again = retrain(study, tmp_path, pool, seeds=1)
    assert [content["task"] for _, _, content in pool.given] == ["retrain", "evaluate"]
    assert again.jobs[0].record["precision"] == "bfloat16"
    pool = pool_of(tmp_path)
    retrain(study, tmp_path, pool, seeds=1)
    assert pool.given == []


@pytest.mark.parametrize(("said", "low", "high"), [(4321.5, 4321.5, 4321.5), (None, 0.0, 60.0)])
def test_the_seconds_of_a_training_are_those_that_its_worker_says(study, tmp_path, said, low, high):
    pool = pool_of(tmp_path)
    work = pool._script

    def script(trial, attempt):
        for message in work(trial, attempt):
            yield message if said is None else {**message, "seconds": said}

    pool._script = script
    (job,) = retrain(study, tmp_path, pool, seeds=1).jobs
    assert low <= job.record["seconds"] <= high
    assert job.record["start"] == pytest.approx(time.time() - job.record["seconds"], abs=60)


def test_the_reports_before_a_training_that_goes_on_are_none_of_this_attempt_s(study, tmp_path):
    pool = pool_of(tmp_path, num_slots=1)
    work, seen = pool._script, []

    def script(trial, attempt):
        if pool.given[-1][2]["task"] == "retrain":
            pool.slots[0].status = {}  # as a pool does that gives a task
            yield {"type": "progress", "note": "activations: 1 of 2"}
            for step in (10, 11):
                yield {"type": "progress", "step": step, "of": 20}
                seen.append(dict(pool.slots[0].status))
        yield from work(trial, attempt)

    pool._script = script
    retrain(study, tmp_path, pool, seeds=1)
    assert [(status["step"], status["before"]) for status in seen] == [(10, 9), (11, 9)]


def test_a_lost_worker_s_job_runs_again_until_max_attempts(study, tmp_path):
    pool = pool_of(tmp_path, num_slots=1)
    work = pool._script

    def dies_once(trial, attempt):
        if attempt == 1:
            yield LOST
        yield from work(trial, attempt)

    pool._script = dies_once
    retrain(study, tmp_path, pool, seeds=1)
    assert [attempt for _, attempt, _ in pool.given] == [1, 2, 1, 2]

    def dies(trial, attempt):
        yield LOST

    pool._script = dies
    with pytest.raises(SearchError, match="trial-1-seed-1 lost its worker 3 times"):
        retrain(study, tmp_path, pool, seeds=2, max_attempts=3)


EXHAUSTED = {"type": "finished", "outcome": "out_of_memory", "reason": "no memory", "rss": 1}


@pytest.mark.fault("N3")
@pytest.mark.parametrize("task", ["retrain", "evaluate"])
@pytest.mark.parametrize("end", [EXHAUSTED, LOST_FOR_MEMORY])
def test_a_job_out_of_memory_runs_once_more_alone(study, tmp_path, caplog, task, end):
    caplog.set_level("INFO")
    pool = pool_of(tmp_path, num_slots=3)
    work = pool._script
    attempts = []  # of the second job

    def script(trial, attempt):
        content = pool.given[-1][2]
        is_second = content["task"] == task and "seed-1." in content["path"]
        if is_second:
            attempts.append(attempt)
        return say(work(trial, attempt), is_second, attempt)

    def say(words, is_second, attempt):
        if is_second and attempt == 1:
            yield end
        for _ in range(3):
            assert len(pool.busy()) == 1 or not (is_second and attempt == 2)
            yield {"type": "progress"}
        yield from words

    pool._script = script
    assert retrain(study, tmp_path, pool, seeds=6, max_attempts=1).is_done()
    assert attempts == [1, 2]
    assert len(pool.given) == 2 * 6 + 1
    assert "trial-1-seed-1 runs again alone: its worker" in caplog.text


@pytest.mark.fault("N3")
@pytest.mark.parametrize(
    ("end", "how"),
    [(EXHAUSTED, "its worker ran out of memory: no memory"),
     (LOST_FOR_MEMORY, "its worker ended by signal 9")],
)  # fmt: skip
def test_a_job_out_of_memory_alone_is_the_end(study, tmp_path, end, how):
    def script(trial, attempt):
        yield end

    pool = pool_of(tmp_path)
    pool._script = script
    message = rf"trial-1-seed-0 ran out of memory, with no other job beside it \({how}\); once"
    with pytest.raises(SearchError, match=message):
        retrain(study, tmp_path, pool, seeds=1)
    assert [attempt for _, attempt, _ in pool.given] == [1, 2]


@pytest.mark.fault("A3")
def test_a_checkpoint_is_kept_until_what_it_led_to_is_stored(study, tmp_path):
    checkpoint = tmp_path / "trial-1-seed-0.npz"
    checkpoint.touch()

    def interrupted(job):
        raise Interrupted(2)

    with pytest.raises(Interrupted):
        retrain(
            study, tmp_path, pool_of(tmp_path), save=interrupted, seeds=1, checkpoints=str(tmp_path)
        )
    assert checkpoint.exists()
    retrain(study, tmp_path, pool_of(tmp_path), seeds=1, checkpoints=str(tmp_path))
    assert not checkpoint.exists()


def test_a_diverged_seed_is_noted_and_not_measured(study, tmp_path):
    pool = pool_of(tmp_path, num_slots=1)
    work = pool._script

    def diverges_first(trial, attempt):
        if len(pool.given) == 1:
            yield {"type": "finished", "outcome": "diverged", "reason": "loss was nan", "rss": 1}
        yield from work(trial, attempt)

    pool._script = diverges_first
    retraining = retrain(study, tmp_path, pool, seeds=2)
    assert len(given(pool, "evaluate")) == 1
    assert retraining.jobs[0].record["diverged"] == "loss was nan"


@pytest.mark.parametrize(
    ("end", "why"),
    [({"outcome": "error", "reason": "no such layer"}, "no such layer"),
     ({"outcome": "pruned"}, "it ended as pruned")],
)  # fmt: skip
def test_a_job_that_fails_ends_the_run_with_the_reason(study, tmp_path, end, why):
    def script(trial, attempt):
        yield {"type": "finished", "rss": 1, **end}

    pool = pool_of(tmp_path)
    pool._script = script
    with pytest.raises(SearchError, match=f"trial-1-seed-0 failed: {why}"):
        retrain(study, tmp_path, pool, seeds=1)


def test_nothing_complete_is_nothing_usable(tmp_path):
    study = storage.at(f"sqlite:///{tmp_path}/study.db").open("mine")
    study.set_user_attr("run", {"num_reports": 8, "precision": "float32"})
    with pytest.raises(SearchError, match="no trial of 'mine' is complete") as caught:
        jobs_of(study, settings())
    assert caught.value.exit_code == 5
