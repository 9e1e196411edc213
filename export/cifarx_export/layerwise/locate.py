"""Locating: the first layer of an artifact that answers otherwise than its reference's.

Both networks are read as a list of layers, the operations that have a weight. A layer of one belongs to a layer of the
other by the name of its weight, and where names say nothing by the weight's shape, in the order of execution. A
BatchNorm that an optimizer folded into the convolution before it is compared where the convolution now ends. What lies
between two layers has no weight, and is told by what it feeds to the next one.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.registry import PRECISIONS
from cifarx_export.layerwise.network import Key, Layer, Network
from cifarx_export.layerwise.onnx import OnnxNetwork
from cifarx_export.layerwise.torch import TorchNetwork
from cifarx_serve.backends.registry import backend_for
from cifarx_serve.errors import UsageError

TOLERANCE: Final = 2e-5
"""Of a value in fp32, absolute as a share of the layer's largest value, and relative to the value itself.

Sums in another order cost a few parts in a million; the gate of the logits is 1e-4, so this is inside it.
"""

FLOORS: Final = {"fp32": 0.0, "fp16": 2.0**-9, "int8": 2.0**-5}
"""A relative error (root of squares) that rounding alone gives any layer: a few units in the last place."""

_LAYERS_AT_ONCE: Final = 16
"""The values of so many layers of both networks are in memory."""


class Located(NamedTuple):
    """The layer, and its worst value.

    Attributes:
        rule: what singles it out.
        layer: its name, of the reference's module or weight.
        node: what it is in the artifact; empty where that says no more.
        shape: of its output.
        error: the largest absolute error; infinite where a value is not finite.
        position: of that error.
        reference, artifact: the values there.
        before: layers before it, in the order of execution.
        before_error: the largest absolute error of those.
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
        return (
            f"{self.rule}: {self.layer}{node}, {self.shape}: max |Δ| {self.error:.1e} at {self.position}: "
            f"reference {self.reference:.6g}, artifact {self.artifact:.6g}; "
            f"of {self.before} before it, max |Δ| {self.before_error:.0e}"
        )


def locate(artifact: Path, reference: Path, images: NDArray[np.uint8], model: str | None = None) -> Located | None:
    """Where an artifact leaves its reference, on the CPU; None where no layer that both have does.

    In fp32 it is the first layer outside `TOLERANCE`. Lower precisions round in every layer: there it is the layer
    whose relative error rises most above that of what it was fed.

    Args:
        artifact: an ONNX file or a checkpoint.
        reference: the same.
        images: uint8 (N, height, width, 3) at the network's size, best the one with the worst answer.
        model: the network's name, for a checkpoint that does not say it itself.

    Raises:
        UsageError: a file of another format: its layers cannot be looked into.
        ModelFileError: a file is damaged, does not run on the images, or is over 2 GB.
    """
    require_locatable(artifact, reference)
    ours, theirs = _open(reference, model), _open(artifact, model)
    precision = max(ours.spec.precision, theirs.spec.precision, key=PRECISIONS.index)
    points = _points(ours, theirs, images)
    if precision == "fp32":
        return _first_outside(points)
    return _largest_rise(points, FLOORS[precision])


def require_locatable(*paths: Path) -> None:
    """Refuse files whose layers cannot be looked into.

    Raises:
        UsageError: neither an ONNX file nor a checkpoint.
    """
    for path in paths:
        if not _is_onnx(path) and not _is_checkpoint(path):
            raise UsageError(
                f"the layers of {path} cannot be looked into", "leave --locate out, or give ONNX files or checkpoints"
            )


def _is_onnx(path: Path) -> bool:
    return path.name.endswith(".onnx")


def _is_checkpoint(path: Path) -> bool:
    """A file of no backend's may be a checkpoint under another name."""
    try:
        return backend_for(path).name == "pytorch"
    except UsageError:
        return True


def _open(path: Path, model: str | None) -> Network:
    return OnnxNetwork(path) if _is_onnx(path) else TorchNetwork(path, model)


class _Pair(NamedTuple):
    """A place that both networks have: what each calls its value there, and what the report calls it."""

    name: str
    node: str
    ours: Key
    theirs: Key
    is_layer: bool


class _Point(NamedTuple):
    """What was found at a place. `relative` is the root of the squares of the error over that of the reference."""

    pair: _Pair
    shape: tuple[int, ...]
    error: float
    position: tuple[int, ...]
    reference: float
    artifact: float
    relative: float
    outside: bool

    def located(self, rule: str, before: Sequence["_Point"]) -> Located:
        errors = [point.error for point in before]
        layers = sum(point.pair.is_layer for point in before)
        return Located(rule, self.pair.name, self.pair.node, *self[1:6], layers, max(errors, default=0.0))


