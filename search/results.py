"""A study as plain rows: what `show`, `export` and the pictures are made from. No plotting."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import optuna
from optuna.trial import FrozenTrial, TrialState

from search.errors import EXIT_NOTHING_USABLE, EXIT_USAGE, SearchError

ACCURACY = "validation accuracy"
SHOW = "`fmnist-search show` with the same --study, --out and --storage"
# Parts of the data as published figures name them -> as winners do.
PARTS = {"train": "train", "val": "validation", "test": "test"}
_SHOWN_ELSEWHERE = ("known_point", "seconds", "reason", "stderr", "traceback")


class Row(NamedTuple):
    """One trial."""

    number: int
    state: str  # complete, pruned, fail, running, waiting
    value: float | None  # validation accuracy, fraction; of complete trials only
    last_value: float | None  # of the last report
    reports: int
    seconds: float | None  # in which it ran, all attempts together
    attempts: int
    reason: str  # why it was pruned or failed
    params: dict[str, Any]
    weights: str  # pretrained ones that its training began from, by their label; or ""


def rows(study: optuna.Study) -> list[Row]:
    """All trials, the best first, then the others by how far they came."""
    ranks = {trial.number: rank for rank, trial in enumerate(winners(study, top=None))}
    run = study.user_attrs.get("run", {})
    all_rows = [_row(trial, run) for trial in study.get_trials(deepcopy=False)]

    def key(row: Row) -> tuple[float, ...]:
        if row.number in ranks:
            return (0, ranks[row.number])
        return (1, -row.reports, -(row.last_value or 0.0), row.number)

    return sorted(all_rows, key=key)


def detail(study: optuna.Study, number: int) -> dict[str, Any]:
    """One trial in full, ready for JSON: times in seconds since 1970, figures as fractions.

    Keys are those of a `Row`, less `reports` and `attempts`, which are lists here: what each report
    and each attempt said; and known_point, figures (parameters, flops, images_per_second ...),
    retrained (what is stored of each seed), traceback and stderr (text or None).

    Raises:
        SearchError: if there is no such trial.
    """
    trials = study.get_trials(deepcopy=False)
    if number >= len(trials):
        raise SearchError(
            f"study {study.study_name!r} has no trial {number}; it has {len(trials)} trials, see "
            f"{SHOW}",
            exit_code=EXIT_USAGE,
        )
    trial = trials[number]
    attrs = trial.user_attrs
    figures = history(attrs)
    reports = [
        {"report": step, "value": value, **figures.get(str(step), {})}
        for step, value in sorted(trial.intermediate_values.items())
    ]
    retrained = {
        key.removeprefix("retrained:"): record
        for key, record in study.user_attrs.items()
        if key.startswith(f"retrained:trial-{number}-")
    }
    return _row(trial, study.user_attrs.get("run", {}))._asdict() | {
        "reports": reports,
        "attempts": attrs.get("attempts", []),
        "known_point": "known_point" in attrs,
        "figures": {
            name: value
            for name, value in attrs.items()
            if name not in _SHOWN_ELSEWHERE and isinstance(value, int | float | str)
        },
        "retrained": retrained,
        "traceback": attrs.get("traceback"),
        "stderr": attrs.get("stderr"),
    }


def winners(study: optuna.Study, top: int | None) -> list[FrozenTrial]:
    """The best `top` complete trials (all for None); of equals, the earlier one."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    ranked = sorted(complete, key=lambda trial: (-(trial.value or 0.0), trial.number))
    return ranked[:top]


def chosen(study: optuna.Study, top: int, number: int | None) -> list[FrozenTrial]:
    """The best `top` complete trials; or the one of that number, which may have been pruned.

    Raises:
        SearchError: if there is none.
    """
    if number is None:
        if best := winners(study, top):
            return best
        raise SearchError(
            f"no trial of {study.study_name!r} is complete yet: there is nothing to export",
            exit_code=EXIT_NOTHING_USABLE,
        )
    trials = study.get_trials(deepcopy=False)
    for trial in trials:
        if trial.number == number and (trial.params or trial.state.is_finished()):
            return [trial]
    raise SearchError(
        f"study {study.study_name!r} has no trial {number} that has begun; it has {len(trials)} "
        f"trials, see {SHOW}",
        exit_code=EXIT_USAGE,
    )


