"""Logs per trial for tools that don't read the study: TensorBoard's event files, or CSV.

    fmnist-search --study cnn --log tensorboard    # tensorboard --logdir runs/cnn/tensorboard
    fmnist-search --study cnn --log csv            # tail -F runs/cnn/csv/trial-12.csv

The coordinator writes them from what it stores anyway, without TensorFlow (which TensorBoard's own
EventFileWriter imports to open a file; its RecordWriter doesn't). The study stays the truth: a log
that can't be written ends the logs, not the search.
"""

from __future__ import annotations

import csv
import functools
import importlib
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TextIO

from search import artifacts
from search.errors import EXIT_USAGE, SearchError

logger = logging.getLogger("search")

KINDS = ("tensorboard", "csv")
Arguments = ParamSpec("Arguments")


def open_logs(kind: str | None, folder: str | Path) -> Logs:
    """The logs of a run.

    Args:
        kind: one of KINDS, or None for logs whose methods do nothing.
        folder: of the run; each trial has a file or a folder below `<folder>/<kind>`.

    Raises:
        SearchError: if that folder can't be made or written, or a package is missing.
    """
    below = Path(folder) / str(kind)
    if kind is None:
        return Logs(below, None)
    if kind == "tensorboard":
        _need_tensorboard()
    artifacts.refuse_symlink(below, inside=folder)
    try:
        below.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SearchError(f"{below} can't be made a folder: {error.strerror}") from error
    if not os.access(below, os.W_OK | os.X_OK):
        raise SearchError(f"Logs are written below {below}. Fix: make this folder writable")
    artifacts.remove_partials(below)
    return Logs(below, _CsvFile if kind == "csv" else _EventFile)


