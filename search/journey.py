"""The whole journey: data, search, winners, figures. Each step goes on where it was left.

with View() as view:
    outcome = run("cnn", Path("runs/cnn"), {"trials": 100}, view)
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from search import artifacts, catalogue, folders, results, run_record, signals
from search.coordinator import Coordinator
from search.data import datasets, verified
from search.errors import (
    EXIT_DAMAGED,
    EXIT_NOTHING_USABLE,
    EXIT_STORAGE_LOST,
    EXIT_USAGE,
    Interrupted,
    SearchError,
)
from search.report import drawing
from search.settings import Settings, resolve
from search.storage import storage
from search.view import notes
from search.view.progress import View
from search.view.trial_logs import Logs, open_logs
from search.winners import comparison, export
from search.winners.retrain import Job, Retraining, count_tested, jobs_of
from search.workers import devices
from search.workers.engine import Engine
from search.workers.local import LocalEngine
from search.workers.pool import Pool

logger = logging.getLogger("search")

# Seconds that the report of an interrupted run may take; `fmnist-search report` has as long as it
# needs. Measured on one core: 2 s for 100 trials, 4 s for 2 000.
_LAST_REPORT = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a run has come to."""

    folder: Path
    url: str
    settings: Settings
    num_finished: int
    best: results.Row | None  # complete trial
    metrics: dict[str, Any] | None  # None where nothing was retrained


def run(
    reference: str, folder: Path, options: dict[str, Any], view: View, *, final: bool = True
) -> Outcome:
    """Search a study and test its winners, or go on with what is there.

    Args:
        reference: a study's name, or the path of its file.
        folder: of the run; made where missing.
        options: of `Settings`, where not None; also workers, storage, and search (False: start no
            trial, retrain only).
        view: shows what happens.
        final: retrain and test the winners.

    Raises:
        SearchError: for what the user can mend.
        Interrupted: after a signal; all that was said is stored.
    """
    entry = catalogue.find(reference)
    if options.get("dataset"):
        datasets.find(datasets.resolve(options["dataset"], Path.cwd()))
    database = storage.at(storage.url_in(folder, options.get("storage")))
    _refuse_cluster_options(options)
    if options.get("engine") != "ray":
        devices.share_out(*devices.asked_for(options))  # refused before all else
    with ExitStack() as held:
        held.enter_context(folders.umask(folders.PRIVATE))
        folders.refuse_links(folder)
        folders.check(folder, "--out")
        database.check()
        held.enter_context(storage.lock(folder / folders.LOCK))
        held.enter_context(database.lock(entry.name))
        view.log_to(folder / "search.log")
        try:
            with database.failures_named():
                return _Journey(entry, folder, database, options, view).go(final)
        except (SearchError, Interrupted) as error:
            logger.debug("ended: %s", error)  # for the file: the command line says it itself
            raise