def history(attrs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The figures of each report by its step, as text, from the attributes of a trial."""
    found: dict[str, dict[str, float]] = {}
    part = 0
    while (key := history_key(part)) in attrs:
        found |= attrs[key]
        part += 1
    return found


def history_key(part: int) -> str:
    """The attribute that holds a part of a trial's figures, in the order of its reports."""
    return f"history:{part}" if part else "history"


def value_name(run: Mapping[str, Any]) -> str:
    """What a trial's value is, of a study with this attribute `run`: "validation accuracy", or
    "value" where an objective, or the space's own `fit`, returns what it likes."""
    kind = run.get("fixed", {}).get("kind", "objective")
    is_returned = kind == "objective" or (kind != "comparison" and run.get("own_fit"))
    return "value" if is_returned else ACCURACY


def best_step(trial: FrozenTrial) -> int:
    """The report with the trial's best value, from 1; of equals, the earlier one."""
    values = trial.intermediate_values
    return max(values, key=lambda step: (values[step], -step))


def saved_share(study: optuna.Study) -> float:
    """Share of the training that pruning saved, 0 to 1; trials that failed do not count."""
    run = study.user_attrs["run"]  # read from the storage, with all else
    num_reports = run["num_reports"]
    if run.get("fixed", {}).get("kind") == "comparison":
        return 0.0
    trained = saved = 0
    for trial in study.get_trials(deepcopy=False):
        reports = trial.last_step or 0
        if trial.user_attrs.get("reason", "").startswith("pruned:"):
            trained += reports
            saved += max(0, num_reports - reports)
        elif trial.state == TrialState.COMPLETE:  # if it stopped itself, nobody saved that
            trained += reports
    return saved / (trained + saved) if saved else 0.0


def best(study: optuna.Study) -> Row | None:
    """The best complete trial."""
    first = next(iter(rows(study)), None)
    return first if first and first.state == "complete" else None


def attempts_of(trial: FrozenTrial) -> list[dict[str, Any]]:
    """A trial's attempts, as the coordinator stores them."""
    return list(trial.user_attrs.get("attempts", []))


def end_of(attempt: Mapping[str, Any]) -> float:
    """Seconds since 1970; of one that runs or was cut off, when it was last heard of."""
    return float(attempt.get("end", attempt.get("seen", attempt["start"])))


class Clock:
    """The time of searching: that in which no trial ran does not count.

    Args:
        trials: with the attempts that the coordinator stores.
    """

    def __init__(self, trials: Iterable[FrozenTrial]):
        self._starts: list[float] = []  # of times without a pause
        self._before: list[float] = []  # seconds counted before each
        self._ends: list[float] = []
        self.seconds = 0.0  # of all
        times = sorted((a["start"], end_of(a)) for t in trials for a in attempts_of(t))
        for start, end in times:
            if not self._ends or start > self._ends[-1]:
                self._starts.append(start)
                self._before.append(self.seconds)
                self._ends.append(start)
            self.seconds += max(0.0, end - self._ends[-1])
            self._ends[-1] = max(self._ends[-1], end)

    def hours(self, time: float) -> float:
        """Hours of searching before `time`, in seconds since 1970."""
        at = bisect.bisect_right(self._starts, time) - 1
        if at < 0:
            return 0.0
        return (self._before[at] + min(time, self._ends[at]) - self._starts[at]) / 3600


def published(winner: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Each figure that was published of a point, beside ours: its name, the published one, ours
    with its spread, and the difference. One that is not measured here has none."""
    for figure, there in winner["published"].items():
        short_name, _, what = figure.partition("_")
        part, name = winner.get(PARTS[short_name]), f"{PARTS[short_name]} {what}"
        here = spread(part, what, len(winner["seeds"]))
        if part and here:
            yield name, f"{there:.4f}", here, f"{part['mean'][what] - there:+.4f}"
        else:
            yield name, f"{there:.4f}", "not measured", ""


def remarks(figures: Mapping[str, Any]) -> Iterator[str]:
    """What is to be known of metrics.json's figures, a line for each."""
    yield from _diverged(figures)
    if line := tested_besides(figures):
        yield line


def _diverged(figures: Mapping[str, Any]) -> Iterator[str]:
    """What it has no figures of."""
    for winner in figures["winners"]:
        if lost := len(winner["diverged"]):
            trainings = f"{lost} of {lost + len(winner['seeds'])} trainings"
            yield f"{_named(winner)}: {trainings} diverged and are in none of the figures"
    for winner in figures.get("diverged", []):
        yield f"{_named(winner)} has no figures: it diverged with every seed ({winner['reason']})"


def _named(winner: Mapping[str, Any]) -> str:
    name = f"trial {winner['trial']}"
    return f"{name} ({point_name(winner['params'])})" if len(winner["params"]) == 1 else name


def tested_besides(figures: Mapping[str, Any]) -> str:
    """A line where more models have been tested than metrics.json has figures of, else ""."""
    shown = sum(len(winner["seeds"]) for winner in figures["winners"])
    tested = figures.get("tested", 0)
    if tested <= shown:
        return ""
    return (
        f"the test set has been used for {tested} models of this study, and {shown} are shown: "
        "chosen among them by their test figures, the best would look too good"
    )


def point_name(params: Mapping[str, Any]) -> str:
    """A point of one hyperparameter is named by its value."""
    if len(params) == 1:
        return str(*params.values())
    return ", ".join(f"{name}={short(value)}" for name, value in params.items())


def decimal(value: float | None) -> str:
    """A value as it is read: four decimals, or four digits where they say nothing; "" for none."""
    if value is None:
        return ""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min` or `1 h 05 min`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def short(value: Any) -> str:
    """A param as it is read: four digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def begun_from(run: Mapping[str, Any], number: int, attrs: Mapping[str, Any]) -> str:
    """The label of the weights that a trial's training began from, to stand beside its figures; ""
    where the study (its attribute `run`) or the point begins from no pretrained ones.

    Args:
        attrs: of the trial, or what is stored of its retraining.
    """
    if not (weights := run.get("weights")):
        return ""
    is_comparison = run["fixed"]["kind"] == "comparison"
    says = run["pretrained"][number] if is_comparison else attrs.get("pretrained")
    return str(weights["label"]) if says else ""


def _row(trial: FrozenTrial, run: Mapping[str, Any]) -> Row:
    attrs = trial.user_attrs
    last = trial.last_step
    return Row(
        number=trial.number,
        state=trial.state.name.lower(),
        value=trial.value if trial.state == TrialState.COMPLETE else None,
        last_value=None if last is None else trial.intermediate_values[last],
        reports=len(trial.intermediate_values),
        seconds=attrs.get("seconds"),
        attempts=len(attrs.get("attempts", [])),
        reason=attrs.get("reason", ""),
        params=trial.params,
        weights=begun_from(run, trial.number, attrs),
    )


def spread(part: Mapping[str, Any] | None, name: str, num_seeds: int) -> str:
    """A figure of `{"mean": {...}, "std": {...}}` in words, "" where it is none of them: a `fit` of
    the user's own may measure what it likes. One seed has no spread to show."""
    if not part or name not in part["mean"]:
        return ""
    mean = f"{part['mean'][name]:.4f}"
    return f"{mean} ± {part['std'][name]:.4f}" if num_seeds > 1 else mean


def of_test_images(winner: Mapping[str, Any]) -> str:
    """How sure an accuracy on so few test images can be, in words: half of Wilson's interval for
    95 %. The spread over seeds doesn't hold it, since all are measured on the same images."""
    num_images = sum(map(sum, winner["seeds"][0]["test"]["confusion_matrix"]))
    accuracy, z = winner["test"]["mean"]["accuracy"], 1.96
    variance = accuracy * (1 - accuracy) / num_images + (z / (2 * num_images)) ** 2
    half = z * math.sqrt(variance) / (1 + z * z / num_images)
    return (
        f"the choice of the {num_images:,} test images makes ± {100 * half:.2f} points besides "
        "(95 %)"
    )
