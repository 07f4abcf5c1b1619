"""What a worker says of its study, and makes of its tasks' errors."""

import keras_tuner
import pytest

from search.workers.worker import _describe, _failure
from studies.study import Study


class InternalError(Exception):
    """TensorFlow's, by its name."""


class ResourceExhaustedError(Exception):
    """Likewise."""


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        ResourceExhaustedError("OOM when allocating tensor with shape[9,9]"),
        InternalError("{{function_node __wrapped__Cast}} Dst tensor is not initialized."),
        InternalError("CUDA runtime implicit initialization failed: CUDA_ERROR_OUT_OF_MEMORY"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes."),
        RuntimeError("INTERNAL: Failed to allocate 98697216 bytes for new constant"),
    ],
    ids=str,
)
def test_errors_that_say_that_memory_is_full(error):
    ended = _failure(error)
    assert ended["outcome"] == "out_of_memory"
    assert ended["reason"]


@pytest.mark.parametrize("error", [InternalError("Blas GEMM launch failed"), ValueError("memory")])
def test_other_errors_are_errors(error):
    with pytest.raises(type(error)) as caught:
        raise error
    assert _failure(caught.value)["outcome"] == "error"


class TrainsItself(keras_tuner.HyperModel):
    def fit(self, hp, model, *args, **kwargs):
        return 0.5


@pytest.mark.parametrize(
    ("fields", "averaged"),
    [
        ({"space": keras_tuner.HyperModel}, True),
        ({"space": keras_tuner.HyperModel, "average_weights": False}, False),
        ({"space": TrainsItself}, False),
        ({"objective": len}, False),
    ],
)
def test_weights_are_averaged_where_a_worker_trains(fields, averaged):
    assert _describe(Study(name="mine", **fields))["average_weights"] is averaged
