"""Points that are refused before they cost anything: a study's limits, and the worker's memory."""

from __future__ import annotations

import keras

from search.training import backend, complexity
from search.workers import devices
from studies.study import Study


def excess(model: keras.Model, batch_size: int, study: Study) -> str:
    """Which limit a model is above, and by how much; or nothing."""
    needed = complexity.training_bytes(model, batch_size)
    limits = (
        ("parameters", complexity.parameters(model), study.max_parameters),
        ("flops", complexity.flops(model), study.max_flops),
        ("memory", needed, study.max_memory),
    )
    for name, amount, limit in limits:
        if limit is not None and amount > limit:
            unit = "bytes of memory" if name == "memory" else name
            return f"{amount:,} {unit}, above max_{name}={limit:,}"
    memory, workers = devices.memory(), devices.workers()
    if not backend.visible_gpus() and needed > memory / workers:
        shared = f" among {workers} workers" if workers > 1 else ""
        return (
            f"a step of {batch_size} images needs about {needed / 1e9:.1f} GB, above this "
            f"machine's {memory / 1e9:.1f} GB{shared}"
        )
    return ""
