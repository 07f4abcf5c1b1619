"""Trials as Optuna's storage reads them, in a fraction of its time.

    trials = read(engine, study_id, states=None, among=set(), after=-1)

Optuna makes an object of each row, and parses a hyperparameter's range anew for each trial; a study
of ten thousand takes it half a minute. Here rows stay tuples, and each range is parsed once.
"""

from __future__ import annotations

import datetime
import functools
import gc
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import sqlalchemy
from optuna import distributions
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState

_Trial, _Param = models.TrialModel, models.TrialParamModel
_Value, _Report = models.TrialValueModel, models.TrialIntermediateValueModel
_UserAttr, _SystemAttr = models.TrialUserAttributeModel, models.TrialSystemAttributeModel
_AT_ONCE = 10_000  # rows; all of a large study's would take hundreds of megabytes


def read(
    engine: sqlalchemy.Engine,
    study_id: int,
    states: Collection[TrialState] | None,
    among: Collection[int],
    after: int,
) -> list[FrozenTrial]:
    """All trials of a study, by their id; the finished ones are complete.

    The end of a trial is stored in one transaction, and the trials' own rows are read first: what
    is finished there is complete in what is read later. Of a running one that may be newer.

    Args:
        states: only those in one of these; None for all.
        among: where `after` is not -1: ids up to it that are wanted, too.
        after: only those with a higher id.
    """
    table = _Trial.__table__
    wanted = sqlalchemy.or_(table.c.trial_id > after, table.c.trial_id.in_(among))
    chosen = sqlalchemy.select(table.c.trial_id).where(table.c.study_id == study_id, wanted)
    with _uncollected(), engine.connect() as connection:

        def rows(model: Any, *names: str) -> Iterator[Any]:
            of = model.__table__
            (key,) = of.primary_key
            query = sqlalchemy.select(*(of.c[name] for name in names))
            query = query.where(of.c.trial_id.in_(chosen)).order_by(key)
            for some in connection.execute(query).partitions(_AT_ONCE):
                yield from some

        # The states are not part of `chosen`: they may change before the next table is read.
        found = [
            row
            for row in rows(
                _Trial, "trial_id", "number", "state", "datetime_start", "datetime_complete"
            )
            if states is None or row.state in states
        ]
        values: dict[int, dict[int, float]] = defaultdict(dict)
        for trial_id, objective, value, kind in rows(
            _Value, "trial_id", "objective", "value", "value_type"
        ):
            values[trial_id][objective] = _Value.stored_repr_to_value(value, kind)
        params: dict[int, dict[str, Any]] = defaultdict(dict)
        ranges: dict[int, dict[str, distributions.BaseDistribution]] = defaultdict(dict)
        parsed = functools.cache(distributions.json_to_distribution)
        for trial_id, name, value, text in rows(
            _Param, "trial_id", "param_name", "param_value", "distribution_json"
        ):
            drawn_from = parsed(text)
            ranges[trial_id][name] = drawn_from
            params[trial_id][name] = drawn_from.to_external_repr(value)
        reports: dict[int, dict[int, float]] = defaultdict(dict)
        for trial_id, step, value, kind in rows(
            _Report, "trial_id", "step", "intermediate_value", "intermediate_value_type"
        ):
            reports[trial_id][step] = _Report.stored_repr_to_intermediate_value(value, kind)
        attrs: dict[Any, dict[int, dict[str, Any]]] = {}
        for model in (_UserAttr, _SystemAttr):
            attrs[model] = defaultdict(dict)
            for trial_id, name, text in rows(model, "trial_id", "key", "value_json"):
                attrs[model][trial_id][name] = json.loads(text)
        return [
            FrozenTrial(
                number=number,
                state=state,
                value=None,
                values=[value for _, value in sorted(values[trial_id].items())]
                if state.is_finished() and values[trial_id]
                else None,
                datetime_start=_local(start),
                datetime_complete=_local(complete),
                params=params[trial_id],
                distributions=ranges[trial_id],
                user_attrs=attrs[_UserAttr][trial_id],
                system_attrs=attrs[_SystemAttr][trial_id],
                intermediate_values=reports[trial_id],
                trial_id=trial_id,
            )
            for trial_id, number, state, start, complete in found
        ]


def study_attributes(engine: sqlalchemy.Engine, model: Any, study_id: int) -> dict[str, Any]:
    """A study's attributes, which have a note for each trial.

    Args:
        model: Optuna's table of them, the user's or the system's.
    """
    table = model.__table__
    query = sqlalchemy.select(table.c.key, table.c.value_json).where(table.c.study_id == study_id)
    with _uncollected(), engine.connect() as connection:
        return {key: json.loads(text) for key, text in connection.execute(query).all()}


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector of cycles, which looks through all that is read again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _local(time: datetime.datetime | None) -> datetime.datetime | None:
    """Optuna's tables have UTC, its trials local time, neither with a zone."""
    return time and time.replace(tzinfo=datetime.UTC).astimezone().replace(tzinfo=None)
