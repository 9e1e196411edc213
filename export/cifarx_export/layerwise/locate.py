"""Locate the first layer of an artifact whose output differs from the reference's.

Both networks are read as a list of layers, the operations that have a weight. Layers are matched by the name of their
weight and the index of the call. Layers whose names do not match are matched by weight shape, in execution order. A
BatchNorm that an optimizer folded into the convolution before it is compared at the output of the convolution.
Operations between two layers have no weight, so they are compared at the input of the next layer.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import PRECISIONS
from cifarx_export.layerwise.network import Layer, LayerwiseNetwork, TensorKey
from cifarx_export.layerwise.onnx import OnnxNetwork
from cifarx_export.layerwise.torch import TorchNetwork
from cifarx_serve.backends.registry import backend_for, backend_suffixes
from cifarx_serve.errors import UsageError
from cifarx_train.models.options import NO_OPTIONS, ModelOptions

TOLERANCE: Final = 2e-5
"""Tolerance of a value in fp32: absolute, as a share of the layer's largest value, plus relative to the value itself.

Summation in another order causes errors of a few parts in a million, and the tolerance of the logits is 1e-4: this
lies between the two.
"""

ROUNDING: Final = {"fp32": 0.0, "fp16": 2.0**-9, "int8": 2.0**-5}
"""Relative error (L2) that rounding alone causes in any layer, by precision: a few units in the last place."""

_LAYERS_PER_RUN: Final = 16
"""Number of layers whose values are held in memory at once, for each network."""


class LayerDifference(NamedTuple):
    """The layer that differs, and its largest error.

    Attributes:
        rule: why this layer was chosen.
        layer: name of the reference's module or weight.
        node: description of the layer in the artifact; may be empty.
        shape: shape of its output.
        error: largest absolute error; infinite if a value is not finite.
        position: index of that error in the output.
        reference, artifact: the values at that index.
        before: number of layers that run before it.
        before_error: largest absolute error of these layers.
    """

    rule: str
    layer: str
    node: str
    shape: tuple[int, ...]
    error: float
    position: tuple[int, ...]
    reference: float
    artifact: float
    before: int
    before_error: float

    def __str__(self) -> str:
        node = f" ({self.node})" if self.node else ""
        before = "1 layer" if self.before == 1 else f"{self.before} layers"
        return (
            f"{self.rule}: {self.layer}{node}, output {self.shape}: max |Δ| {self.error:.1e} at {self.position}, "
            f"reference {self.reference:.6g}, artifact {self.artifact:.6g}; "
            f"{before} before it, max |Δ| {self.before_error:.0e}"
        )


def locate(
    artifact: Path, reference: Path, images: NDArray[np.uint8], options: ModelOptions = NO_OPTIONS
) -> LayerDifference | None:
    """Return the layer where an artifact starts to differ from its reference, or None if no common layer differs.

    In fp32 this is the first layer outside `TOLERANCE`. Lower precisions round in every layer: there it is the layer
    whose relative error increases most over the relative error of its input. Both networks run on the CPU.

    Args:
        artifact: an ONNX file or a checkpoint.
        reference: an ONNX file or a checkpoint.
        images: uint8 (N, height, width, 3) at the network's input size, preferably the image with the largest error.
        options: what the user states about a checkpoint.

    Raises:
        UsageError: the format of a file gives no access to its layers.
        ModelFileError: a file is damaged, does not run on the images, or is over 2 GB.
    """
    require_locatable(artifact, reference)
    expected, actual = _open(reference, options), _open(artifact, options)
    precision = max(expected.spec.precision, actual.spec.precision, key=PRECISIONS.index)
    comparisons = _compare_all(expected, actual, images)
    if precision == "fp32":
        return _first_outside(comparisons)
    return _largest_increase(comparisons, ROUNDING[precision])


def require_locatable(*paths: Path) -> None:
    """Check that the layers of these files can be read.

    Raises:
        UsageError: a file is neither an ONNX file nor a checkpoint.
    """
    for path in paths:
        if not _is_onnx(path) and not _is_checkpoint(path):
            raise UsageError(
                f"the layers of {path} cannot be read", "leave --locate out, or give ONNX files or checkpoints"
            )


def _is_onnx(path: Path) -> bool:
    return path.name.endswith(backend_suffixes("onnxruntime"))


def _is_checkpoint(path: Path) -> bool:
    """Return whether this is a checkpoint; a file that no backend opens may be one with another suffix."""
    try:
        return backend_for(path).name == "pytorch"
    except UsageError:
        return True


def _open(path: Path, options: ModelOptions) -> LayerwiseNetwork:
    return OnnxNetwork(path) if _is_onnx(path) else TorchNetwork(path, options)


class _Pair(NamedTuple):
    """The same tensor in both networks: its names for the report, and its key in each network."""

    name: str
    node: str
    reference: TensorKey
    artifact: TensorKey
    is_layer: bool


class _Comparison(NamedTuple):
    """The values of a pair. `relative` is the relative error in the L2 norm."""

    pair: _Pair
    shape: tuple[int, ...]
    error: float
    position: tuple[int, ...]
    reference: float
    artifact: float
    relative: float
    outside: bool

    def difference(self, rule: str, before: Sequence["_Comparison"]) -> LayerDifference:
        return LayerDifference(
            rule=rule,
            layer=self.pair.name,
            node=self.pair.node,
            shape=self.shape,
            error=self.error,
            position=self.position,
            reference=self.reference,
            artifact=self.artifact,
            before=sum(other.pair.is_layer for other in before),
            before_error=max((other.error for other in before), default=0.0),
        )


def _compare_all(
    reference: LayerwiseNetwork, artifact: LayerwiseNetwork, images: NDArray[np.uint8]
) -> Iterator[_Comparison]:
    """Compare every pair in the order of the artifact's execution, with a few layers in memory at a time."""
    pairs = _pairs(reference, artifact)
    for start in range(0, len(pairs), 2 * _LAYERS_PER_RUN):
        part = pairs[start : start + 2 * _LAYERS_PER_RUN]
        expected = reference.activations({pair.reference for pair in part}, images)
        actual = artifact.activations({pair.artifact for pair in part}, images)
        for pair in part:
            comparison = _compare(pair, expected[pair.reference], actual[pair.artifact])
            if comparison is not None:
                yield comparison


