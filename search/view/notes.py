"""What Optuna's dashboard says of a trial in words: why it ended, how large and fast it was.

    notes.save_of_trial(study, trial)          # the coordinator, when a trial has been told
    notes.save_answer(study, figures)          # when the winners have been measured
    notes.save_plots(study, plots)             # and drawn (search/report/dashboard_plots.py)

The dashboard opens the study read only, so that its notes are written here, into the system
attributes where it looks for them (optuna_dashboard/_note.py, _custom_plot_data.py); importing it
takes seconds, which a coordinator does not have. A trial is told before its note is written: a kill
between the two costs a note, which the next start adds, and never a trial.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from search import results
from search.pruning import Standing
from search.storage import storage

_MAX_LENGTH = 2045  # characters of one attribute, as optuna_dashboard splits them
_MAX_CLASSES = 20  # of a confusion matrix in a note
_PLOT = "dashboard:plot_data:"  # before a plot's name and the number of a part
# An attribute can't be taken away: what stands in the place of a plot that is no more.
_NO_PLOT = '{"data": [], "layout": {"title": {"text": "There is no such winner any more"}}}'
_WINNER = "## Winner"  # begins the note of one
_METRIC_NAMES = "study:metric_names"  # what Study.set_metric_names writes, with a warning
_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def name_metric(study: optuna.Study) -> None:
    """Tell Optuna's tools what a trial's value is."""
    names = [_metric(study)]
    if study.metric_names != names:
        _set(study, _METRIC_NAMES, names)


def save_of_trial(
    study: optuna.Study, trial: FrozenTrial, standing: Standing | None = None
) -> None:
    """Write a finished trial's first note; the study's too where the trial is the best so far."""
    # Told here that there is none: to ask the storage means to read every note of the study.
    _save(study, trial._trial_id, _of_trial(study, trial, standing), before={})
    best = results.winners(study, 1)
    if best and best[0].number == trial.number:
        _save(study, None, _best_so_far(study, trial), _attrs(study))


def save_missing(study: optuna.Study) -> None:
    """Write the notes that a kill has cut off."""
    before = _attrs(study)
    missing = [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state.is_finished() and _key(trial._trial_id, "note_ver") not in before
    ]
    for trial in missing:
        _save(study, trial._trial_id, _of_trial(study, trial, None), before)
    if missing and (best := results.winners(study, 1)):
        _save(study, None, _best_so_far(study, best[0]), before)


def save_answer(study: optuna.Study, figures: Mapping[str, Any]) -> None:
    """Write the winners' notes and the study's, from the figures of metrics.json."""
    save_missing(study)
    class_names = figures["dataset"]["class_names"]
    trials = {trial.number: trial for trial in study.get_trials(deepcopy=False)}
    before = _attrs(study)
    winners = {winner["trial"] for winner in figures["winners"]}
    for trial in trials.values():
        was_winner = before.get(f"{_key(trial._trial_id, 'note_str')}:0", "").startswith(_WINNER)
        if was_winner and trial.number not in winners:
            _save(study, trial._trial_id, _of_trial(study, trial, None), before)
    for rank, winner in enumerate(figures["winners"], 1):
        trial = trials[winner["trial"]]
        lines = [*_of_winner(winner, rank, class_names), "", *_of_trial(study, trial, None)]
        _save(study, trial._trial_id, lines, before)
    _save(study, None, _answer(study, figures), before)


def save_plots(study: optuna.Study, plots: Mapping[str, str]) -> None:
    """Have the dashboard draw these beside the study, and none of those from before.

    As optuna_dashboard.save_plotly_graph_object, but what is there already is not written again.

    Args:
        plots: Plotly's JSON, by a name that is valid as an HTML id.
    """
    before = _attrs(study)
    stored = [k.removeprefix(_PLOT).rpartition(":")[0] for k in before if k.startswith(_PLOT)]
    with storage.together(study):  # half a plot can't be drawn
        for name, content in (dict.fromkeys(stored, _NO_PLOT) | dict(plots)).items():
            _save_parts(study, f"{_PLOT}{name}:", content, before)


def _of_trial(study: optuna.Study, trial: FrozenTrial, standing: Standing | None) -> Iterator[str]:
    attrs = trial.user_attrs
    yield _ending(trial, study.user_attrs.get("run", {}).get("num_reports"), standing)
    yield ""
    rows = {}
    if trial.intermediate_values:
        values, last = trial.intermediate_values, trial.last_step
        best = results.best_step(trial)
        rows["last report"] = results.decimal(values[last or 0])
        rows["best report"] = f"{results.decimal(values[best])}, report {best}"
    if trial.state == TrialState.COMPLETE:
        rows[_metric(study)] = f"**{results.decimal(trial.value)}**"
    if label := results.begun_from(study.user_attrs.get("run", {}), trial.number, attrs):
        rows["begun from"] = label
    if isinstance(parameters := attrs.get("parameters"), int):
        rows["parameters"] = f"{parameters:,}"
    if isinstance(flops := attrs.get("flops"), int):
        rows["operations per image"] = f"{_scaled(flops)}FLOP"
    if isinstance(memory := attrs.get("memory"), int):
        rows["memory of a step"] = f"{_scaled(memory)}B"
    if isinstance(trained_on := attrs.get("trained_on"), str):
        rows["trained on"] = trained_on
    if isinstance(speed := attrs.get("images_per_second"), float):
        rows["training"] = f"{speed:,.0f} images/s"
    if "known_point" in attrs:
        rows["point"] = "a known one, tried first"
    yield from _table(("", ""), rows.items())
    attempts = [attempt for attempt in attrs.get("attempts", []) if "host" in attempt]
    if len(attempts) > 1:
        yield ""
        yield from _table(
            ("attempt", "on", "seconds", "ended"),
            (
                (
                    attempt["attempt"],
                    f"{_code(attempt['host'])}, {attempt['device']}",
                    f"{attempt.get('end', attempt['start']) - attempt['start']:.0f}",
                    attempt.get("reason", ""),
                )
                for attempt in attempts
            ),
        )


def _ending(trial: FrozenTrial, num_reports: int | None, standing: Standing | None) -> str:
    """One line: how it ended, after how much, and why."""
    reports = len(trial.intermediate_values)
    of = f" of {num_reports}" if num_reports else ""
    seconds = trial.user_attrs.get("seconds")
    took = f", {seconds:.0f} s" if seconds is not None else ""
    state = "failed" if trial.state == TrialState.FAIL else trial.state.name.lower()
    line = f"**{state}** after {reports}{of} reports{took}"
    if standing and standing.place > standing.going_on:  # else it ended for another reason
        return (
            f"{line}: place {standing.place} of {standing.of} at report {standing.rung}, where the "
            f"best {standing.going_on} went on"
        )
    reason = trial.user_attrs.get("reason", "")
    return f"{line}: {_code(reason)}" if reason else line


def _of_winner(winner: Mapping[str, Any], rank: int, class_names: Sequence[str]) -> Iterator[str]:
    seeds, test = winner["seeds"], winner["test"]
    accuracy = results.spread(test, "accuracy", len(seeds))
    yield f"{_WINNER} {rank}: test accuracy {accuracy}"
    yield ""
    yield (
        f"Trained again with {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} for "
        f"{winner['epochs']:g} epochs, and measured once on the test set: mean ± standard deviation"
    )
    yield ""
    yield from _table(
        ("test", ""), ((name, results.spread(test, name, len(seeds))) for name in test["mean"])
    )
    # Summed over the seeds: rows are the true classes.
    matrices = [seed["test"]["confusion_matrix"] for seed in seeds]
    matrix = [
        [sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)
    ]
    names = [_code(name) for name in class_names]
    if len(names) <= _MAX_CLASSES:
        yield ""
        yield "Images of the test set, all seeds together; a row for each true class:"
        yield ""
        yield from _table(
            ("true / predicted", *names),
            ((name, *row) for name, row in zip(names, matrix, strict=True)),
        )
        return
    confused = sorted(
        ((count, i, j) for i, row in enumerate(matrix) for j, count in enumerate(row) if i != j),
        reverse=True,
    )
    yield ""
    yield from _table(
        ("true class", "predicted", "images"),
        ((names[i], names[j], count) for count, i, j in confused[:10] if count),
    )


def _best_so_far(study: optuna.Study, trial: FrozenTrial) -> Iterator[str]:
    yield f"## Best so far: trial {trial.number}, {_metric(study)} {results.decimal(trial.value)}"
    yield ""
    yield from _of_trial(study, trial, None)


def _answer(study: optuna.Study, figures: Mapping[str, Any]) -> Iterator[str]:
    first, search = figures["winners"][0], figures["search"]
    value_name = search.get("value_name", results.ACCURACY)
    accuracy = results.spread(first["test"], "accuracy", len(first["seeds"]))
    begun_from = f", begun from {first['weights']}" if first["weights"] else ""
    yield f"## Trial {first['trial']}: test accuracy {accuracy}{begun_from}"
    yield ""
    yield (
        f"{search['trials']} trials: {search['complete']} complete, {search['pruned']} pruned, "
        f"{search['fail']} failed, in {search['seconds'] / 60:.1f} minutes; "
        f"{search['saved_share']:.0%} of the training saved by pruning. Winners are chosen by "
        f"validation alone; {results.tested_besides(figures) or 'each model is tested once'}."
    )
    yield ""
    yield from _table(
        ("winner", value_name, "test accuracy", "seeds", "epochs", "parameters"),
        (
            (
                f"trial {winner['trial']}",
                results.decimal(winner["validation_accuracy"]),
                results.spread(winner["test"], "accuracy", len(winner["seeds"])),
                len(winner["seeds"]),
                f"{winner['epochs']:g}",
                f"{winner['parameters']:,}",
            )
            for winner in figures["winners"]
        ),
    )
    if ensemble := figures["ensemble"]:
        yield ""
        yield (
            f"Ensemble of {ensemble['models']} models: test accuracy "
            f"{ensemble['test']['accuracy']:.4f}"
        )


def _metric(study: optuna.Study) -> str:
    return results.value_name(study.user_attrs.get("run", {}))


def _scaled(number: float) -> str:
    for unit, letter in _UNITS:
        if number >= unit:
            return f"{number / unit:.3g} {letter}"
    return f"{number:g} "


def _table(headings: Sequence[str], rows: Any) -> Iterator[str]:
    yield f"| {' | '.join(headings)} |"
    right = " ---: |" if len(headings) > 2 else " --- |"  # figures below one another
    yield f"| --- |{right * (len(headings) - 1)}"
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"


def _code(text: str) -> str:
    """Text of the user's, such as an exception's: shown as it is, on one line."""
    plain = " ".join(str(text).split())[:500]
    return "`" + plain.replace("`", "'").replace("|", "¦") + "`"


def _key(trial_id: int | None, name: str) -> str:
    """Of a trial's note, or of the study's for None."""
    return f"dashboard:{name}" if trial_id is None else f"dashboard:{trial_id}:{name}"


def _save(
    study: optuna.Study, trial_id: int | None, lines: Iterable[str], before: Mapping[str, Any]
) -> None:
    """As optuna_dashboard.save_note; of a trial, or of the study for None.

    Args:
        before: the system attributes as they are.
    """
    _save_parts(study, f"{_key(trial_id, 'note_str')}:", "\n".join(lines), before)
    # Last: without a version there is no note, and half of one is never shown as the first.
    version = _key(trial_id, "note_ver")
    _set(study, version, before.get(version, 0) + 1)


def _save_parts(study: optuna.Study, prefix: str, content: str, before: Mapping[str, Any]) -> None:
    """Under numbered keys, as the dashboard reads it; parts that are left of a longer one are
    emptied, and what is there already is not written again."""
    stored = sum(key.startswith(prefix) for key in before)
    for number in range(max(stored, math.ceil(len(content) / _MAX_LENGTH))):
        part = content[number * _MAX_LENGTH : (number + 1) * _MAX_LENGTH]
        if before.get(f"{prefix}{number}") != part:
            _set(study, f"{prefix}{number}", part)


def _attrs(study: optuna.Study) -> dict[str, Any]:
    return study._storage.get_study_system_attrs(study._study_id)


def _set(study: optuna.Study, key: str, value: Any) -> None:
    study._storage.set_study_system_attr(study._study_id, key, value)