class _Journey:
    """One run, holding the locks."""

    def __init__(
        self,
        entry: catalogue.Entry,
        folder: Path,
        database: storage.Database,
        options: dict[str, Any],
        view: View,
    ):
        self._entry = entry
        self._folder = folder
        self._options = options
        self._view = view
        self._database = database
        self._snapshots = database.snapshots()
        # To read only, until it is known that this run belongs to it.
        self._study = database.read(entry.name)
        self._has_begun = False  # what this run was asked is stored

    def go(self, final: bool) -> Outcome:
        if outcome := self._already_done(final):
            if self._options.get("log"):
                logger.warning("--log writes of trials while they run: all are finished")
            if not drawing.is_drawn(self._begun, self._folder, self._entry.summary):
                self._report()
            return outcome
        try:
            outcome = self._run_what_is_missing(final)
        except Interrupted:
            # Its workers are gone and all is stored: what is left may take a moment, not more.
            self._last_report()
            raise
        except SearchError as error:
            if error.exit_code not in (EXIT_STORAGE_LOST, EXIT_DAMAGED):
                with suppress(Interrupted):  # what went wrong is said whatever happens
                    self._last_report()
            raise
        self._report()
        return outcome

    def _last_report(self) -> None:
        if self._has_begun:
            self._report(_LAST_REPORT)

    def _run_what_is_missing(self, final: bool) -> Outcome:
        if self._study is None:
            self._refuse_folder_of_another()
        folders.clean(self._folder)
        opening = {"type": "open", "file": str(self._entry.file)}
        engine = self._engine()
        with closing(engine):
            devices_ = engine.devices(*devices.asked_for(self._options))
            pool = Pool(engine, devices_, opening, self._options.get("silence"))
            return self._run_on(pool, final)

    def _refuse_folder_of_another(self) -> None:
        """Models are named by trials' numbers: another study's would be overwritten."""
        names = set() if self._options.get("storage") else set(self._database.names())
        metrics = artifacts.read_json(self._folder / "metrics.json") or {}
        names.add(metrics.get("study", self._entry.name))
        if others := sorted(names - {self._entry.name}):
            raise SearchError(
                f"{self._folder} holds a run of study {others[0]!r}, whose models would be "
                "overwritten; take another --out",
                exit_code=EXIT_USAGE,
            )

    def _engine(self) -> Engine:
        if self._options.get("engine") != "ray":
            return LocalEngine(self._folder / "logs")
        from search.workers.ray import RayEngine

        return RayEngine(
            self._folder,
            self._entry.file,
            address=self._options.get("address"),
            shared=self._options.get("shared"),
            insecure=bool(self._options.get("allow_insecure_ray")),
        )

    def _checkpoints(self) -> Path | None:
        """Where the state of trainings is kept so that any worker can go on; None for nowhere."""
        if self._options.get("engine") != "ray":
            return self._folder / folders.CHECKPOINTS
        shared = self._options.get("shared")
        own = hashlib.sha256(str(self._folder.absolute()).encode()).hexdigest()[:8]
        return shared and Path(shared) / f"{self._entry.name}-{own}-{folders.CHECKPOINTS}"

    def _run_on(self, pool: Pool, final: bool) -> Outcome:
        logs = open_logs(self._options.get("log"), self._folder)
        with signals.ending(pool), closing(logs), pool:
            self._view.begin("starting workers", 0)
            self._view.refresh(pool.slots)
            settings = self._begin(pool)
            if settings.kind == "comparison":
                self._compare(pool, settings)
            elif self._options.get("search") is not False:
                self._search(pool, settings, logs)
            if final and settings.kind != "objective":
                retraining = self._retraining(settings)
                folders.check(self._folder, "--out")  # the search may have filled the disk
                retraining.run(pool)
                # Trials that an interruption or a spent time budget left running need theirs.
                is_over = not self._is_any_running()
                folders.remove_scratch(self._folder, checkpoints=is_over)
                if is_over and (checkpoints := self._checkpoints()):
                    shutil.rmtree(checkpoints, ignore_errors=True)
                for job in retraining.jobs:
                    logs.history(job.stem, job.record.get("history", {}), job.params)
                figures = self._write(settings, retraining.jobs)
                if pool.interrupted:  # while it drew, which asks no worker
                    raise Interrupted(pool.interrupted)
                return self._outcome(settings, figures)
        return self._outcome(settings, None)

    def _already_done(self, final: bool) -> Outcome | None:
        """The outcome, without starting a worker, where nothing is left to do."""
        if (outcome := self._as_stored(final)) is None:
            return None
        with signals.interruptible(None):  # it may read gigabytes
            has_changed = verified.has_changed(outcome.settings, self._begun.user_attrs["run"])
        return None if has_changed else outcome

    def _as_stored(self, final: bool) -> Outcome | None:
        """The outcome, if study and folder hold all of it."""
        run = self._run()
        if run is None or run["file_sha256"] != artifacts.sha256(self._entry.file):
            return None
        settings = self._settings(run["described"])
        if self._num_finished() < settings.trials or not results.winners(self._begun, 1):
            return None
        if not final or settings.kind == "objective":
            return self._outcome(settings, None)
        stored = self._begun.user_attrs.get("artifacts", {})
        if not stored or not all(
            (self._folder / name).is_file() and artifacts.sha256(self._folder / name) == sha256
            for name, sha256 in stored.items()
        ):
            return None
        if settings.precision not in ("auto", run["precision"]):
            return None
        retraining = self._retraining(settings)
        measured = self._begun.user_attrs.get("measured")
        if not retraining.is_done() or measured != self._measured(retraining.jobs):
            return None
        return self._outcome(settings, artifacts.read_json(self._folder / "metrics.json"))

    def _begin(self, pool: Pool) -> Settings:
        """Check that it is the study that it was, fetch the data; nothing is stored before."""
        described = pool.wait_for_description()
        if described["name"] != self._entry.name:
            raise SearchError(
                f"{self._entry.file} names its study {described['name']!r} when it runs and "
                f"{self._entry.name!r} as written; write the name out"
            )
        settings = self._settings(described)
        is_objective = settings.kind == "objective"
        named = settings
        with signals.interruptible(None):  # a download, or thousands of images to decode
            dataset = None if is_objective else verified.described_data(settings.dataset)
            settings, pretrained = verified.with_weights(settings)
        pool.prepare(dataclasses.asdict(settings))
        ready = pool.wait_for_space()
        run = self._run()
        if run:
            names = self._entry.name, str(self._folder)
            run_record.refuse_another(run, ready, dataset, pretrained, *names)
        self._study = self._database.open(self._entry.name, wait=pool.wait)
        record = run_record.record(
            run,
            self._entry.file,
            described,
            ready,
            named,
            dataset=dataset,
            pretrained=pretrained,
            workers=None if self._options.get("engine") == "ray" else len(pool.slots),
            searches=self._num_finished() < settings.trials,
        )
        self._study.set_user_attr("run", record)
        self._has_begun = True
        for line in run_record.changed(run, record):
            logger.warning(line)
        notes.name_metric(self._study)
        logger.info(
            "study %s: %d trials, %s%s, %d %s%s",
            settings.name,
            settings.trials,
            dataset["name"] if dataset else "own objective",
            f", {pretrained['label']}" if pretrained else "",
            len(pool.slots),
            "workers" if len(pool.slots) > 1 else "worker",
            f", {ready['precision']}" if ready["precision"] else "",
        )
        if not self._snapshots:
            logger.info(
                "%s keeps no snapshots here: back it up as a database", self._database.label
            )
        _warn_of_unseen_gpus(pool, ready)
        return settings

    def _settings(self, described: dict[str, Any]) -> Settings:
        settings = resolve(described, str(self._entry.file), self._options)
        checkpoints = self._checkpoints()
        settings = dataclasses.replace(
            settings,
            folder=str(self._folder.absolute()),
            checkpoints=str(checkpoints.absolute()) if checkpoints else "",
        )
        if run := self._run():
            run_record.refuse_differences(
                run["fixed"], settings.fixed(), settings.name, str(self._folder)
            )
            kept = {name: run["told"][name] for name in run_record.OF_WINNERS}
            settings = dataclasses.replace(
                settings,
                **{n: v for n, v in kept.items() if v is not None and self._options.get(n) is None},
            )
        if self._options.get("search") is False:
            settings = dataclasses.replace(settings, trials=self._num_finished())
            if settings.kind == "objective":
                raise SearchError(
                    f"study {settings.name!r} has an objective of its own: there is no model to "
                    "retrain",
                    exit_code=EXIT_USAGE,
                )
        return settings

    def _search(self, pool: Pool, settings: Settings, logs: Logs) -> None:
        study, run = self._begun, self._run()
        assert run is not None
        self._view.begin("searching", settings.trials, run["num_reports"])
        for row in sorted(results.rows(study), key=lambda row: row.number):
            if row.state in ("complete", "pruned", "fail"):
                self._view.finished(
                    row.state, row.number, row.value, reports=row.reports, seconds=row.seconds
                )
        self._view.saves(results.saved_share(study))
        points = run["known_points"]
        Coordinator(study, settings, points, self._view, logs, self._snapshots).search(pool)
        self._take_snapshot()
        if self._num_finished() >= settings.trials and not results.winners(study, 1):
            raise SearchError(
                f"all {settings.trials} trials of {settings.name!r} are finished and none is "
                f"complete: {results.SHOW} says why; more --trials or another space may help",
                exit_code=EXIT_NOTHING_USABLE,
            )

    def _compare(self, pool: Pool, settings: Settings) -> None:
        study = self._begun

        def save(job: Job) -> None:
            study.set_user_attr(job.key, job.record)
            for number in comparison.tell(study, retraining.jobs):
                trial = study.trials[number]
                logger.info("%s: %s", trial.params, trial.value)

        retraining = self._retraining(settings, save)
        retraining.train(pool)
        comparison.tell(study, retraining.jobs)  # those whose last word a kill has cut off

    def _take_snapshot(self) -> None:
        if self._snapshots:
            self._snapshots.take()

    def _retraining(
        self, settings: Settings, save: Callable[[Job], None] | None = None
    ) -> Retraining:
        study, run = self._begun, self._run()
        assert run is not None
        jobs = comparison.jobs_of if settings.kind == "comparison" else jobs_of

        keep = save or (lambda job: study.set_user_attr(job.key, job.record))

        def saved(job: Job) -> None:
            keep(job)
            count_tested(study, job.record)
            if self._snapshots:
                self._snapshots.take_if_due()

        return Retraining(
            jobs(study, settings),
            settings,
            images_per_epoch=run["images_per_epoch"],
            folder=self._folder,
            view=self._view,
            save=saved,
        )

    def _write(self, settings: Settings, jobs: list[Job]) -> dict[str, Any]:
        study = self._begun
        figures = export.metrics(study, settings, jobs, self._folder)
        written = export.write(figures, self._folder)
        study.set_user_attr(
            "artifacts",
            {str(path.relative_to(self._folder)): artifacts.sha256(path) for path in written},
        )
        notes.save_answer(study, figures)
        if plots := drawing.plots(study, self._folder):
            notes.save_plots(study, plots)
        study.set_user_attr("measured", self._measured(jobs))
        self._take_snapshot()
        return figures

    def _report(self, seconds: float | None = None) -> None:
        drawing.draw(self._begun, self._folder, self._entry.summary, seconds)

    def _measured(self, jobs: list[Job]) -> dict[str, Any]:
        """What metrics.json was made from: made again when any of it is another."""
        evaluations = {job.stem: job.record.get("evaluation_sha256") for job in jobs}
        return {"trials": self._num_finished(), "evaluations": evaluations}

    @property
    def _begun(self) -> optuna.Study:
        """The study, where there is known to be one."""
        assert self._study is not None
        return self._study

    def _run(self) -> dict[str, Any] | None:
        return run_record.of(self._study, self._folder)

    def _num_finished(self) -> int:
        if self._study is None:
            return 0
        return sum(trial.state.is_finished() for trial in self._study.get_trials(deepcopy=False))

    def _is_any_running(self) -> bool:
        return bool(self._begun.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))

    def _outcome(self, settings: Settings, figures: dict[str, Any] | None) -> Outcome:
        best, url = results.best(self._begun), self._database.url
        if self._options.get("search") is False:  # what the search was to have
            trials = self._begun.user_attrs["run"]["told"]["trials"]
            settings = dataclasses.replace(settings, trials=trials)
        return Outcome(self._folder, url, settings, self._num_finished(), best, figures)


def _refuse_cluster_options(options: dict[str, Any]) -> None:
    names = ("address", "shared", "allow_insecure_ray")
    if options.get("engine") != "ray" and (given := [n for n in names if options.get(n)]):
        raise SearchError(
            f"--{given[0].replace('_', '-')} is of use with --engine ray only",
            exit_code=EXIT_USAGE,
        )


def _warn_of_unseen_gpus(pool: Pool, ready: dict[str, Any]) -> None:
    if pool.slots[0].device.gpu is not None and ready["precision"] and not ready["gpus"]:
        logger.warning(
            "this machine has a GPU that Keras does not see, so the search runs on cores; "
            "install with: pip install '.[cuda]'"
        )
