"""Trials as Optuna's storage reads them, in a fraction of its time.

    trials = read(engine, study_id, states=None, among=set(), after=-1)

Optuna makes an object of each row, and parses a hyperparameter's range anew for each trial; a study
of ten thousand takes it half a minute. Here rows stay rows, and each range is parsed once.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from typing import Any

import sqlalchemy
from optuna import distributions
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

_Trial, _Param = models.TrialModel, models.TrialParamModel
_Value, _Report = models.TrialValueModel, models.TrialIntermediateValueModel
_UserAttr, _SystemAttr = models.TrialUserAttributeModel, models.TrialSystemAttributeModel


def read(
    engine: sqlalchemy.Engine,
    study_id: int,
    states: Collection[TrialState] | None,
    among: Collection[int],
    after: int,
) -> list[FrozenTrial]:
    """All trials of a study, by their id, as one transaction sees them.

    Args:
        states: only those in one of these; None for all.
        among: where `after` is not -1: ids up to it that are wanted, too.
        after: only those with a higher id.
    """
    table = _Trial.__table__
    wanted = sqlalchemy.or_(table.c.trial_id > after, table.c.trial_id.in_(among))
    chosen = sqlalchemy.select(table.c.trial_id).where(table.c.study_id == study_id, wanted)
    if states is not None:
        chosen = chosen.where(table.c.state.in_(states))
    with engine.connect() as connection:

        def rows(model: Any) -> Iterator[Any]:
            of = model.__table__
            (key,) = of.primary_key
            query = sqlalchemy.select(of).where(of.c.trial_id.in_(chosen)).order_by(key)
            return iter(connection.execute(query))

        trials = list(rows(_Trial))
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for row in rows(_Value):
            value = _Value.stored_repr_to_value(row.value, row.value_type)
            values[row.trial_id][row.objective] = value
        params: dict[int, dict[str, Any]] = defaultdict(dict)
        ranges: dict[int, dict[str, distributions.BaseDistribution]] = defaultdict(dict)
        parsed = functools.cache(distributions.json_to_distribution)
        for row in rows(_Param):
            drawn_from = parsed(row.distribution_json)
            ranges[row.trial_id][row.param_name] = drawn_from
            params[row.trial_id][row.param_name] = drawn_from.to_external_repr(row.param_value)
        reports: dict[int, dict[int, float]] = defaultdict(dict)
        for row in rows(_Report):
            reports[row.trial_id][row.step] = _Report.stored_repr_to_intermediate_value(
                row.intermediate_value, row.intermediate_value_type
            )
        attrs: dict[Any, dict[int, dict[str, Any]]] = {}
        for model in (_UserAttr, _SystemAttr):
            attrs[model] = defaultdict(dict)
            for row in rows(model):
                attrs[model][row.trial_id][row.key] = json.loads(row.value_json)
    return [
        FrozenTrial(
            number=row.number,
            state=row.state,
            value=None,
            values=[value for _, value in sorted(values[row.trial_id].items())] or None,
            datetime_start=_local(row.datetime_start),
            datetime_complete=_local(row.datetime_complete),
            params=params[row.trial_id],
            distributions=ranges[row.trial_id],
            user_attrs=attrs[_UserAttr][row.trial_id],
            system_attrs=attrs[_SystemAttr][row.trial_id],
            intermediate_values=reports[row.trial_id],
            trial_id=row.trial_id,
        )
        for row in trials
    ]


def _local(time: datetime.datetime | None) -> datetime.datetime | None:
    """Optuna's tables have UTC, its trials local time, neither with a zone."""
    return time and time.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
