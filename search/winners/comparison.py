"""Named points, trained as they are: no search, no pruning, the test set once.

A study with `compare` has a trial for each of its known points, told when the point has been
trained with every seed; its value is the mean over the seeds. The trainings are those of
search/winners/retrain.py, but on the training part, with the validation part watched.
"""

from __future__ import annotations

import statistics
from typing import Any

import optuna
from optuna.trial import TrialState

from search import results
from search.sampling import seed_for
from search.settings import Settings
from search.winners.retrain import Job


def jobs_of(study: optuna.Study, settings: Settings) -> list[Job]:
    """Every known point times the seeds, with what is stored of them; the best first, once all have
    been trained."""
    stored = study.user_attrs
    points = stored["run"]["known_points"]
    ranked = [trial.number for trial in results.winners(study, None)]
    order = ranked if len(ranked) == len(points) else range(len(points))
    jobs = []
    for index in range(settings.seeds):  # a first figure of every point before a second of any
        for number in order:
            job = Job(
                number,
                index,
                seed_for(settings.seed, "winner", number, index),
                points[number],
                None,
                1.0,
                {"epochs": settings.epochs, "share": 1.0, "validated": True},
            )
            job.take(stored)
            job.value = job.record.get("validation", {}).get("accuracy")
            jobs.append(job)
    return jobs


def tell(study: optuna.Study, jobs: list[Job]) -> list[int]:
    """Store a trial for each point, in their order, of which all seeds have been trained.

    Returns:
        The numbers of the new ones.
    """
    points = study.user_attrs["run"]["known_points"]
    told = len(study.get_trials(deepcopy=False))
    for number in range(told, len(points)):
        of_point = [job for job in jobs if job.trial == number]
        if not all({"model", "diverged"} & job.record.keys() for job in of_point):
            return list(range(told, number))
        study.add_trial(_trial(of_point, points))
    return list(range(told, len(points)))


def _trial(jobs: list[Job], points: list[dict[str, Any]]) -> optuna.trial.FrozenTrial:
    trained = [job.record for job in jobs if "model" in job.record]
    attempts = [
        {
            "start": record["start"],
            "end": record["start"] + record["seconds"],
            "reason": "complete",
        }
        for record in trained
    ]
    attrs: dict[str, Any] = {"attempts": attempts, "seeds": len(trained)}
    curve: dict[int, float] = {}
    if trained:
        attrs |= {name: trained[0][name] for name in ("parameters", "flops")}
        attrs["seconds"] = sum(record["seconds"] for record in trained)
        curve = dict(enumerate(trained[0]["history"].get("val_accuracy", []), 1))
    else:
        attrs["reason"] = f"diverged: {jobs[0].record['diverged']}"
    params = jobs[0].params
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE if trained else TrialState.FAIL,
        value=statistics.mean(r["validation"]["accuracy"] for r in trained) if trained else None,
        params=params,
        distributions={
            # Those of the points alone: nothing else is ever drawn.
            name: optuna.distributions.CategoricalDistribution(
                list(dict.fromkeys(point[name] for point in points if name in point))
            )
            for name in params
        },
        intermediate_values=curve,
        user_attrs=attrs,
    )