def _pairs(reference: LayerwiseNetwork, artifact: LayerwiseNetwork) -> list[_Pair]:
    """Return the input and output of each layer, and the logits."""
    pairs = []
    for expected, actual in _match_layers(reference, artifact):
        expected_norm, actual_norm = reference.batch_norm_after(expected), artifact.batch_norm_after(actual)
        name, expected_output, actual_output = expected.name, expected.output, actual.output
        if expected_norm and not actual_norm:
            name, expected_output = f"{expected.name} + {expected_norm.name}", expected_norm.output
        if actual_norm and not expected_norm:
            actual_output = actual_norm.output
        pairs.append(_Pair(f"input of {expected.name}", actual.input_label, expected.input, actual.input, False))
        pairs.append(_Pair(name, actual.label, expected_output, actual_output, True))
    return [*pairs, _Pair("logits", artifact.output_label, reference.output, artifact.output, True)]


def _match_layers(reference: LayerwiseNetwork, artifact: LayerwiseNetwork) -> list[tuple[Layer, Layer]]:
    """Return the layers that both networks have, as (reference, artifact), in the order of the artifact's execution."""
    left = list(reference.layers)
    matched: dict[Layer, Layer] = {}

    def match(layer: Layer, same: Callable[[Layer, Layer], bool]) -> None:
        candidate = next((candidate for candidate in left if same(candidate, layer)), None)
        if candidate is not None:
            left.remove(candidate)
            matched[layer] = candidate

    for layer in artifact.layers:
        match(layer, lambda a, b: (a.name, a.call, a.is_norm) == (b.name, b.call, b.is_norm))
    for layer, candidate in list(matched.items()):
        folded = None if artifact.batch_norm_after(layer) else reference.batch_norm_after(candidate)
        if folded in left:
            left.remove(folded)
    for layer in artifact.layers:
        if layer not in matched:
            match(layer, lambda a, b: (a.weight_shape, a.is_norm) == (b.weight_shape, b.is_norm))
    return [(matched[layer], layer) for layer in artifact.layers if layer in matched]


def _compare(pair: _Pair, reference: NDArray[Any], artifact: NDArray[Any]) -> _Comparison | None:
    """Return None if the sizes differ: then the two are not the same tensor."""
    if reference.size != artifact.size or not reference.size:
        return None
    expected = reference.astype(np.float64)
    actual = artifact.astype(np.float64).reshape(expected.shape)
    with np.errstate(invalid="ignore"):
        delta = np.abs(actual - expected)
    delta = np.where(np.isfinite(delta), delta, np.inf)
    worst = np.unravel_index(int(delta.argmax()), delta.shape)
    largest = float(np.abs(expected).max())
    norm = float(np.linalg.norm(expected))
    return _Comparison(
        pair,
        expected.shape,
        float(delta[worst]),
        tuple(map(int, worst)),
        float(expected[worst]),
        float(actual[worst]),
        float(np.linalg.norm(delta)) / norm if norm else float(delta.max() and np.inf),
        bool((delta > TOLERANCE * (largest + np.abs(expected))).any()),
    )


def _first_outside(comparisons: Iterator[_Comparison]) -> LayerDifference | None:
    before: list[_Comparison] = []
    for comparison in comparisons:
        if comparison.outside:
            return comparison.difference("first layer outside the tolerance", before)
        before.append(comparison)
    return None


def _largest_increase(comparisons: Iterator[_Comparison], rounding: float) -> LayerDifference | None:
    """Compare the error of a layer's output with that of its input, and its input with the outputs before it."""
    largest, difference = 1.0, None
    input_error = output_error = rounding
    before: list[_Comparison] = []
    for comparison in comparisons:
        base = input_error if comparison.pair.is_layer else output_error
        increase = comparison.relative / max(base, rounding)
        if increase > largest:
            rule = f"largest increase of the relative error, from {base:.1%} to {comparison.relative:.1%}"
            largest, difference = increase, comparison.difference(rule, before)
        if comparison.pair.is_layer:
            output_error = max(output_error, comparison.relative)
        input_error = comparison.relative
        before.append(comparison)
    return difference
