"""How the question is answered: coordinator, workers, data, retraining, evaluation.

from search import run

result = run("cnn", trials=20)
result.best.params, result.metrics["winners"][0]["test"]["mean"]["accuracy"]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from search.api import Result
    from studies.study import Study

__all__ = ["run"]


def run(study: str | Study, **options: Any) -> Result:
    """What the command `fmnist-search` does, from Python; see `search.api.run`."""
    from search import api  # late: a worker imports this package before its sockets are read

    return api.run(study, **options)
