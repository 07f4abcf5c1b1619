"""What a user takes away: metrics.json, configs of winners, the leaderboard as text.

metrics.json, schema 1:

    schema, study, study_file (None for an installed study),
    dataset {name, reference (a name or a path), sha256, input_shape, class_names},
    weights {reference, sha256, label} of pretrained ones, or None,
    training {precision, images_per_report, batch_size (where the space has none), average_weights,
        sampler, pruner, study_seed},
    search {trials, complete, pruned, fail, seconds (in which at least one trial ran; of a
        comparison those of all trainings, added up), saved_share, value_name},
    provenance {versions, backend, commit (None for an installed copy), hardware},
    winners: [{trial, params, validation_accuracy (or whatever the space's own `fit` returned, which
        search.value_name then calls "value"), epochs (trained), schedule_epochs (its learning
        rate's), share (of the schedule, that was to be trained), parameters, flops, seconds (of one
        training, the mean), weights (label of pretrained ones, or None), of a comparison also
        validated (True), train and validation {mean, std} of accuracy and loss, published
        {<figure>}, diverged (seed numbers), test {mean, std}, seeds: [{seed, model, model_sha256,
        evaluation, evaluation_sha256, test {<figure>, per_class, confusion_matrix}; the first also
        pictures, pictures_sha256 (search/winners/pictures.py)}]}],
    ensemble: the mean of the probabilities of all these models, {models, test}; None for fewer
        than two,
    diverged: winners of which no training ended soundly: [{trial, params, reason}],
    tested: how many models of this study have been measured on the test set, by now

Figures are fractions, losses in nats, times in seconds; std is that of a sample, over seeds.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from search import artifacts, catalogue, provenance, results
from search.data import datasets
from search.data.weights import RANDOM
from search.errors import EXIT_NOTHING_USABLE, EXIT_USAGE, SearchError
from search.settings import Settings, resolve
from search.winners import evaluation
from search.winners.retrain import Job, new_job, num_tested
from search.workers.pool import run_task


def metrics(
    study: optuna.Study, settings: Settings, jobs: list[Job], folder: Path
) -> dict[str, Any]:
    """All figures of a finished run, from what retraining has left on disk.

    Raises:
        SearchError: if every retraining diverged.
    """
    trials = study.get_trials(deepcopy=False)
    run = study.user_attrs["run"]
    seconds = results.Clock(trials).seconds
    if settings.kind == "comparison":  # whose trials know only of the seeds that they began with
        seconds = sum(job.record.get("seconds", 0.0) for job in jobs)
    return {
        "schema": 1,
        **subject(settings, run),
        "search": {
            "trials": sum(trial.state.is_finished() for trial in trials),
            **{
                state: sum(trial.state.name.lower() == state for trial in trials)
                for state in ("complete", "pruned", "fail")
            },
            "seconds": round(seconds, 1),
            "saved_share": round(results.saved_share(study), 4),
            "value_name": results.value_name(run),
        },
        **measured(jobs, run, settings, folder),
        "tested": num_tested(study),
        "provenance": provenance.collect(),
    }


def subject(settings: Settings, run: dict[str, Any]) -> dict[str, Any]:
    """What is trained on what, and how; `run` has dataset, precision and images_per_report, and
    what a search was told, if there was one."""
    told = {"sampler": settings.sampler, "pruner": settings.pruner} | run.get("told", {})
    return {
        "study": settings.name,
        "study_file": None if catalogue.is_installed(Path(settings.file)) else settings.file,
        "dataset": run["dataset"],
        "weights": run["weights"],
        "training": {
            "precision": run["precision"],
            "images_per_report": run["images_per_report"],
            "batch_size": settings.batch_size,
            "average_weights": settings.average_weights,
            "sampler": told["sampler"],
            "pruner": told["pruner"],
            "study_seed": settings.seed,
        },
    }


def measured(
    jobs: list[Job], run: dict[str, Any], settings: Settings, folder: Path
) -> dict[str, Any]:
    """The winners' figures and those of their ensemble, and what diverged with every seed; `run`
    has dataset, weights, pretrained and described.

    Raises:
        SearchError: if every retraining diverged.
    """
    by_trial: dict[int, list[Job]] = {}
    for job in jobs:
        by_trial.setdefault(job.trial, []).append(job)
    usable = [of for of in by_trial.values() if any("evaluation" in job.record for job in of)]
    if not usable:
        raise SearchError(
            f"every training diverged: {jobs[0].record['diverged']}; a smaller learning rate may "
            "help, or the next best trials of a search (--top)",
            exit_code=EXIT_NOTHING_USABLE,
        )
    class_names = run["dataset"]["class_names"]
    winners = [_winner(of, class_names, folder) | _origin(of, run, settings) for of in usable]
    return {
        "winners": sorted(winners, key=lambda winner: -(winner["validation_accuracy"] or 0.0)),
        "ensemble": _ensemble([job for of in usable for job in of], class_names, folder),
        "diverged": [
            {"trial": trial, "params": of[0].params, "reason": of[0].record["diverged"]}
            for trial, of in by_trial.items()
            if of not in usable
        ],
    }


def write(figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write metrics.json and one config for each winner, the first also as best.yaml."""
    artifacts.write_json(folder / "metrics.json", figures, inside=folder)
    written = [folder / "metrics.json"]
    for rank, winner in enumerate(figures["winners"]):
        text = to_yaml(config(winner, figures))
        names = [f"trial-{winner['trial']}.yaml", *(["best.yaml"] if rank == 0 else [])]
        for name in names:
            artifacts.write_text(folder / "configs" / name, text, inside=folder)
            written.append(folder / "configs" / name)
    return written


