"""Carries a study from one database to another, whole: SQLite to PostgreSQL, or back.

    moving.move("cnn", storage.at("sqlite:///runs/cnn/study.db"), storage.at("postgresql://..."))

The rows of Optuna's own tables are copied in one transaction, read again and compared before it is
committed; only then is the study taken out of the first database, where a note of its whereabouts
stays. A kill at any point leaves it whole in one of them at least, and the same command goes on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy
from optuna.storages._rdb import models
from sqlalchemy import Connection, Table

from search.errors import EXIT_DAMAGED, EXIT_USAGE, SearchError
from search.storage.storage import MOVED, Database

_STUDIES: Table = models.StudyModel.__table__
_TRIALS: Table = models.TrialModel.__table__
# What belongs to a study, and what to a trial; heartbeats (of a process that is gone) are left.
_OF_STUDY: list[Table] = [
    models.StudyDirectionModel.__table__,
    models.StudyUserAttributeModel.__table__,
    models.StudySystemAttributeModel.__table__,
]
_OF_TRIAL: list[Table] = [
    models.TrialUserAttributeModel.__table__,
    models.TrialSystemAttributeModel.__table__,
    models.TrialParamModel.__table__,
    models.TrialValueModel.__table__,
    models.TrialIntermediateValueModel.__table__,
]
_HEARTBEATS: Table = models.TrialHeartbeatModel.__table__
_NOTE = re.compile(r"dashboard:(\d+):(note_.*)")  # search/view/notes.py
_BATCH = 1_000  # rows of one statement
Content = dict[str, list[dict[str, Any]]]  # table -> rows, their keys replaced by trial numbers


def move(name: str, source: Database, target: Database) -> int:
    """Move a study; how many trials it has.

    Raises:
        SearchError: if it is not there, runs, or the target holds another of its name.
    """
    if source.url == target.url:
        raise SearchError(
            f"--from and --to are different databases. Received: {source.url} twice",
            exit_code=EXIT_USAGE,
        )
    with source.lock(name), target.lock(name), source.failures_named():
        if source.read(name) is None:
            raise SearchError(f"there is no study {name!r} in {source.label}")
        with target.failures_named():
            taken_from, brought_to = _engine(source, name), _engine(target, name)
            with taken_from.connect() as connection:
                content = _content(connection, name)
            with brought_to.begin() as connection:
                _bring(connection, name, content, target)
            target.settle(brought_to)
            with taken_from.begin() as connection:
                _clear(connection, name)
                _leave_note(connection, name, target.url)
        return len(content[_TRIALS.name])


def _engine(database: Database, name: str) -> sqlalchemy.Engine:
    """Of a database that has Optuna's tables, made where they are missing."""
    return database.open_storage(name).engine


def _bring(connection: Connection, name: str, content: Content, target: Database) -> None:
    """Write it, and hold what can be read then against what was to be written."""
    present = _content(connection, name)
    if present == content:
        return  # a move that was killed before it cleared the source
    if present and not _is_note(present):
        raise SearchError(
            f"{target.label} holds a study {name!r} of {len(present[_TRIALS.name])} trials: "
            "nothing was moved. Take another --to",
            exit_code=EXIT_USAGE,
        )
    _clear(connection, name)
    _write(connection, name, content)
    if _content(connection, name) != content:
        raise SearchError(
            f"what {target.label} gives back of study {name!r} is not what was written: nothing "
            "was moved",
            exit_code=EXIT_DAMAGED,
        )


def _content(connection: Connection, name: str) -> Content:
    """A study without the keys that a database chose; nothing where there is none."""
    study = _id_of(connection, name)
    if study is None:
        return {}
    content: Content = {}
    trials = list(connection.execute(sqlalchemy.select(_TRIALS).where(_TRIALS.c.study_id == study)))
    numbers = {row.trial_id: row.number for row in trials}
    for table in _OF_STUDY:
        query = sqlalchemy.select(table).where(table.c.study_id == study)
        rows = (_plain(table, row) for row in connection.execute(query))
        content[table.name] = _sorted(_renamed(row, numbers) for row in rows)
    content[_TRIALS.name] = _sorted(_plain(_TRIALS, row) for row in trials)
    for table in _OF_TRIAL:
        query = sqlalchemy.select(table).where(table.c.trial_id.in_(_trials_of(study)))
        content[table.name] = _sorted(
            {"number": numbers[row.trial_id], **_plain(table, row)}
            for row in connection.execute(query)
        )
    return content


