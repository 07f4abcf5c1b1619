"""Run one trial again, alone, and say whether its curve is the same.

The worker does what it did in the search: same point, same seed. What this file answers it comes
from the stored trial; nothing is stored.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial

from search import results, signals
from search.data import verified
from search.errors import EXIT_USAGE, SearchError
from search.sampling import seed_for
from search.settings import Settings, resolve
from search.view.progress import View
from search.workers import devices
from search.workers.devices import Device
from search.workers.local import LocalEngine
from search.workers.pool import Pool
from search.workers.slots import Event

# Of two accuracies that are still the same: sums in another order differ in their last digits,
# which may turn the class of an image or two.
TOLERANCE = 1e-3
TURNED = 2.5  # images, where there are so few that one is more than that


class Repeated(NamedTuple):
    """A trial's curve and its end, stored and now."""

    number: int
    stored: dict[int, float]  # value by step
    now: dict[int, float]
    outcome: str  # of the worker: complete, pruned where the trial was, diverged, error, ...
    reason: str
    ended: str = ""  # as outcome, of the stored trial; empty where the search ended it otherwise
    values: tuple[float | None, float | None] = None, None  # of a complete trial
    num_monitored: int | None = None  # images whose accuracy a report is; not of an objective

    @property
    def difference(self) -> float:
        """The largest between two values of one step, or between the trial's two values."""
        pairs = [(self.stored[step], self.now[step]) for step in self.stored.keys() & self.now]
        before, after = self.values
        if before is not None and after is not None:
            pairs.append((before, after))
        return max((abs(one - other) for one, other in pairs), default=0.0)

    @property
    def is_same(self) -> bool:
        ends_alike = self.outcome == self.ended or not self.ended
        same_steps = self.stored.keys() == self.now.keys()
        tolerance = max(TOLERANCE, TURNED / self.num_monitored if self.num_monitored else 0.0)
        return same_steps and ends_alike and self.difference <= tolerance


def repeat(
    study: optuna.Study, number: int, file: Path, folder: Path, options: dict[str, Any], view: View
) -> Repeated:
    """Train trial `number` once more.

    Args:
        file: of the study.
        folder: where the worker's log goes.
        options: of the run.

    Raises:
        SearchError: if there is no such trial, the data are others, or its worker dies.
    """
    (trial,) = results.chosen(study, 1, number)
    run = study.user_attrs["run"]
    if run.get("fixed", {}).get("kind") == "comparison":
        raise SearchError(
            f"{study.study_name!r} compares named points, which are trained with every seed and "
            "have no trial of a search to repeat: `fmnist-search train "
            f"configs/trial-{number}.yaml`, in the run's folder, trains it again",
            exit_code=EXIT_USAGE,
        )
    if precision := run["told"]["precision"]:  # of the search; winners may have had another
        options = {**options, "precision": precision}
    settings = resolve(run["described"], str(file), options)
    settings = dataclasses.replace(settings, folder=str(folder.absolute()))
    with signals.interruptible(None):
        settings, _ = verified.with_weights(settings)
        now = verified.described_data(settings.dataset) if run["dataset"] else {}
    if (data := run["dataset"]) and now["sha256"] != data["sha256"]:
        raise SearchError(
            f"{settings.dataset} has other data than the trial was trained on (SHA-256 "
            f"{now['sha256'][:12]}, then {data['sha256'][:12]}): put them back as they were",
            exit_code=EXIT_USAGE,
        )
    opening = {"type": "open", "file": str(file)}
    pool = Pool(LocalEngine(folder / "logs"), [_device(trial, run)], opening)
    with signals.ending(pool), pool:
        pool.wait_for_description()
        pool.prepare(dataclasses.asdict(settings))
        num_monitored = pool.wait_for_space().get("num_monitored")
        return _again(pool, trial, settings, view)._replace(num_monitored=num_monitored)


def _device(trial: FrozenTrial, run: dict[str, Any]) -> Device:
    """One with as many threads as the trial had, since sums in another order differ, and with its
    share of the memory."""
    workers = run["told"]["workers"] or 1
    device = dataclasses.replace(devices.share_out("auto")[0], workers=workers)
    attempts = trial.user_attrs.get("attempts") or [{}]
    used = re.fullmatch(r"(\d+) cpu", attempts[-1].get("device", ""))
    if device.gpu is not None or not used:
        return device
    return dataclasses.replace(device, threads=int(used[1]))


def _again(pool: Pool, trial: FrozenTrial, settings: Settings, view: View) -> Repeated:
    seed = seed_for(settings.seed, trial.number, "training")
    slot = pool.slots[0]
    pool.give(slot, trial.number, 1, {"task": "trial", "seed": seed})
    slot.status |= {"what": f"trial {trial.number}"}
    view.begin("repeating", 1, len(trial.intermediate_values))
    now: dict[int, float] = {}
    while True:
        for event in pool.poll(0.25):
            message = event.message
            if event.lost is not None:
                raise SearchError(f"the worker {event.lost.splitlines()[0]}", detail=event.lost)
            if message["type"] == "finished":
                return Repeated(
                    trial.number,
                    trial.intermediate_values,
                    now,
                    message["outcome"],
                    message.get("reason", ""),
                    _ended(trial),
                    (trial.value, message.get("value")),
                )
            if (answer := _answer(trial, event, now)) is not None:
                pool.answer(slot, **answer)
        view.refresh(pool.slots)


def _ended(trial: FrozenTrial) -> str:
    """How its worker ended it, if it did: a limit of time, or a kill, is not in the point."""
    if trial.state == optuna.trial.TrialState.COMPLETE:
        return "complete"
    kind = str(trial.user_attrs.get("reason", "")).partition(":")[0]
    return kind if kind in ("pruned", "diverged", "invalid", "error") else ""


def _answer(trial: FrozenTrial, event: Event, now: dict[int, float]) -> dict[str, Any] | None:
    message = event.message
    match message["type"]:
        case "suggest":
            if message["name"] not in trial.params:
                raise SearchError(
                    f"trial {trial.number} has no {message['name']!r}: the space is another than "
                    "the one it was searched with",
                    exit_code=EXIT_USAGE,
                )
            return {"value": trial.params[message["name"]]}
        case "attribute":
            return {"value": None}
        case "report":
            now[message["step"]] = message["value"]
            event.slot.status |= {"step": message["step"], "value": message["value"]}
            # Where its search ended it, not the point itself, it would go on.
            is_last = message["step"] >= max(trial.intermediate_values, default=0)
            return {"value": is_last and _ended(trial) in ("pruned", "")}
    return None