def _or_stop(
    write: Callable[Concatenate[Logs, Arguments], None],
) -> Callable[Concatenate[Logs, Arguments], None]:
    """Where `write` fails, nothing more is logged."""

    @functools.wraps(write)
    def write_or_stop(logs: Logs, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        if not logs.is_on:
            return
        try:
            write(logs, *args, **kwargs)
        except (OSError, SearchError) as error:
            logs.stop(error)

    return write_or_stop


class Logs:
    """A file for each trial, open while the trial runs.

    An attempt begins with a trial's first report to this object, and again with one whose step is
    not above the last: it replaces what an earlier attempt has left.
    """

    def __init__(self, folder: Path, file: type[_CsvFile] | type[_EventFile] | None):
        self._folder = folder
        self._file = file
        self._open: dict[str, _CsvFile | _EventFile] = {}

    @property
    def is_on(self) -> bool:
        return self._file is not None

    @_or_stop
    def report(
        self,
        name: str,
        step: int,
        value: float,
        metrics: dict[str, float],
        params: dict[str, Any],
    ) -> None:
        """Log a report.

        Args:
            name: of the trial, such as "trial-12"; its file has this name.
            params: of the trial; those that come after its first report are not logged.
        """
        file = self._open.get(name)
        if file is None or step <= file.last_step:
            file = self._anew(name, params)
        file.add(step, value, metrics)

    @_or_stop
    def end(self, name: str, state: str, value: float | None, params: dict[str, Any]) -> None:
        """Close a trial's log, which an earlier process may have begun.

        Args:
            state: COMPLETE, PRUNED or FAIL.
            value: the trial's own, None where it has none.
        """
        file = self._open.get(name) or self._anew(name, params)
        file.end(state, value)
        self._open.pop(name).close()

    @_or_stop
    def history(self, name: str, curves: dict[str, list[float]], params: dict[str, Any]) -> None:
        """Log a training that has ended.

        Args:
            name: of a retrained winner, such as "trial-12-seed-0".
            curves: a number for each report, for each metric.
        """
        file = self._anew(name, params)
        for step in range(1, 1 + max(map(len, curves.values()), default=0)):
            figures = {metric: values[step - 1 : step] for metric, values in curves.items()}
            file.add(step, None, {metric: value[0] for metric, value in figures.items() if value})
        file.end("COMPLETE", None)
        self._open.pop(name).close()

    def close(self) -> None:
        """Close what is open; may be called twice."""
        for file in self._open.values():
            with suppress(OSError):  # what a full disk has left in its buffer
                file.close()
        self._open.clear()

    def stop(self, error: Exception) -> None:
        """Log nothing from now on."""
        self._file = None
        self.close()
        logger.warning("no more logs go to %s: %s; the search goes on", self._folder, error)

    def _anew(self, name: str, params: dict[str, Any]) -> _CsvFile | _EventFile:
        assert self._file is not None
        if name in self._open:
            self._open.pop(name).close()
        self._open[name] = self._file(self._folder, name, params)
        return self._open[name]


class _CsvFile:
    """Columns step, value (of a trial), then metrics in the order of their first report."""

    def __init__(self, folder: Path, name: str, params: dict[str, Any]):
        self.last_step = 0
        self._path = folder / f"{name}.csv"
        self._columns: list[str] = []
        self._stream: TextIO | None = None

    def add(self, step: int, value: float | None, metrics: dict[str, float]) -> None:
        fixed = {"step": step} if value is None else {"step": step, "value": value}
        row = metrics | fixed
        new = [name for name in fixed | metrics if name not in self._columns]
        if new:
            self._widen(new)
        assert self._stream is not None
        self._writer(self._stream).writerow(row)
        self._stream.flush()
        self.last_step = step

    def end(self, state: str, value: float | None) -> None:
        """A file of reports says nothing of the end."""

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()

    def _widen(self, new: list[str]) -> None:
        """Replace the file by one with more columns: of this attempt's rows, or of none."""
        rows = []
        if self._stream is not None:
            self._stream.close()
            with self._path.open(encoding="utf-8", newline="") as stream:
                rows = list(csv.DictReader(stream))
        self._columns += new
        with (
            artifacts.write_atomically(self._path) as temporary,
            temporary.open("w", encoding="utf-8", newline="") as stream,
        ):
            self._writer(stream).writeheader()
            self._writer(stream).writerows(rows)
        self._stream = self._path.open("a", encoding="utf-8", newline="")

    def _writer(self, stream: TextIO) -> csv.DictWriter[str]:
        return csv.DictWriter(stream, self._columns, lineterminator="\n")


class _EventFile:
    """A run of TensorBoard: metrics as scalars, and a session of its HParams dashboard.

    The tag `value` is the trial's own at its end; before that, what an objective that has no
    metrics reports.
    """

    def __init__(self, folder: Path, name: str, params: dict[str, Any]):
        self.last_step = 0
        self._folder = folder / name
        artifacts.refuse_symlink(self._folder)
        self._params = params
        self._records: Any = None  # tensorboard's RecordWriter, over an open file

    def add(self, step: int, value: float | None, metrics: dict[str, float]) -> None:
        if self._records is None:
            from tensorboard.compat.proto.event_pb2 import SessionLog

            for old in self._folder.glob("*tfevents*"):
                old.unlink()
            self._begin()
            # A TensorBoard that is open forgets what it has read of an earlier attempt.
            self._write(session_log=SessionLog(status=SessionLog.START))
        self._scalars(step, metrics if value is None else metrics or {"value": value})
        self.last_step = step

    def end(self, state: str, value: float | None) -> None:
        if self._records is None:  # beside what an earlier process has left
            self._begin()
        if value is not None:
            self._scalars(self.last_step, {"value": value})
        self._write(summary=_session_end(state))

    def close(self) -> None:
        if self._records is not None:
            self._records.close()

    def _begin(self) -> None:
        from tensorboard.plugins.hparams import summary_v2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads a folder's files in the order of their names.
        path = self._folder / f"events.out.tfevents.{time.time_ns()}"
        self._records = RecordWriter(path.open("xb"))
        self._write(file_version="brain.Event:2")
        known = (bool, int, float, str)
        params = {k: v if isinstance(v, known) else str(v) for k, v in self._params.items()}
        self._write(summary=summary_v2.hparams_pb(params, trial_id=self._folder.name))

    def _scalars(self, step: int, figures: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **content).SerializeToString())
        self._records.flush()


def _session_end(state: str) -> Any:
    """A complete trial is a success; a pruned one, like one that runs, is of unknown status."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

    status = {"COMPLETE": api_pb2.STATUS_SUCCESS, "FAIL": api_pb2.STATUS_FAILURE}
    info = plugin_data_pb2.SessionEndInfo(
        status=status.get(state, api_pb2.STATUS_UNKNOWN), end_time_secs=time.time()
    )
    content = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    value = Summary.Value(
        tag=metadata.SESSION_END_INFO_TAG,
        metadata=metadata.create_summary_metadata(content),
        tensor=metadata.NULL_TENSOR,
    )
    return Summary(value=[value])


def _need_tensorboard() -> None:
    """Read it before the first trial: 0.2 s, and a missing package is told now."""
    try:
        importlib.import_module("tensorboard.plugins.hparams.summary_v2")
    except ImportError as error:
        raise SearchError(
            f"--log tensorboard needs a package: {error}. Fix: pip install '.[tensorboard]'",
            exit_code=EXIT_USAGE,
        ) from error
