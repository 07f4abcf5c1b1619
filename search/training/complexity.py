"""What a model costs: its parameters, and the floating-point operations of one image's inference.

    complexity.parameters(model), complexity.flops(model)  # 585514, 59157084

Counted from the shapes in the model's graph: nothing is run, traced or compiled, on any backend.

A multiplication and an addition are two operations, a bias is one more for each output, as
TensorFlow's profiler counts (tensorflow/python/profiler/internal/flops_registry.py). Papers often
count the pair once ("3.8 billion FLOPs" of ResNet-50, arXiv:1512.03385): half of this, about. Of
one element of an output cost

    an activation, an operation on two tensors     1        softmax                             5
    a pooling window of k elements                 k        scaling, batch normalisation        2
    layer or group normalisation                   7        RMS, unit normalisation          4, 3
    interpolation between k neighbours            2k

where batch normalisation is a factor and an offset, as at inference. Nothing: what only moves
numbers (reshaping, padding, concatenation, embedding), and what acts in training only (dropout,
noise, layers named Random...). A layer called twice counts twice.

Of a layer that isn't known (one of your own), each weight is multiplied and added once at each
position of its output (all axes but the batch and the last); one without weights, or an unknown
operation, costs 1 for each element of its output or an input, whichever has more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import keras

from search.training.model_graph import arguments, calls, tensors

Shape = tuple[int, ...]  # of one image's share of a tensor: no batch axis, unknown sizes are 1
_SOFTMAX = 5
_NEIGHBOURS = {"nearest": 0, "bilinear": 4, "bicubic": 16, "lanczos3": 36, "lanczos5": 100}


def parameters(model: keras.Model) -> int:
    """Weights of a built model, trained or not; shared ones count once."""
    return int(model.count_params())


def training_bytes(model: keras.Model, batch_size: int) -> int:
    """About what one training step holds: weights, their gradients, two moments and perhaps their
    average, and each tensor of the graph that has a gradient, with it, as float32. A lower bound
    for a model without a graph, and for one with frozen layers: their tensors are not kept."""
    trained = sum(math.prod(variable.shape) for variable in model.trainable_variables)
    numbers = _kept_numbers(model, is_differentiated=False) if _has_graph(model) else 0
    is_averaged = getattr(getattr(model, "optimizer", None), "use_ema", False)
    kept = 4 if is_averaged else 3
    return 4 * (parameters(model) + kept * trained + 2 * batch_size * numbers)


def _kept_numbers(model: keras.Model, *, is_differentiated: bool) -> int:
    """Numbers of an image's tensors that have a gradient.

    Args:
        is_differentiated: whether those that the model is given have one.
    """
    numbers = 0
    differentiated = {id(tensor) for tensor in model.inputs} if is_differentiated else set()
    for call in calls(model):
        is_trained = bool(getattr(call.operation, "trainable_variables", ()))
        has_gradient = any(id(tensor) in differentiated for tensor in tensors(call))
        if not (is_trained or has_gradient):
            continue
        outputs = keras.tree.flatten(call.outputs)
        differentiated |= {id(tensor) for tensor in outputs}
        if isinstance(call.operation, keras.Model) and _has_graph(call.operation):
            numbers += _kept_numbers(call.operation, is_differentiated=has_gradient)
        else:
            numbers += sum(math.prod(size or 1 for size in t.shape[1:]) for t in outputs)
    return numbers


def flops(model: keras.Model) -> int:
    """Operations of one image's forward pass at inference; the module's docstring says which.

    Args:
        model: built; functional or sequential, of Keras's own layers. Axes of unknown size count
            as 1. Of a model without a graph (a subclass with a `call` of its own) only a lower
            bound is known: each weight used once.

    Raises:
        ValueError: if the model isn't built.
    """
    if not model.built:
        raise ValueError(f"A model that isn't built has no shapes. Received: {model!r}")
    if not _has_graph(model):
        return 2 * parameters(model)
    return _of_graph(model, [tensor.shape for tensor in model.inputs])


class _Call(NamedTuple):
    """One call of a layer or an operation."""

    operation: Any
    inputs: list[Shape]
    output: Shape  # the first, where there are several


_Rule = Callable[[_Call], int]


def _of_graph(model: keras.Model, input_shapes: Sequence[tuple[int | None, ...]]) -> int:
    """Of a model called on tensors of these shapes, batch axis included."""
    known = {id(tensor): shape for tensor, shape in zip(model.inputs, input_shapes, strict=False)}
    total = 0
    for node in calls(model):
        inputs = [known.get(id(tensor), tensor.shape) for tensor in tensors(node)]
        outputs = _output_shapes(node, known)
        known |= {id(tensor): shape for tensor, shape in zip(node.outputs, outputs, strict=True)}
        if isinstance(node.operation, keras.Model) and _has_graph(node.operation):
            total += _of_graph(node.operation, inputs)
            continue
        total += _of_call(
            _Call(node.operation, [_sizes(shape) for shape in inputs], _sizes(outputs[0]))
        )
    return total


def _output_shapes(node: Any, known: Mapping[int, Any]) -> list[Any]:
    """Those of the graph; worked out again where a model of any size was called on one size."""
    recorded = [tensor.shape for tensor in node.outputs]
    as_recorded = all(
        known.get(id(tensor), tensor.shape) == tensor.shape for tensor in tensors(node)
    )
    if as_recorded or not any(None in shape[1:] for shape in recorded):
        return recorded
    args, kwargs = keras.tree.map_structure(
        lambda value: (
            keras.KerasTensor(known.get(id(value), value.shape), value.dtype)
            if isinstance(value, keras.KerasTensor)
            else value
        ),
        arguments(node),
    )
    try:
        outputs = keras.tree.flatten(node.operation.compute_output_spec(*args, **kwargs))
    except Exception:  # whatever a user's layer raises
        return recorded
    return [tensor.shape for tensor in outputs]


def _of_call(call: _Call) -> int:
    rules = _LAYERS if isinstance(call.operation, keras.Layer) else _OPERATIONS
    for kind in type(call.operation).__mro__:
        if not kind.__module__.startswith("keras."):
            continue
        if kind.__name__.startswith(("Random", "ZeroPadding", "Cropping", "SpatialDropout")):
            return 0
        if kind.__name__ in rules:
            try:
                return rules[kind.__name__](call)
            except (AttributeError, LookupError, TypeError, ValueError):
                break  # not the layer that the rule was written for: another Keras's, a quantised
    return _unknown(call)


def _unknown(call: _Call) -> int:
    if isinstance(call.operation, keras.Layer) and call.operation.weights:
        return 2 * _positions(call.output) * call.operation.count_params()
    return max(map(math.prod, [call.output, *call.inputs]))


def _has_graph(model: keras.Model) -> bool:
    if isinstance(model, keras.Sequential):
        model = model._functional
    return bool(getattr(model, "outputs", None))


def _sizes(shape: tuple[int | None, ...]) -> Shape:
    return tuple(size or 1 for size in shape[1:])


def _positions(shape: Shape) -> int:
    return math.prod(shape[:-1])


def _per_element(operations: int) -> _Rule:
    return lambda call: operations * math.prod(call.output)


def _after_weights(call: _Call) -> int:
    """Bias and activation of a layer that has them."""
    bias = getattr(call.operation, "bias", None) is not None
    return (bias + _per_activation(call.operation)) * math.prod(call.output)


def _per_activation(layer: Any) -> int:
    name = getattr(layer.activation, "__name__", "")
    return {"linear": 0, "softmax": _SOFTMAX, "log_softmax": _SOFTMAX}.get(name, 1)


def _dense(call: _Call) -> int:
    inputs = call.operation.kernel.shape[0]
    return 2 * inputs * math.prod(call.output) + _after_weights(call)


def _convolution(call: _Call) -> int:
    """Each weight of the kernel is used once for each pixel of the output."""
    kernel = call.operation.kernel.shape
    pixels = math.prod(call.output) // kernel[-1]
    return 2 * pixels * math.prod(kernel) + _after_weights(call)


def _transposed_convolution(call: _Call) -> int:
    """Each weight of the kernel is used once for each pixel of the input."""
    kernel = call.operation.kernel.shape
    pixels = math.prod(call.inputs[0]) // kernel[-1]
    return 2 * pixels * math.prod(kernel) + _after_weights(call)


def _depthwise_convolution(call: _Call) -> int:
    window = math.prod(call.operation.kernel.shape[:-2])
    return 2 * window * math.prod(call.output) + _after_weights(call)


def _separable_convolution(call: _Call) -> int:
    depthwise = call.operation.depthwise_kernel.shape
    pointwise = call.operation.pointwise_kernel.shape
    pixels = math.prod(call.output) // pointwise[-1]
    return 2 * pixels * (math.prod(depthwise) + math.prod(pointwise)) + _after_weights(call)


def _einsum_dense(call: _Call) -> int:
    layer = call.operation
    shapes = [(1, *call.inputs[0]), tuple(layer.kernel.shape)]
    return _einsum(layer.equation, shapes, call.output) + _after_weights(call)


def _einsum(equation: str, shapes: Sequence[Shape], output: Shape) -> int:
    """Each element of the output is a sum over the axes that it lacks.

    Args:
        shapes: of the inputs, batch axis included.
    """
    terms, _, kept = equation.replace(" ", "").partition("->")
    summed: dict[str, int] = {}
    for term, shape in zip(terms.split(","), shapes, strict=False):
        before, dots, after = term.partition("...")
        sizes = [*zip(before, shape, strict=False)]
        if dots and after:
            sizes += zip(after, shape[-len(after) :], strict=False)
        summed |= {axis: size for axis, size in sizes if axis not in kept}
    return 2 * math.prod(output) * math.prod(summed.values())


def _matmul(call: _Call) -> int:
    return 2 * math.prod(call.output) * call.inputs[0][-1]


def _dot(call: _Call) -> int:
    axes = call.operation.axes
    axis = axes[0] if isinstance(axes, (list, tuple)) else axes
    summed = call.inputs[0][axis - 1 if axis > 0 else axis]
    return 2 * math.prod(call.output) * summed


def _multi_head_attention(call: _Call) -> int:
    """Projections, scaled scores, their softmax, and the sums of values that they weigh."""
    layer = call.operation
    queries = _positions(call.output)
    others = [_positions(shape) for shape in call.inputs]  # query, value and key in any order
    others.remove(queries)
    values = others[0]
    heads = layer.num_query_heads if hasattr(layer, "num_query_heads") else layer.num_heads
    key_dim = layer.head_dim if hasattr(layer, "head_dim") else layer.key_dim
    value_dim = layer.head_dim if hasattr(layer, "head_dim") else layer.value_dim
    projections = 0
    for name, positions in (
        ("_query_dense", queries),
        ("_key_dense", values),
        ("_value_dense", values),
        ("_output_dense", queries),
    ):
        projection = getattr(layer, name)
        projections += 2 * positions * math.prod(projection.kernel.shape)
        if projection.bias is not None:
            projections += positions * math.prod(projection.bias.shape)
    scores = heads * queries * values
    scaling = heads * queries * key_dim
    return projections + scaling + scores * (2 * key_dim + _SOFTMAX + 2 * value_dim)


def _attention(call: _Call) -> int:
    """Scores, their softmax, and the sums of values that they weigh."""
    query, value = call.inputs[:2]
    scores = query[-2] * value[-2]
    # Additive attention: the sum of query and key, its tanh, a scale, and the sum over the axis.
    per_score = 4 if isinstance(call.operation, keras.layers.AdditiveAttention) else 2
    return scores * (per_score * query[-1] + _SOFTMAX + 2 * value[-1])


def _recurrent(call: _Call) -> int:
    """Each weight once a step, and pixel; the gates' products are few beside them."""
    pixels = _positions(call.output[1:] if call.operation.return_sequences else call.output)
    return 2 * call.inputs[0][0] * pixels * call.operation.count_params()


