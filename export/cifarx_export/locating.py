"""Locating: the first layer of an artifact that answers otherwise than its reference's.

Both networks are read as a list of layers, the operations that have a weight. A layer of one belongs to a layer of the
other by the name of its weight, and where names say nothing by the weight's shape, in the order of execution. A
BatchNorm that an optimizer folded into the convolution before it is compared where the convolution now ends. What lies
between two layers has no weight, and is told by what it feeds to the next one.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats import PRECISIONS
from cifarx_serve.backends.registry import backend_for, read_spec
from cifarx_serve.errors import ModelFileError, UsageError
from cifarx_serve.preprocess import model_input
from cifarx_serve.spec import ModelSpec
from cifarx_serve.threads import available_cpus

TOLERANCE: Final = 2e-5
"""Of a value in fp32, absolute as a share of the layer's largest value, and relative to the value itself.

Sums in another order cost a few parts in a million; the gate of the logits is 1e-4, so this is inside it.
"""

FLOORS: Final = {"fp32": 0.0, "fp16": 2.0**-9, "int8": 2.0**-5}
"""A relative error (root of squares) that rounding alone gives any layer: a few units in the last place."""

_LAYERS_AT_ONCE: Final = 16
"""The values of so many layers of both networks are in memory."""

Key: TypeAlias = tuple[str, int, bool] | str
"""A value inside a network: a tensor's name, or a module's name, which of its calls, and whether its output."""

Values: TypeAlias = dict[Key, NDArray[Any]]


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


def _open(path: Path, model: str | None) -> "_Network":
    return _OnnxNetwork(path) if _is_onnx(path) else _TorchNetwork(path, model)


class _Layer(NamedTuple):
    """An operation with a weight.

    Attributes:
        name: of the module that has the weight, as far as the file says it.
        call: how many layers before it have that name.
        label: what it is, for the report.
        weight: the weight's shape, its axes in ascending order: some formats transpose.
        is_norm: whether it is a BatchNorm.
        fed: what it takes.
        feeder: what made that, for the report.
        result: what it gives.
    """

    name: str
    call: int
    label: str
    weight: tuple[int, ...]
    is_norm: bool
    fed: Key
    feeder: str
    result: Key


class _Network(ABC):
    """A network whose insides can be looked into.

    Attributes:
        layers: in the order of execution.
        output: the logits.
        output_label: what makes them, for the report.
    """

    spec: ModelSpec
    layers: list[_Layer]
    output: Key
    output_label: str

    @abstractmethod
    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        """These values for the images, run on the CPU."""

    def norm_after(self, layer: _Layer) -> _Layer | None:
        """The BatchNorm that takes the layer's result as it is."""
        return next((other for other in self.layers if other.is_norm and other.fed == layer.result), None)


_WEIGHTED: Final = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "BatchNormalization",
        "LayerNormalization",
        "InstanceNormalization",
        "GroupNormalization",
    }
)
"""ONNX operators whose second input is the weight."""

_SAME_WEIGHT: Final = frozenset({"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity", "Reshape"})
"""ONNX operators between a stored weight and the layer that has it."""


class _OnnxNetwork(_Network):
    """An ONNX file; inside values are made outputs of the graph, for ONNX Runtime to give."""

    def __init__(self, path: Path) -> None:
        import onnx
        from onnx import inliner

        self.spec = read_spec(path)
        self._path = path
        try:
            model = onnx.load(path)
        except Exception as error:  # what its parsers raise has no common base
            raise ModelFileError(f"{path} is not an ONNX model ({error})", "export it again") from error
        self._model = inliner.inline_local_functions(model) if model.functions else model
        graph = self._model.graph
        stored = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._input = next(port.name for port in graph.input if port.name not in stored)
        self._producers = {name: node for node in graph.node for name in node.output}
        self._constants = stored | {
            node.output[0]: tuple(attribute.t.dims)
            for node in graph.node
            if node.op_type == "Constant"
            for attribute in node.attribute
            if attribute.name == "value"
        }
        self.layers = list(self._find_layers())
        self.output = graph.output[0].name
        self.output_label = self._maker(graph.output[0].name)

    def _find_layers(self) -> Iterator[_Layer]:
        calls: Counter[str] = Counter()
        for node in self._model.graph.node:
            weight = self._stored_weight(node.input[1]) if node.op_type in _WEIGHTED else None
            if weight is None:
                continue
            name = weight.partition(".weight")[0]
            yield _Layer(
                name,
                calls[name],
                _describe(node),
                tuple(sorted(self._constants[weight])),
                node.op_type == "BatchNormalization",
                node.input[0],
                self._maker(node.input[0]),
                self._with_bias(node),
            )
            calls[name] += 1

    def _stored_weight(self, name: str) -> str | None:
        """The initializer or constant that an input comes from, or None where it is computed from the image."""
        while name not in self._constants:
            producer = self._producers.get(name)
            if producer is None or producer.op_type not in _SAME_WEIGHT:
                return None
            name = producer.input[0]
        return name

    def _with_bias(self, node: Any) -> str:
        """A layer's result; a MatMul's is that of the Add of its bias, where one follows."""
        result: str = node.output[0]
        if node.op_type == "MatMul":
            takers = [other for other in self._model.graph.node if result in other.input]
            if len(takers) == 1 and takers[0].op_type == "Add":
                other = next((name for name in takers[0].input if name != result), "")
                if len(self._constants.get(other, ())) == 1:
                    return str(takers[0].output[0])
        return result

    def _maker(self, name: str) -> str:
        return _describe(self._producers[name]) if name in self._producers else "the network's input"

    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        feed = model_input(images, self.spec)
        names = [str(key) for key in keys if key != self._input]
        try:
            found = self._session(names).run(names, {self._input: feed})
        except Exception as error:  # the library's errors have no common base
            reason = str(error).strip().partition("\n")[0]
            raise ModelFileError(
                f"{self._path} does not run layer by layer ({reason})", "leave --locate out"
            ) from error
        return dict(zip([*names, self._input], [*found, feed], strict=True))

    def _session(self, names: Sequence[str]) -> Any:
        import onnx
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised too
        options.intra_op_num_threads = available_cpus()
        outputs = self._model.graph.output
        own = len(outputs)
        outputs.extend(onnx.ValueInfoProto(name=name) for name in names if name != self.output)
        try:
            return onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        finally:
            del outputs[own:]


