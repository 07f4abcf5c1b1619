"""The search from Python: a notebook, or a script with or without a `__main__` guard.

    from search import run

    result = run("cnn", trials=20)
    result.best.params
    result.models()[0].predict(images)

Workers are processes of their own that never import the caller's `__main__`, so what a study is
made of has to be importable, or given by file.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from search import artifacts, catalogue, folders, journey, results
from search.cli import cli
from search.cli.options import Duration, Size
from search.data import datasets, weights
from search.errors import EXIT_USAGE, Interrupted, SearchError
from search.storage import storage
from search.view.progress import View
from studies.study import Study

if TYPE_CHECKING:
    import keras
    import optuna

# Of the command line's: not what has another form as an argument of run().
_OPTIONS = {option.name for option in cli.params if option.name} - {
    *("study", "out", "no_retrain", "verbose", "quiet", "version"),
}


@dataclass(frozen=True)
class Result:
    """What a run has come to.

    Args:
        folder: of the run: study.db, metrics.json, models, configs.
        metrics: the content of metrics.json, test figures among it (schema:
            search/winners/export.py); None where nothing was retrained.
        study: the Optuna study, read only.
    """

    folder: Path
    metrics: dict[str, Any] | None
    study: optuna.Study

    @property
    def best(self) -> results.Row:
        """The best trial: number, params, value (validation accuracy, fraction).

        Raises:
            SearchError: if no trial is complete.
        """
        if (best := results.best(self.study)) is None:
            raise SearchError(f"no trial of {self.study.study_name!r} is complete yet")
        return best

    def models(self) -> list[keras.Model]:
        """The retrained winners, best first, each once for each seed; imports Keras.

        Raises:
            SearchError: if nothing was retrained, or a file is not what was written.
        """
        if self.metrics is None:
            raise SearchError("there are no models: nothing was retrained")
        import keras

        paths = artifacts.verified_models(self.metrics, self.folder)
        return [keras.models.load_model(path, compile=False) for path in paths]

    def __repr__(self) -> str:
        best, num_trials = results.best(self.study), len(self.study.get_trials(deepcopy=False))
        said = f"best trial {best.number}: {best.value}" if best else "none complete"
        return f"Result(folder={str(self.folder)!r}, {num_trials} trials, {said})"


def run(
    study: str | Path | Study,
    *,
    out: str | Path | None = None,
    retrain: bool = True,
    verbosity: int = 0,
    **options: Any,
) -> Result:
    """Search a study, retrain and test its winners; called again, go on where it was left.

    Args:
        study: a name, the path of a study's file (text or a `Path`), or a `Study`. A `Study`'s
            space (or objective) is a class or function that can be imported, or text:
            "file.py:name" or "module:name".
        out: folder of the run; None for runs/<study>.
        retrain: the winners, and measure them on the test set.
        verbosity: -1 for warnings only, 1 for every event.
        options: those of the command line, as plain values: trials, epochs, dataset, workers,
            per_gpu, seed, time_budget (seconds), sampler, pruner, precision, storage, max_attempts,
            top, seeds, final_epochs, log, weights, cache_size (bytes), trial_timeout and silence
            (seconds), engine, address, shared, allow_insecure_ray.

    Raises:
        SearchError: for what the user can mend.
        KeyboardInterrupt: after Ctrl-C; nothing is lost, the same call goes on.
    """
    if unknown := sorted(options.keys() - _OPTIONS):
        raise SearchError(
            f"run() takes {', '.join(sorted(_OPTIONS))}. Received: {', '.join(unknown)}",
            exit_code=EXIT_USAGE,
        )
    options = _as_the_command_takes_them(options)
    before = None
    if isinstance(study, Study):
        folder = Path(out or Path("runs") / study.name)
        path = folder / "study.py"
        text = _text_of(study)
        before = path.read_text() if path.exists() else None
        if before != text:
            with (
                folders.umask(folders.PRIVATE),
                storage.lock(folder / folders.LOCK),  # another's workers may be reading it
            ):
                artifacts.write_text(path, text)
        study = path
    study = os.fspath(study)
    entry = catalogue.find(study)
    folder = Path(out or Path("runs") / entry.name)
    try:
        with View(verbosity) as view:
            outcome = journey.run(study, folder, options, view, final=retrain)
    except Interrupted:
        raise KeyboardInterrupt from None
    except SearchError as error:
        if error.exit_code == EXIT_USAGE and before is not None:  # refused: the file is the run's
            with folders.umask(folders.PRIVATE):
                artifacts.write_text(study, before)
        raise
    opened = storage.read_study(outcome.url, entry.name)
    assert opened is not None
    return Result(folder, outcome.metrics, opened)


def _as_the_command_takes_them(options: dict[str, Any]) -> dict[str, Any]:
    """Refuses what the command line refuses, by the same rules."""
    types = {parameter.name: parameter.type for parameter in cli.params}
    taken: dict[str, Any] = {}
    for name, value in options.items():
        if value is None:
            continue
        has_units = isinstance(types[name], Duration | Size)
        try:
            # Whole numbers as text, since 2.5 would be made 2.
            taken[name] = types[name].convert(value if has_units else str(value), None, None)
        except click.UsageError as error:
            raise SearchError(f"run({name}=...): {error.message}", exit_code=EXIT_USAGE) from None
    return taken


def _text_of(study: Study) -> str:
    """The study as a file: what a command line, too, can go on with."""
    roots: list[str] = []
    fields = {
        field.name: getattr(study, field.name)
        for field in dataclasses.fields(Study)
        if getattr(study, field.name) != field.default
    }
    for name in ("space", "objective"):
        if name in fields and not isinstance(fields[name], str):
            fields[name] = _importable(fields[name], name, roots)
        elif name in fields and fields[name].rpartition(":")[0].endswith(".py"):
            fields[name] = str(Path(fields[name]).expanduser().absolute())
        elif name in fields:
            roots.append(str(Path.cwd()))
    for name, resolved in (("dataset", datasets.resolve), ("weights", weights.resolve)):
        if fields.get(name):
            fields[name] = resolved(fields[name], Path.cwd())
    lines = [f'"""Study {study.name}, as it was given to search.run."""', ""]
    if roots:
        lines += ["import sys", "", f"sys.path += {roots!r}", ""]
    lines += ["from studies.study import Study", "", "study = Study("]
    lines += [f"    {name}={value!r}," for name, value in fields.items()]
    return "\n".join([*lines, ")", ""])


def _importable(thing: Any, field: str, roots: list[str]) -> str:
    """`module:name` of a class or function, and the folder it is imported from."""
    if not (inspect.isclass(thing) or inspect.isfunction(thing)):
        raise SearchError(
            f"Study({field}=...): the workers are processes of their own, which an object can't "
            f"be sent to. Received: {str(thing)[:100]}. Fix: give its class, or put `study = "
            'Study(...)` into a file and call run("file.py")',
            exit_code=EXIT_USAGE,
        )
    module, name = thing.__module__, thing.__qualname__
    found = getattr(sys.modules.get(module), name, None)
    if module == "__main__" or found is not thing:
        raise SearchError(
            f"Study({field}={name}): the workers can't import {name!r} from {module!r}, since they "
            "never run the caller's notebook or script. Fix: move it into a file and write "
            f'{field}="file.py:{name}", or import it from there',
            exit_code=EXIT_USAGE,
        )
    source = inspect.getsourcefile(sys.modules[module])
    if source and not Path(source).is_relative_to(sys.prefix):
        depth = module.count(".") + Path(source).name.startswith("__init__.")
        roots.append(str(Path(source).resolve().parents[depth]))
    return f"{module}:{name}"