def config(winner: dict[str, Any], figures: dict[str, Any]) -> dict[str, Any]:
    """All that is needed to train a winner again, and what it reached."""
    return {
        "study": figures["study"],
        "study_file": figures["study_file"],
        "trial": winner["trial"],
        "params": winner["params"],
        "training": {
            "epochs": winner["epochs"],
            "schedule_epochs": winner["schedule_epochs"],
            "share": winner["share"],
            "validated": winner["validated"],
            "seeds": [seed["seed"] for seed in winner["seeds"]],
            **figures["training"],
        },
        "dataset": figures["dataset"],
        "weights": figures["weights"],
        "validation": {"accuracy": winner["validation_accuracy"]},
        "test": winner["test"],
        "provenance": figures["provenance"],
    }


def leaderboard(study: optuna.Study, trials: Sequence[FrozenTrial], format_: str) -> str:
    """Trials of a study as text: "yaml", "json" or "csv"."""
    run = study.user_attrs.get("run", {})
    value_name = results.value_name(run).replace(" ", "_")
    rows = []
    for trial in trials:
        label = results.begun_from(run, trial.number, trial.user_attrs)
        rows.append(
            {
                "trial": trial.number,
                value_name: _value(trial),
                **({"weights": label} if label else {}),
                "params": trial.params,
            }
        )
    if format_ == "yaml":
        return to_yaml(rows)
    if format_ == "json":
        return json.dumps(rows, indent=2) + "\n"
    return _to_csv(rows)


def script(study: optuna.Study, trial: FrozenTrial, file: Path, options: dict[str, Any]) -> str:
    """A trial as a stand-alone Keras script, trained as a winner is.

    Args:
        file: of the study.
        options: of the run.

    Raises:
        SearchError: if a part of the model can't be written as code; it names the part.
    """
    run = study.user_attrs["run"]
    if not run.get("dataset"):
        raise SearchError(
            f"study {study.study_name!r} has an objective of its own: there is no model to write",
            exit_code=EXIT_USAGE,
        )
    settings = resolve(run["described"], str(file), options)
    job = new_job(trial, 0, settings, run["num_reports"])
    record = study.user_attrs.get(job.key, job.record)
    value = _value(trial)
    said = "" if value is None else f", {results.value_name(run)} {results.decimal(value)}"
    data = {name: run["dataset"][name] for name in ("name", "reference", "input_shape")}
    task = {
        "task": "script",
        "title": f"Trial {trial.number} of study {study.study_name}{said}",
        "params": trial.params,
        "seed": job.seed,
        "epochs": record["epochs"],
        "share": record["share"],
        "validated": record.get("validated", False),
        "kept_epochs": record.get("kept_epochs"),
        "num_images": run["num_images"],
        "images_per_report": run["images_per_report"],
        "data": {**data, "num_classes": len(run["dataset"]["class_names"])},
    }
    prepared = {**dataclasses.asdict(settings), "precision": run["precision"]}
    return str(run_task(file, prepared, task)["text"])