def _bidirectional(call: _Call) -> int:
    layer = call.operation
    both = [layer.forward_layer, layer.backward_layer]
    merged = 0 if layer.merge_mode in ("concat", None) else math.prod(call.output)
    return sum(_of_call(call._replace(operation=one)) for one in both) + merged


def _time_distributed(call: _Call) -> int:
    steps, *one = call.inputs[0]
    return steps * _of_wrapped(_Call(call.operation.layer, [tuple(one)], call.output[1:]))


def _of_wrapped(call: _Call) -> int:
    if isinstance(call.operation, keras.Model) and _has_graph(call.operation):
        return _of_graph(call.operation, [(1, *shape) for shape in call.inputs])
    return _of_call(call)


_free = _per_element(0)


def _merge(call: _Call) -> int:
    return (len(call.inputs) - 1) * math.prod(call.output)


def _pool(call: _Call) -> int:
    return math.prod(call.operation.pool_size) * math.prod(call.output)


def _global_pool(call: _Call) -> int:
    return math.prod(call.inputs[0])


def _resize(call: _Call) -> int:
    return 2 * _NEIGHBOURS[call.operation.interpolation] * math.prod(call.output)


def _rules(table: Mapping[str, _Rule]) -> dict[str, _Rule]:
    """One entry for each of the names that share a rule."""
    return {name: rule for names, rule in table.items() for name in names.split()}


