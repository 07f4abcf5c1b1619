"""What a run takes from outside, fetched where it has to be and verified, as its study keeps it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from search import folders
from search.data import datasets, weights
from search.settings import Settings


def with_weights(settings: Settings) -> tuple[Settings, dict[str, Any] | None]:
    """Verify pretrained weights, fetched where they have to be; the settings as workers need them,
    and what is known of the weights, ready for JSON."""
    if settings.weights is None:
        return settings, None
    with folders.umask(folders.SHARED):
        ready = weights.ensure(settings.weights)
    known = {"reference": settings.weights, "sha256": ready.sha256, "label": ready.label}
    return dataclasses.replace(settings, weights=ready.path), known


def has_changed(settings: Settings, run: Mapping[str, Any]) -> bool:
    """Whether files of the user's, data or weights, are others now than those that a run (the
    study's attribute) began with. Nothing is known of what is no more."""
    found: dict[str, str] = {}
    is_path = settings.dataset not in datasets.DATASETS and os.path.exists(settings.dataset)
    if run["dataset"] and is_path:
        found["dataset"] = described_data(settings.dataset)["sha256"]
    if run["weights"] and settings.weights and os.path.isfile(settings.weights):
        found["weights"] = weights.ensure(settings.weights).sha256
    return any(run[name]["sha256"] != sha256 for name, sha256 in found.items())


def described_data(reference: str) -> dict[str, Any]:
    """Verify the data set, fetched where it has to be; what is known of it, ready for JSON."""
    with folders.umask(folders.SHARED):
        sha256 = datasets.ensure(reference)
    dataset = datasets.find(reference)
    return {
        "name": dataset.name,
        "reference": reference,
        "sha256": sha256,
        "input_shape": list(dataset.input_shape),
        "class_names": list(dataset.class_names),
    }
