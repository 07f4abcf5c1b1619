"""What a user takes away: metrics.json, configs of winners, the leaderboard as text.

metrics.json, schema 1:

    schema, study, dataset {name, sha256},
    training {precision, images_per_report, batch_size (where the space has none), sampler, pruner,
        study_seed},
    search {trials, complete, pruned, fail, seconds, saved_share},
    provenance {versions, backend, commit (None for an installed copy), hardware},
    winners: [{trial, params, validation_accuracy, epochs (trained), schedule_epochs, parameters,
        diverged (seed numbers), test {mean, std}, seeds: [{seed, model, model_sha256, evaluation,
        evaluation_sha256, test {<figure>, per_class, confusion_matrix}}]}]

Figures are fractions, losses in nats, times in seconds; std is that of a sample, over seeds.
"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from search import artifacts, datasets, evaluation, provenance, results
from search.errors import EXIT_NOTHING_USABLE, SearchError
from search.retrain import Job
from search.settings import Settings


def metrics(
    study: optuna.Study, settings: Settings, jobs: list[Job], folder: Path
) -> dict[str, Any]:
    """All figures of a finished run, from what retraining has left on disk.

    Raises:
        SearchError: if every seed of a winner diverged.
    """
    by_trial: dict[int, list[Job]] = {}
    for job in jobs:
        by_trial.setdefault(job.trial.number, []).append(job)
    usable = [of for of in by_trial.values() if any("evaluation" in job.record for job in of)]
    if not usable:
        raise SearchError(
            f"every retraining diverged: {jobs[0].record['diverged']}; try --final-epochs or "
            "a larger --top",
            exit_code=EXIT_NOTHING_USABLE,
        )
    trials = study.get_trials(deepcopy=False)
    run = study.user_attrs["run"]
    return {
        "schema": 1,
        "study": settings.name,
        "dataset": {"name": settings.dataset, "sha256": run["dataset_sha256"]},
        "training": {
            "precision": run["precision"],
            "images_per_report": settings.images_per_report,
            "batch_size": settings.batch_size,
            "sampler": settings.sampler,
            "pruner": settings.pruner,
            "study_seed": settings.seed,
        },
        "search": {
            "trials": sum(trial.state.is_finished() for trial in trials),
            **{
                state: sum(trial.state.name.lower() == state for trial in trials)
                for state in ("complete", "pruned", "fail")
            },
            "seconds": round(results.search_seconds(study), 1),
            "saved_share": round(results.saved_share(study), 4),
        },
        "winners": [_winner(of, settings, folder) for of in usable],
        "provenance": provenance.collect(),
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
        "trial": winner["trial"],
        "params": winner["params"],
        "training": {
            "epochs": winner["epochs"],
            "schedule_epochs": winner["schedule_epochs"],
            "seeds": [seed["seed"] for seed in winner["seeds"]],
            **figures["training"],
        },
        "dataset": figures["dataset"],
        "validation": {"accuracy": winner["validation_accuracy"]},
        "test": winner["test"],
        "provenance": figures["provenance"],
    }


def leaderboard(study: optuna.Study, top: int, format_: str) -> str:
    """The best `top` complete trials as text.

    Raises:
        SearchError: if no trial is complete.
    """
    best = results.winners(study, top)
    if not best:
        raise SearchError(
            f"no trial of {study.study_name!r} is complete yet: there is nothing to export",
            exit_code=EXIT_NOTHING_USABLE,
        )
    rows = [
        {"trial": trial.number, "validation_accuracy": trial.value, "params": trial.params}
        for trial in best
    ]
    if format_ == "yaml":
        return to_yaml(rows)
    if format_ == "json":
        return json.dumps(rows, indent=2) + "\n"
    return _to_csv(rows)


def to_yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def _winner(jobs: list[Job], settings: Settings, folder: Path) -> dict[str, Any]:
    trial = jobs[0].trial
    measured = [job for job in jobs if "evaluation" in job.record]
    names = datasets.find(settings.dataset).class_names
    seeds = [_seed(job, names, folder) for job in measured]
    return {
        "trial": trial.number,
        "params": trial.params,
        "validation_accuracy": trial.value,
        "epochs": round(measured[0].record["trained_epochs"], 3),
        "schedule_epochs": measured[0].record["epochs"],
        "parameters": measured[0].record["parameters"],
        "test": evaluation.summarise([seed["test"] for seed in seeds]),
        "seeds": seeds,
        "diverged": [job.index for job in jobs if "diverged" in job.record],
    }


def _seed(job: Job, class_names: tuple[str, ...], folder: Path) -> dict[str, Any]:
    names = ("seed", "model", "model_sha256", "evaluation", "evaluation_sha256")
    with np.load(folder / job.record["evaluation"]) as saved:
        test = evaluation.measure(saved["probabilities"], saved["labels"], class_names)
    return {**{name: job.record[name] for name in names}, "test": test}


def _to_csv(rows: list[dict[str, Any]]) -> str:
    flat = [{**{k: v for k, v in row.items() if k != "params"}, **row["params"]} for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()
