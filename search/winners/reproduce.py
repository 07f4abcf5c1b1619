"""Train an exported config again, anywhere, and put its figures beside those of the file.

fmnist-search train configs/best.yaml
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from search import artifacts, catalogue, folders, provenance, signals
from search.data import verified
from search.errors import EXIT_DAMAGED, EXIT_USAGE, SearchError
from search.sampling import seed_for
from search.settings import resolve
from search.storage import storage
from search.view.progress import View
from search.winners import export
from search.winners.retrain import Job, Retraining
from search.workers import devices
from search.workers.local import LocalEngine
from search.workers.pool import Pool

logger = logging.getLogger("search")

# What a config must hold, and of which type; configs/*.yaml of a run do.
_RULE: dict[str, Any] = {
    "study": str,
    "trial": int,
    "params": dict,
    "training": {
        "schedule_epochs": (int, float),
        "share": (int, float),
        "seeds": list,
        "precision": str,
        "images_per_report": int,
        "batch_size": int,
        "average_weights": bool,
        "study_seed": int,
    },
    "dataset": {"name": str, "reference": str, "sha256": str},
    "validation": {"accuracy": (int, float, type(None))},
    "test": {"mean": dict, "std": dict},
}


def read_config(path: Path) -> dict[str, Any]:
    """A config as `fmnist-search` writes it.

    Raises:
        SearchError: if the file is missing, no YAML, or lacks something; it names the entry.
    """
    import yaml

    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise SearchError(
            f"{path} can't be read: {error.strerror}; give a file such as "
            "runs/cnn/configs/best.yaml",
            exit_code=EXIT_USAGE,
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SearchError(f"{path} is no YAML file: {error}", exit_code=EXIT_DAMAGED) from None
    _check(config, _RULE, path, "")
    seeds = config["training"]["seeds"]
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise SearchError(
            f"{path}: training.seeds is a list of whole numbers. Received: {str(seeds)[:80]}",
            exit_code=EXIT_DAMAGED,
        )
    return dict(config)


def train(path: Path, folder: Path, options: dict[str, Any], view: View) -> dict[str, Any]:
    """Train and measure a config's point; interrupted, the same call goes on.

    Args:
        path: of the config.
        folder: where models, predictions and metrics.json go.
        options: where not None: study (a name or file, else the config's), dataset, seeds (how
            many, else as many as the config's), precision, workers, max_attempts.
        view: shows what happens.

    Returns:
        The content of metrics.json: what `export.metrics` makes, without `search`; and `config`,
        the file that it came from.

    Raises:
        SearchError: for what the user can mend.
    """
    config = read_config(path)
    _refuse_another_config(config, folder)
    entry = catalogue.find(options.get("study") or config.get("study_file") or config["study"])
    devices_ = devices.share_out(*devices.asked_for(options))
    folders.refuse_links(folder)
    with folders.umask(folders.PRIVATE), ExitStack() as held:
        folders.check(folder, "--out")
        held.enter_context(storage.lock(folder / folders.LOCK))
        view.log_to(folder / "search.log")
        folders.clean(folder)
        opening = {"type": "open", "file": str(entry.file)}
        engine = LocalEngine(folder / "logs")
        pool = Pool(engine, devices_, opening, options.get("silence"))
        with signals.ending(pool), pool:
            return _train(config, folder, options, view, pool, entry)


def _train(
    config: dict[str, Any],
    folder: Path,
    options: dict[str, Any],
    view: View,
    pool: Pool,
    entry: catalogue.Entry,
) -> dict[str, Any]:
    how = config["training"]
    described = pool.wait_for_description()
    known = {
        "dataset": config["dataset"]["reference"],
        "weights": (config.get("weights") or {}).get("reference"),
        "precision": how["precision"],
    }
    given = {name: value for name, value in options.items() if value is not None}
    asked = ("dataset", "weights", "precision", "max_attempts", "cache_size")
    settings = dataclasses.replace(
        resolve(described, str(entry.file), {n: (known | given).get(n) for n in asked}),
        epochs=how["schedule_epochs"],
        images_per_report=how["images_per_report"],
        batch_size=how["batch_size"],
        average_weights=how["average_weights"],
        seed=how["study_seed"],
        folder=str(folder.absolute()),
        checkpoints=str(folder.absolute() / folders.CHECKPOINTS),
    )
    with signals.interruptible(None):
        dataset = verified.described_data(settings.dataset)
    if dataset["sha256"] != config["dataset"]["sha256"]:
        logger.warning(
            "%s is not the data that the config was measured on (%s): the figures are of "
            "different questions",
            settings.dataset,
            config["dataset"]["name"],
        )
    with signals.interruptible(None):
        settings, pretrained = verified.with_weights(settings)
    if (was := config.get("weights")) and pretrained and pretrained["sha256"] != was["sha256"]:
        logger.warning(
            "the config was measured with %s and not with %s: the figures are of different "
            "questions",
            was["label"],
            pretrained["label"],
        )
    pool.prepare(dataclasses.asdict(settings))
    ready = pool.wait_for_space()
    # What makes a stored model the one that is asked for, beside its seed and length.
    question = {
        "study": entry.name,
        "file": artifacts.sha256(entry.file),
        "params": config["params"],
        **{name: how[name] for name in ("images_per_report", "batch_size", "study_seed")},
        "average_weights": settings.average_weights,
        "data": dataset["sha256"],
        "precision": ready["precision"],
        "weights": pretrained and pretrained["sha256"],
    }
    jobs = _jobs(config, options.get("seeds"), question)
    records = folder / "training.json"
    stored = artifacts.read_json(records) or {}
    for job in jobs:
        record = stored.get(job.key, {})
        if all(record.get(name) == value for name, value in job.record.items()):
            job.record = record

    def save(job: Job) -> None:
        stored[job.key] = job.record
        artifacts.write_json(records, stored, inside=folder)

    Retraining(
        jobs,
        settings,
        images_per_epoch=ready["images_per_epoch"],
        folder=folder,
        view=view,
        save=save,
    ).run(pool)
    folders.remove_scratch(folder)
    about = {"fixed": settings.fixed(), "dataset": dataset, "weights": pretrained}
    run = {**ready, "described": described, **about}
    figures = {
        "schema": 1,
        **export.subject(settings, run),
        **export.measured(jobs, run, settings, folder),
        "provenance": provenance.collect(),
        "config": config,
    }
    artifacts.write_json(folder / "metrics.json", figures, inside=folder)
    return figures


def _jobs(config: dict[str, Any], num_seeds: int | None, question: dict[str, Any]) -> list[Job]:
    how, trial = config["training"], config["trial"]
    seeds = how["seeds"][:num_seeds]
    for index in itertools.count():  # a seed that diverged is not in the config
        if len(seeds) >= (num_seeds or 0):
            break
        if (seed := seed_for(how["study_seed"], "winner", trial, index)) not in seeds:
            seeds.append(seed)
    length = {"epochs": how["schedule_epochs"], "share": how["share"]}
    if how.get("validated"):
        length["validated"] = True
    accuracy = config["validation"]["accuracy"]
    return [
        Job(
            *(trial, index, seed, config["params"], accuracy, 1.0),
            record={**length, **question, "seed": seed},
        )
        for index, seed in enumerate(seeds)
    ]


def _refuse_another_config(config: dict[str, Any], folder: Path) -> None:
    """Its figures would be lost, and its models have the same names."""
    stored = artifacts.read_json(folder / "metrics.json")
    if stored and stored.get("config") != config:
        raise SearchError(
            f"{folder} holds the figures of another config; take --out for another folder",
            exit_code=EXIT_USAGE,
        )


def _check(value: Any, rule: Any, path: Path, name: str) -> None:
    if not isinstance(rule, dict):
        types = rule if isinstance(rule, tuple) else (rule,)
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise SearchError(
                f"{path} is no exported config: {name} is missing or of another type. "
                f"Received: {str(value)[:80]!r}. `fmnist-search` writes them to configs/",
                exit_code=EXIT_DAMAGED,
            )
        return
    for key, inner in rule.items():
        found = value.get(key) if isinstance(value, dict) else None
        _check(found, inner, path, f"{name}.{key}".lstrip("."))