def _points(ours: Network, theirs: Network, images: NDArray[np.uint8]) -> Iterator[_Point]:
    """Each place that can be compared, in the order of the artifact's execution; some layers in memory at a time."""
    pairs = _pairs(ours, theirs)
    for start in range(0, len(pairs), 2 * _LAYERS_AT_ONCE):
        part = pairs[start : start + 2 * _LAYERS_AT_ONCE]
        expected = ours.values({pair.ours for pair in part}, images)
        found = theirs.values({pair.theirs for pair in part}, images)
        for pair in part:
            point = _compare(pair, expected[pair.ours], found[pair.theirs])
            if point is not None:
                yield point


def _pairs(ours: Network, theirs: Network) -> list[_Pair]:
    """What each layer takes and gives, and the logits."""
    pairs = []
    for mine, other in _matched(ours, theirs):
        mine_norm, other_norm = ours.norm_after(mine), theirs.norm_after(other)
        name, result, other_result = mine.name, mine.result, other.result
        if mine_norm and not other_norm:
            name, result = f"{mine.name} + {mine_norm.name}", mine_norm.result
        if other_norm and not mine_norm:
            other_result = other_norm.result
        pairs.append(_Pair(f"what feeds {mine.name}", other.feeder, mine.fed, other.fed, False))
        pairs.append(_Pair(name, other.label, result, other_result, True))
    return [*pairs, _Pair("the logits", theirs.output_label, ours.output, theirs.output, True)]


def _matched(ours: Network, theirs: Network) -> list[tuple[Layer, Layer]]:
    """Layers of both that are the same one, in the order of the artifact's."""
    left = list(ours.layers)
    found: dict[Layer, Layer] = {}

    def match(other: Layer, same: Callable[[Layer], bool]) -> None:
        mine = next((layer for layer in left if same(layer)), None)
        if mine is not None:
            left.remove(mine)
            found[other] = mine

    for other in theirs.layers:
        match(other, lambda mine, other=other: mine[:2] == other[:2] and mine.is_norm == other.is_norm)  # type: ignore[misc]
    for other, mine in list(found.items()):
        folded = None if theirs.norm_after(other) else ours.norm_after(mine)
        if folded in left:
            left.remove(folded)
    for other in theirs.layers:
        if other not in found:
            match(other, lambda mine, other=other: mine[3:5] == other[3:5])  # type: ignore[misc]
    return [(found[other], other) for other in theirs.layers if other in found]


def _compare(pair: _Pair, reference: NDArray[Any], artifact: NDArray[Any]) -> _Point | None:
    """None where the two have not as many values, so that they are not the same thing."""
    if reference.size != artifact.size or not reference.size:
        return None
    expected = reference.astype(np.float64)
    found = artifact.astype(np.float64).reshape(expected.shape)
    with np.errstate(invalid="ignore"):
        delta = np.abs(found - expected)
    delta = np.where(np.isfinite(delta), delta, np.inf)
    worst = np.unravel_index(int(delta.argmax()), delta.shape)
    largest = float(np.abs(expected).max())
    norm = float(np.linalg.norm(expected))
    return _Point(
        pair,
        expected.shape,
        float(delta[worst]),
        tuple(map(int, worst)),
        float(expected[worst]),
        float(found[worst]),
        float(np.linalg.norm(delta)) / norm if norm else float(delta.max() and np.inf),
        bool((delta > TOLERANCE * (largest + np.abs(expected))).any()),
    )


def _first_outside(points: Iterator[_Point]) -> Located | None:
    before: list[_Point] = []
    for point in points:
        if point.outside:
            return point.located("first layer outside the tolerance", before)
        before.append(point)
    return None


def _largest_rise(points: Iterator[_Point], floor: float) -> Located | None:
    """What feeds a layer is held against the layers before it, and a layer against what feeds it."""
    best, located = 1.0, None
    fed = given = floor
    before: list[_Point] = []
    for point in points:
        base = fed if point.pair.is_layer else given
        rise = point.relative / max(base, floor)
        if rise > best:
            rule = f"largest rise of the relative error, from {base:.1%} to {point.relative:.1%}"
            best, located = rise, point.located(rule, before)
        if point.pair.is_layer:
            given = max(given, point.relative)
        fed = point.relative
        before.append(point)
    return located
