"""A storage that may fail for minutes: each call is tried again until it is answered.

    storage = PatientStorage(url, engine_kwargs=...)  # an Optuna storage like any other

Workers go on training meanwhile, until their next report. A try whose answer was lost may have been
done: what makes a trial finds out, since that can't simply be made twice.
"""

from __future__ import annotations

import functools
import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.storages._rdb import models

from search.errors import EXIT_STORAGE_LOST, SearchError
from search.storage import reading

logger = logging.getLogger("search")

PATIENCE = 300.0  # seconds without an answer, after which the storage is lost
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 5.0  # seconds between two tries
_SILENT = 2.0  # seconds, before it is said that the storage does not answer
# What passes: another process holds the file, a network's disk is away. A full disk or a damaged
# file does not pass by itself.
_PASSING = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_PROTOCOL,
}
_Answer = TypeVar("_Answer")


def cause_of(error: BaseException) -> BaseException:
    """The database's own error, below those of Optuna and SQLAlchemy."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__:
        error = error.__cause__
    return getattr(error, "orig", None) or error


def code_of(error: BaseException) -> int:
    """SQLite's primary result code; 0 for what is not SQLite's."""
    return (getattr(cause_of(error), "sqlite_errorcode", None) or 0) & 0xFF


def passes(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    cause = cause_of(error)
    if isinstance(cause, sqlite3.Error):
        return code_of(error) in _PASSING
    below = error.__cause__ if isinstance(error, optuna.exceptions.StorageInternalError) else error
    return isinstance(below, sqlalchemy.exc.OperationalError | sqlalchemy.exc.InterfaceError)


def patiently(
    call: Callable[[bool], _Answer],
    where: object,
    *,
    patience: float | None = None,
    wait: Callable[[float], None] = time.sleep,
) -> _Answer:
    """The answer to a call to the storage, tried again while its failures may pass.

    Args:
        call: takes whether it is tried again.
        where: the storage, for messages.
        patience: seconds; None for PATIENCE.
        wait: for so many seconds; may raise, to end it all.

    Raises:
        SearchError: when patience is at its end; exit code 3.
    """
    patience = PATIENCE if patience is None else patience
    began, pause, again, said = time.monotonic(), _FIRST_WAIT, False, False
    while True:
        try:
            answer = call(again)
        except (
            optuna.exceptions.StorageInternalError,
            sqlalchemy.exc.SQLAlchemyError,
            sqlite3.Error,
        ) as error:
            if not passes(error):
                raise
            waited = time.monotonic() - began
            if waited >= patience:
                raise SearchError(
                    f"the study {where} has not answered for {waited:.0f} s ({cause_of(error)}); "
                    "what was stored before is safe. See who holds it, then type the same command",
                    exit_code=EXIT_STORAGE_LOST,
                ) from error
            if waited >= _SILENT and not said:
                said = True
                logger.warning(
                    "the study %s does not answer (%s): tried again for %.0f s",
                    where,
                    cause_of(error),
                    patience,
                )
            wait(pause)
            pause, again = min(2 * pause, _LONGEST_WAIT), True
        else:
            if said:
                logger.info("the study answers again, after %.0f s", time.monotonic() - began)
            return answer


class PatientStorage(optuna.storages.RDBStorage):
    """Optuna's storage, to read it and to make trials; all else is written by `WriterStorage`.

    Each call is tried again; opening it is, too.

    Args:
        where: what messages call it.
        wait: as of `patiently`.
        arguments: of `RDBStorage`.
    """

    def __init__(
        self,
        where: object,
        *arguments: Any,
        wait: Callable[[float], None] = time.sleep,
        **named: Any,
    ):
        self.patiently = functools.partial(patiently, where=where, wait=wait)
        self._num_before: int | None = None  # trials, before one that is being made
        self.patiently(lambda _: super(PatientStorage, self).__init__(*arguments, **named))

    def _get_trials(
        self,
        study_id: int,
        states: Any,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[optuna.trial.FrozenTrial]:
        among, after = included_trial_ids, trial_id_greater_than
        return self.patiently(lambda _: reading.read(self.engine, study_id, states, among, after))

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes(models.StudyUserAttributeModel, study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self._study_attributes(models.StudySystemAttributeModel, study_id)

    def _study_attributes(self, model: Any, study_id: int) -> dict[str, Any]:
        return self.patiently(lambda _: reading.study_attributes(self.engine, model, study_id))

    def _create_new_trial(self, study_id: int, template_trial: Any = None) -> Any:
        self._num_before = None
        make = super()._create_new_trial  # tries again itself, some times
        return self.patiently(lambda _: make(study_id, template_trial))

    def _get_prepared_new_trial(self, study_id: int, template_trial: Any, session: Any) -> Any:
        """The trial that an earlier try has made, if only its answer was lost."""
        trials = session.query(models.TrialModel).filter_by(study_id=study_id)
        num_trials = trials.count()
        if self._num_before is None:
            self._num_before = num_trials
        if num_trials > self._num_before:  # nobody else writes to this study
            return trials.order_by(models.TrialModel.trial_id.desc()).first()
        return super()._get_prepared_new_trial(study_id, template_trial, session)


def _tried_again(name: str) -> Any:
    plain = getattr(optuna.storages.RDBStorage, name)

    @functools.wraps(plain)
    def call(self: PatientStorage, *arguments: Any, **named: Any) -> Any:
        return self.patiently(lambda _: plain(self, *arguments, **named))

    return call


# Those that read, and the one that may be made twice.
for _name in (
    *("create_new_study", "get_all_studies", "get_study_id_from_name", "get_study_name_from_id"),
    *("get_study_directions", "get_trial", "get_trial_id_from_study_id_trial_number"),
    "_get_best_trial_id",
):
    setattr(PatientStorage, _name, _tried_again(_name))