def _plain(table: Table, row: sqlalchemy.Row) -> dict[str, Any]:
    keys = {column.name for column in table.columns if column.primary_key or column.foreign_keys}
    return {name: value for name, value in row._mapping.items() if name not in keys}


def _renamed(row: dict[str, Any], names: dict[int, int]) -> dict[str, Any]:
    """A study's row; the dashboard's notes name their trial by a key that is another there."""
    if not (match := _NOTE.fullmatch(row.get("key") or "")) or int(match[1]) not in names:
        return row
    return {**row, "key": f"dashboard:{names[int(match[1])]}:{match[2]}"}


def _sorted(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """In the same order whatever the database: by number, step, key."""
    names = ("number", "objective", "step", "key", "param_name")
    return sorted(rows, key=lambda row: [(row.get(n) is None, row.get(n) or 0) for n in names[:3]]
                  + [str(row.get(n)) for n in names[3:]])  # fmt: skip


def _write(connection: Connection, name: str, content: Content) -> None:
    study = _make(connection, name)
    _insert(connection, _TRIALS, ({**row, "study_id": study} for row in content[_TRIALS.name]))
    query = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.trial_id)
    ids = dict(connection.execute(query.where(_TRIALS.c.study_id == study)).all())
    for table in _OF_STUDY:
        rows = (_renamed(row, ids) for row in content[table.name])
        _insert(connection, table, ({**row, "study_id": study} for row in rows))
    for table in _OF_TRIAL:
        _insert(
            connection,
            table,
            (
                {**{n: v for n, v in row.items() if n != "number"}, "trial_id": ids[row["number"]]}
                for row in content[table.name]
            ),
        )


def _make(connection: Connection, name: str) -> int:
    key = connection.execute(_STUDIES.insert().values(study_name=name)).inserted_primary_key
    assert key is not None
    return int(key[0])


def _insert(connection: Connection, table: Table, rows: Iterator[dict[str, Any]]) -> None:
    waiting = list(rows)
    for first in range(0, len(waiting), _BATCH):
        connection.execute(table.insert(), waiting[first : first + _BATCH])


def _clear(connection: Connection, name: str) -> None:
    study = _id_of(connection, name)
    if study is None:
        return
    for table in (*_OF_TRIAL, _HEARTBEATS):
        connection.execute(table.delete().where(table.c.trial_id.in_(_trials_of(study))))
    for table in (_TRIALS, *_OF_STUDY, _STUDIES):
        connection.execute(table.delete().where(table.c.study_id == study))


def _leave_note(connection: Connection, name: str, url: str) -> None:
    """So that a command without --storage does not begin anew where the study was."""
    study = _make(connection, name)
    directions, attributes, _ = _OF_STUDY
    maximize = optuna.study.StudyDirection.MAXIMIZE
    connection.execute(directions.insert().values(study_id=study, objective=0, direction=maximize))
    connection.execute(
        attributes.insert().values(study_id=study, key=MOVED, value_json=json.dumps(url))
    )


def _is_note(content: Content) -> bool:
    attributes = content[models.StudyUserAttributeModel.__table__.name]
    return not content[_TRIALS.name] and [row["key"] for row in attributes] == [MOVED]


def _id_of(connection: Connection, name: str) -> int | None:
    query = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_name == name)
    return connection.execute(query).scalar()


def _trials_of(study: int) -> sqlalchemy.Select:
    return sqlalchemy.select(_TRIALS.c.trial_id).where(_TRIALS.c.study_id == study)