def to_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _winner(jobs: list[Job], class_names: Sequence[str], folder: Path) -> dict[str, Any]:
    measured = [job for job in jobs if "evaluation" in job.record]
    seeds = [_seed(job, class_names, folder) for job in measured]
    return {
        "trial": jobs[0].trial,
        "params": jobs[0].params,
        "validation_accuracy": _mean([job.value for job in measured if job.value is not None]),
        "epochs": round(_mean([job.record["trained_epochs"] for job in measured]) or 0.0, 3),
        "schedule_epochs": measured[0].record["epochs"],
        "share": measured[0].record["share"],
        "parameters": measured[0].record["parameters"],
        "flops": measured[0].record["flops"],
        "seconds": round(_mean([job.record["seconds"] for job in measured]) or 0.0, 1),
        "validated": measured[0].record.get("validated", False),
        **{
            part: evaluation.summarise([job.record[part] for job in measured])
            for part in ("train", "validation")
            if measured[0].record[part]
        },
        "test": evaluation.summarise([seed["test"] for seed in seeds]),
        "seeds": seeds,
        "diverged": [job.index for job in jobs if "diverged" in job.record],
    }


def _origin(jobs: list[Job], run: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """What a winner began from, and what was published of it: nothing that compares with a figure
    from other data, or from random weights instead of pretrained ones."""
    described = run["described"]
    own_data = datasets.resolve(described["dataset"], Path(settings.file).parent)
    is_same_data = run["dataset"]["reference"] == own_data
    trained = next(job.record for job in jobs if "evaluation" in job.record)
    label = results.begun_from(run, jobs[0].trial, trained) or None
    figures = {}
    if settings.kind == "comparison" and described["published"] and is_same_data:
        figures = described["published"][jobs[0].trial]
    return {"weights": label, "published": {} if label == RANDOM else figures}


def _value(trial: FrozenTrial) -> float | None:
    """Of a trial that was pruned, Optuna takes the last report for the value."""
    return trial.value if trial.state == TrialState.COMPLETE else None


def _mean(values: list[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _seed(job: Job, class_names: Sequence[str], folder: Path) -> dict[str, Any]:
    names = ("seed", "model", "model_sha256", "evaluation", "evaluation_sha256")
    pictures = [name for name in ("pictures", "pictures_sha256") if name in job.record]
    with np.load(folder / job.record["evaluation"]) as saved:
        test = evaluation.measure(saved["probabilities"], saved["labels"], class_names)
    return {**{name: job.record[name] for name in (*names, *pictures)}, "test": test}


def _ensemble(jobs: list[Job], class_names: Sequence[str], folder: Path) -> dict[str, Any] | None:
    """The soft vote of all models, each with the same weight."""
    votes = []
    for job in jobs:
        if "evaluation" in job.record:
            with np.load(folder / job.record["evaluation"]) as saved:
                votes.append(saved["probabilities"])
                labels = saved["labels"]
    if len(votes) < 2:
        return None
    test = evaluation.measure(np.mean(votes, axis=0), labels, class_names)
    return {"models": len(votes), "test": test}


def _to_csv(rows: list[dict[str, Any]]) -> str:
    # Columns, which a hyperparameter's name may not take.
    own = {name for row in rows for name in row} - {"params"}
    flat = [
        {name: row[name] for name in row if name in own}
        | {f"params_{k}" if k in own else k: v for k, v in row["params"].items()}
        for row in rows
    ]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