# By the class's name or, for your subclass of a Keras layer, that of the layer.
_LAYERS = _rules(
    {
        "Dense": _dense,
        "EinsumDense": _einsum_dense,
        "Conv1D Conv2D Conv3D": _convolution,
        "Conv1DTranspose Conv2DTranspose Conv3DTranspose": _transposed_convolution,
        "DepthwiseConv1D DepthwiseConv2D": _depthwise_convolution,
        "SeparableConv1D SeparableConv2D": _separable_convolution,
        "MultiHeadAttention GroupedQueryAttention": _multi_head_attention,
        "Attention AdditiveAttention": _attention,
        "RNN": _recurrent,
        "Bidirectional": _bidirectional,
        "TimeDistributed": _time_distributed,
        "SpectralNormalization": lambda call: _of_wrapped(
            call._replace(operation=call.operation.layer)
        ),
        "BatchNormalization Normalization Rescaling": _per_element(2),
        "LayerNormalization GroupNormalization": _per_element(7),
        "RMSNormalization": _per_element(4),
        "UnitNormalization": _per_element(3),
        "Activation": lambda call: _per_activation(call.operation) * math.prod(call.output),
        "ReLU LeakyReLU PReLU ELU": _per_element(1),
        "Softmax": _per_element(_SOFTMAX),
        "MaxPooling1D MaxPooling2D MaxPooling3D": _pool,
        "AveragePooling1D AveragePooling2D AveragePooling3D": _pool,
        "BaseGlobalPooling": _global_pool,
        "UpSampling2D Resizing": _resize,
        "Add Subtract Multiply Maximum Minimum": _merge,
        "Average": lambda call: _merge(call) + math.prod(call.output),
        "Dot": _dot,
        "InputLayer Identity Embedding Masking ActivityRegularization Concatenate": _free,
        "Flatten Reshape Permute RepeatVector CenterCrop UpSampling1D UpSampling3D": _free,
        "Dropout AlphaDropout GaussianDropout GaussianNoise": _free,
        "AugMix CutMix MixUp RandAugment": _free,
    }
)
_OPERATIONS = _rules(
    {
        "Matmul": _matmul,
        "Einsum": lambda call: _einsum(
            call.operation.subscripts, [(1, *shape) for shape in call.inputs], call.output
        ),
        "Softmax LogSoftmax": _per_element(_SOFTMAX),
        "BroadcastTo Cast Concatenate Copy DepthToSpace Diagonal ExpandDims Flip GetItem": _free,
        "Hstack Moveaxis Pad Ravel Repeat Reshape Roll Slice SpaceToDepth Split Squeeze": _free,
        "Stack StopGradient Swapaxes Take Tile Transpose Unstack Vstack OnesLike ZerosLike": _free,
    }
)