def _describe(node: Any) -> str:
    return f"{node.op_type} node '{node.name}'" if node.name else f"{node.op_type} node of '{node.output[0]}'"


class _TorchNetwork(_Network):
    """A checkpoint's network; inside values are seen by hooks."""

    def __init__(self, path: Path, model: str | None) -> None:
        from cifarx_train.checkpoint import load_checkpoint

        loaded = load_checkpoint(path, model)
        self.spec = loaded.spec
        self._module = loaded.build()
        self.output = ("", 0, True)
        self.output_label = ""
        self.layers = self._find_layers()

    def _find_layers(self) -> list[_Layer]:
        """By running it once; a module that is called several times is several layers."""
        from torch.nn.modules.batchnorm import _BatchNorm

        taken = self.spec.input
        layers: list[_Layer] = []
        last: tuple[Any, int, Key] = (None, 0, "")

        def see(key: tuple[str, int, bool], module: Any, tensor: Any) -> None:
            nonlocal last
            name, call, is_output = key
            if not name:
                return
            if not is_output:
                # The very tensor that the last layer gave, and nothing wrote into it since.
                straight = tensor is last[0] and tensor._version == last[1]
                is_norm = isinstance(module, _BatchNorm)
                weight = tuple(sorted(module.weight.shape))
                fed = last[2] if straight else key
                label = type(module).__name__
                layers.append(_Layer(name, call, label, weight, is_norm, fed, "", (name, call, True)))
            else:
                last = (tensor, tensor._version, key)

        self._run(np.zeros((1, taken.height, taken.width, taken.channels), np.uint8), see)
        return layers

    def values(self, keys: set[Key], images: NDArray[np.uint8]) -> Values:
        found: Values = {}

        def see(key: tuple[str, int, bool], _module: Any, tensor: Any) -> None:
            if key in keys:
                found[key] = tensor.clone().numpy()  # a layer that works in place would change it

        self._run(images, see)
        return found

    def _run(self, images: NDArray[np.uint8], see: Callable[[tuple[str, int, bool], Any, Any], None]) -> None:
        """Run the network and show what each module with a weight takes and gives, and the logits."""
        import torch

        calls: Counter[str] = Counter()
        handles = []

        def watch(name: str, module: Any) -> None:
            def before(_module: Any, taken: tuple[Any, ...]) -> None:
                see((name, calls[name], False), module, taken[0])

            def after(_module: Any, _taken: Any, given: Any) -> None:
                see((name, calls[name], True), module, given)
                calls[name] += 1

            handles.extend([module.register_forward_pre_hook(before), module.register_forward_hook(after)])

        try:
            for name, module in self._module.named_modules():
                if not name or isinstance(getattr(module, "weight", None), torch.Tensor):
                    watch(name, module)
            with torch.no_grad():
                self._module(torch.from_numpy(model_input(images, self.spec)))
        finally:
            for handle in handles:
                handle.remove()


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


def _points(ours: _Network, theirs: _Network, images: NDArray[np.uint8]) -> Iterator[_Point]:
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


def _pairs(ours: _Network, theirs: _Network) -> list[_Pair]:
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


def _matched(ours: _Network, theirs: _Network) -> list[tuple[_Layer, _Layer]]:
    """Layers of both that are the same one, in the order of the artifact's."""
    left = list(ours.layers)
    found: dict[_Layer, _Layer] = {}

    def match(other: _Layer, same: Callable[[_Layer], bool]) -> None:
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
