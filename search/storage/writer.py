"""A study as its one writer has it: read from memory, written in transactions.

    study = optuna.load_study(study_name="cnn", storage=WriterStorage(stored, "cnn"))
    with study._storage.together():  # one transaction for all that is written inside
        ...

Nobody else writes a study, so that what is known need not be read again. What is written is stored
when the call returns, or at the end of `together`; always by upserts, which may be made twice.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from optuna import distributions
from optuna.storages import InMemoryStorage
from optuna.storages._in_memory import _StudyInfo
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.dialects import postgresql, sqlite

from search.storage.patience import PatientStorage

_Report, _Value = models.TrialIntermediateValueModel, models.TrialValueModel
# Optuna's tables, and what a row of each is found by.
_KEYS: dict[Any, tuple[str, ...]] = {
    models.StudyUserAttributeModel: ("study_id", "key"),
    models.StudySystemAttributeModel: ("study_id", "key"),
    models.TrialUserAttributeModel: ("trial_id", "key"),
    models.TrialSystemAttributeModel: ("trial_id", "key"),
    models.TrialParamModel: ("trial_id", "param_name"),
    _Report: ("trial_id", "step"),
    _Value: ("trial_id", "objective"),
    models.TrialModel: ("trial_id",),
}
_DROP = sqlalchemy.text(
    "DELETE FROM trial_intermediate_values WHERE trial_id = :trial_id AND step > :step"
)


class WriterStorage(InMemoryStorage):
    """Optuna's storage of one study, which no other process writes meanwhile.

    Args:
        stored: the database that holds it.
        name: of the study.
    """

    def __init__(self, stored: PatientStorage, name: str):
        super().__init__()
        self._backend = stored
        self._is_together = False
        # Rows that are still to be stored, by table and key: of the same one, the last word counts.
        self._rows: dict[Any, dict[tuple[Any, ...], dict[str, Any]]] = {m: {} for m in _KEYS}
        self._dropped: dict[int, int] = {}  # trial -> the step after which
        self._upserts = {model: _upsert(model, stored.engine.name) for model in _KEYS}
        study_id = stored.get_study_id_from_name(name)
        study = _StudyInfo(name, stored.get_study_directions(study_id))
        study.user_attrs = stored.get_study_user_attrs(study_id)
        study.system_attrs = stored.get_study_system_attrs(study_id)
        self._studies[study_id] = study
        self._study_name_to_id[name] = study_id
        self._prev_waiting_trial_number[study_id] = 0
        for trial in stored.get_all_trials(study_id, deepcopy=False):
            self._keep(study_id, trial)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Store what is written inside in one transaction, at its end; an error's end, too."""
        if self._is_together:
            yield
            return
        self._is_together = True
        try:
            yield
        finally:
            self._is_together = False
            self._store()

    def remove_session(self) -> None:
        self._backend.remove_session()

    def create_new_study(self, *_: Any, **__: Any) -> int:
        raise NotImplementedError("the storage of one study, which is there already")

    def delete_study(self, study_id: int) -> None:
        raise NotImplementedError("the storage of one study, which stays")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        super().set_study_user_attr(study_id, key, json.loads(text))
        row = {"study_id": study_id, "key": key, "value_json": text}
        self._write(models.StudyUserAttributeModel, row)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        super().set_study_system_attr(study_id, key, json.loads(text))
        row = {"study_id": study_id, "key": key, "value_json": text}
        self._write(models.StudySystemAttributeModel, row)

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        trial = self._backend._create_new_trial(study_id, template_trial)
        self._keep(study_id, trial)
        return trial._trial_id

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: distributions.BaseDistribution,
    ) -> None:
        super().set_trial_param(trial_id, param_name, param_value_internal, distribution)
        row = {
            "trial_id": trial_id,
            "param_name": param_name,
            "param_value": param_value_internal,
            "distribution_json": distributions.distribution_to_json(distribution),
        }
        self._write(models.TrialParamModel, row)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if not super().set_trial_state_values(trial_id, state, values):
            return False
        study_id, number = self._trial_id_to_study_id_and_number[trial_id]
        trial = self._get_trial(trial_id)
        row = {
            "trial_id": trial_id,
            "number": number,
            "study_id": study_id,
            "state": state,
            "datetime_start": _utc(trial.datetime_start),
            "datetime_complete": _utc(trial.datetime_complete),
        }
        with self.together():
            for objective, value in enumerate(values or ()):
                stored, kind = _Value.value_to_stored_repr(value)
                of = {"trial_id": trial_id, "objective": objective}
                self._write(_Value, {**of, "value": stored, "value_type": kind})
            self._write(models.TrialModel, row)
        return True

    def set_trial_intermediate_value(
        self, trial_id: int, step: int, intermediate_value: float
    ) -> None:
        super().set_trial_intermediate_value(trial_id, step, intermediate_value)
        stored, kind = _Report.intermediate_value_to_stored_repr(intermediate_value)
        row = {
            "trial_id": trial_id,
            "step": step,
            "intermediate_value": stored,
            "intermediate_value_type": kind,
        }
        self._write(_Report, row)

    def drop_reports_after(self, trial_id: int, step: int) -> None:
        """Delete a running trial's reports after `step`; Optuna has no call for it."""
        trial = copy.copy(self._get_trial(trial_id))
        reports = trial.intermediate_values
        trial.intermediate_values = {at: value for at, value in reports.items() if at <= step}
        self._set_trial(trial_id, trial)
        for later in reports.keys() - trial.intermediate_values:
            self._rows[_Report].pop((trial_id, later), None)
        self._dropped[trial_id] = step
        self._store_unless_together()

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        super().set_trial_user_attr(trial_id, key, json.loads(text))
        row = {"trial_id": trial_id, "key": key, "value_json": text}
        self._write(models.TrialUserAttributeModel, row)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        text = json.dumps(value)
        super().set_trial_system_attr(trial_id, key, json.loads(text))
        row = {"trial_id": trial_id, "key": key, "value_json": text}
        self._write(models.TrialSystemAttributeModel, row)

    def _keep(self, study_id: int, trial: FrozenTrial) -> None:
        study = self._studies[study_id]
        study.trials.append(trial)
        study.param_distribution.update(trial.distributions)
        self._trial_id_to_study_id_and_number[trial._trial_id] = study_id, trial.number
        self._update_cache(trial._trial_id, study_id)

    def _write(self, model: Any, row: dict[str, Any]) -> None:
        self._rows[model][tuple(row[name] for name in _KEYS[model])] = row
        self._store_unless_together()

    def _store_unless_together(self) -> None:
        with self.together():
            pass

    def _store(self) -> None:
        """In one transaction, tried again until it is answered."""
        drops = [{"trial_id": trial, "step": step} for trial, step in self._dropped.items()]
        writes = [(self._upserts[model], [*rows.values()]) for model, rows in self._rows.items()]
        # The drops come first: a later attempt may have reported such a step again.
        words = [(statement, rows) for statement, rows in [(_DROP, drops), *writes] if rows]
        if not words:
            return

        def once(_: bool) -> None:
            with self._backend.engine.begin() as connection:
                for statement, rows in words:
                    connection.execute(statement, rows)

        self._backend.patiently(once)
        self._dropped.clear()
        for written in self._rows.values():
            written.clear()


def _upsert(model: Any, dialect: str) -> Any:
    insert: Any = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
    table, keys = model.__table__, _KEYS[model]
    statement = insert(table)
    given = [c.name for c in table.columns if c.name not in keys and not c.primary_key]
    return statement.on_conflict_do_update(
        index_elements=keys, set_={name: statement.excluded[name] for name in given}
    )


def _utc(time: datetime.datetime | None) -> datetime.datetime | None:
    """As Optuna's tables have it."""
    return time and time.astimezone(datetime.UTC).replace(tzinfo=None)
