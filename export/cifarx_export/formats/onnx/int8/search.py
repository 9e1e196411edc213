"""An ONNX network in 8 bits: quantized, compared with itself in fp32, and layers left alone until the two agree.

Activations are uint8, a scale a tensor; weights int8, a scale an output channel, of 7 bits. With 7 the product sums of
a CPU without dot-product instructions (x86 before VNNI) cannot overflow, so the file answers the same on every CPU, and
its proof holds there; rounding the weights well wins back more than the bit (`onnx_int8_rounding`).
"""

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import numpy_helper

from cifarx_export.formats.onnx.int8.calibration import METHODS, Ranges, calibrate
from cifarx_export.formats.onnx.int8.gptq import round_weights
from cifarx_export.formats.onnx.int8.graph import prepare, quantized, rounded_tensors
from cifarx_export.formats.onnx.int8.layers import Layer, find_layers, macs_per_image, run_in_batches, session
from cifarx_export.formats.registry import Source
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import scale
from cifarx_serve.progress import Progress

CALIBRATION_IMAGES: Final = 512

TARGETS: Final = (0.99, 0.992, 0.994, 0.998, 1.0)
"""Agreement on held-out training images that ends the search: the gate's, and after a failed proof the next that the
failed network does not reach."""

_HELD_OUT: Final = (128, 8192)
_SENSITIVITY: Final = (16, 256)
_MACS: Final = 10**12
"""What one comparison may cost, in multiplications: large networks are compared on fewer inputs, within the bounds."""

_KEPT: Final = "int8 search"
"""Where an attempt leaves what the next one, or the next format, need not do again."""

_PROTOBUF_LIMIT: Final = 2**31 - 1


class Score(NamedTuple):
    """Orders candidates: the share of the inputs with the fp32 network's argmax, then minus the relative error."""

    agreement: float
    closeness: float


class _Candidate(NamedTuple):
    """A choice of ranges and of layers left in fp32."""

    method: str
    left: tuple[Layer, ...]


class _Found(NamedTuple):
    score: Score
    candidate: _Candidate


def quantize(model: Any, source: Source) -> tuple[Any, dict[str, str]]:
    """Quantize an fp32 network with `source.training_images`, and say what was chosen.

    Args:
        model: an `onnx.ModelProto` from `input`, float32 (batch, 3, height, width), to `logits`. Not changed.
        source: its images, and how many of them to calibrate on.

    Raises:
        UsageError: fewer than one calibration image, more than there are, or a network above protobuf's 2 GB.
        DataError: fewer than two training images.
    """
    if _KEPT not in source.kept:
        source.kept[_KEPT] = _start(model, source)
    search: _Search = source.kept[_KEPT]
    reached = search.reached if source.attempt else 0.0
    target = next((value for value in TARGETS[source.attempt :] if value > reached), TARGETS[-1])
    score, candidate = search.run(target)
    search.reached = score.agreement
    if score.agreement < target:
        source.progress(f"int8: {score.agreement:.2%} is the best that was found; the proof decides")
    facts = {
        "calibration": f"{candidate.method}, {search.calibrated} training images",
        "weights": "7 bits, per channel, rounded by GPTQ",
        "fp32 layers": ", ".join(layer.name for layer in candidate.left) or "none",
        "in int8": f"{search.share(candidate):.0%} of the multiplications",
        "held-out agreement": f"{score.agreement:.2%} of {len(search.inputs):,} training images",
    }
    return search.build(candidate), facts


def _start(model: Any, source: Source) -> "_Search":
    wanted = source.options.calibration_images
    if wanted is not None and wanted < 1:
        raise UsageError(f"{wanted} calibration images", f"give 1 or more; {CALIBRATION_IMAGES} is the default")
    if (size := model.ByteSize()) > _PROTOBUF_LIMIT:
        raise UsageError(f"the network takes {size / 2**30:.1f} GB", "int8 needs it in one file, at most 2 GB")
    prepared = prepare(model)
    work = macs_per_image(prepared)
    images, held_out = _split_images(source, wanted, _affordable(sum(work.values()), _HELD_OUT))
    calibration = scale(images, source.spec.input)
    source.progress(f"int8: calibrating on {len(images)} training images")
    ranges = calibrate(prepared, rounded_tensors(prepared), calibration)
    source.progress("int8: rounding the weights")
    weights = round_weights(prepared, quantized(prepared, ranges["minmax"]), calibration)
    return _Search(prepared, ranges, weights, scale(held_out, source.spec.input), work, len(images), source.progress)


class _Search:
    """Finds the candidate that leaves little in fp32 and reaches a target agreement, or the best one.

    Attributes:
        reached: agreement of the last that was found; 0 before.
    """

    def __init__(
        self,
        model: Any,
        ranges: dict[str, Ranges],
        weights: dict[str, NDArray[np.int8]],
        inputs: NDArray[np.float32],
        work: dict[str, int],
        calibrated: int,
        progress: Progress,
    ) -> None:
        self.reached = 0.0
        self.inputs = inputs
        self.calibrated = calibrated
        self._model = model
        self._ranges = ranges
        self._weights = weights
        self._expected = run_in_batches(session(model), inputs)
        self._work = work
        self._macs = sum(work.values())
        self._progress = progress
        self._tried: dict[_Candidate, _Found] = {}
        self._order: list[Layer] = []

    def run(self, target: float) -> _Found:
        """Methods first, then layers: those that cost most of the agreement for the speed they give go first.

        Again with another target it goes on from what it has tried.
        """
        best = max((self._try(_Candidate(method, ())) for method in METHODS), key=_rank)
        layers = find_layers(self._model)
        if best.score.agreement >= target or len(layers) < 2:
            return best
        method = best.candidate.method
        self._order = self._order or self._by_harm(method, layers)
        kept = next(layer for layer in reversed(self._order) if layer.weighted)  # without one it would not be int8
        return self._fewest(method, [layer for layer in self._order if layer != kept], best, target)

    def share(self, candidate: _Candidate) -> float:
        """Of the multiplications, those in int8."""
        in_fp32 = sum(self._work.get(node, 0) for layer in candidate.left for node in layer.nodes)
        return 1 - in_fp32 / max(1, self._macs)

    def build(self, candidate: _Candidate) -> Any:
        """The quantized model proto."""
        left = [node for layer in candidate.left for node in layer.nodes]
        model = quantized(self._model, self._ranges[candidate.method], left)
        for tensor in model.graph.initializer:
            if tensor.name in self._weights:
                tensor.CopyFrom(numpy_helper.from_array(self._weights[tensor.name], tensor.name))
        return model

    def _try(self, candidate: _Candidate) -> _Found:
        if candidate in self._tried:
            return self._tried[candidate]
        score = self._score(candidate, len(self.inputs))
        left = f" with {len(candidate.left)} layers in fp32" if candidate.left else ""
        self._progress(f"int8: {candidate.method}{left} {score.agreement:.2%}")
        self._tried[candidate] = _Found(score, candidate)
        return self._tried[candidate]

    def _score(self, candidate: _Candidate, count: int) -> Score:
        """On so many inputs, spread over all."""
        rows = np.linspace(0, len(self.inputs) - 1, count).round().astype(np.int64)
        found, expected = run_in_batches(session(self.build(candidate)), self.inputs[rows]), self._expected[rows]
        error = np.square(found.astype(np.float64) - expected).mean() / max(np.square(expected).mean(), 1e-12)
        return Score(float((found.argmax(1) == expected.argmax(1)).mean()), -float(np.nan_to_num(error, nan=np.inf)))

    def _by_harm(self, method: str, layers: Sequence[Layer]) -> list[Layer]:
        """By the error with only that layer quantized, for the share of the work that it is.

        Errors of layers nearly add up (their rounding is independent), so one run a layer tells the order. To leave
        out one at a time would tell less: of two bad layers each would hide the other.
        """
        count = min(_affordable(self._macs * len(layers), _SENSITIVITY), len(self.inputs))

        def harm(layer: Layer) -> float:
            others = tuple(other for other in layers if other != layer)
            return -self._score(_Candidate(method, others), count).closeness / layer.cost

        self._progress(f"int8: how much each of {len(layers)} layers harms, on {count} inputs")
        harms = {layer.name: harm(layer) for layer in layers}
        return sorted(layers, key=lambda layer: -harms[layer.name])

    def _fewest(self, method: str, order: Sequence[Layer], best: _Found, target: float) -> _Found:
        """1, 2, 4 ... layers left until the target holds, then by halves the fewest; about 2 log2(layers) runs."""
        low, high = 0, 1
        while True:
            found = self._try(_Candidate(method, tuple(order[:high])))
            best = max(best, found, key=_rank)
            if found.score.agreement >= target:
                break
            if high == len(order):
                return best
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._try(_Candidate(method, tuple(order[:middle])))
            if tried.score.agreement >= target:
                found, high = tried, middle
            else:
                low = middle
        return found


def _rank(found: _Found) -> Score:
    return found.score


def _affordable(macs: int, bounds: tuple[int, int]) -> int:
    """How many inputs `_MACS` pays for."""
    low, high = bounds
    return max(low, min(high, _MACS // max(1, macs)))


def _split_images(source: Source, wanted: int | None, held_out: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Images to calibrate on, and others to compare on, both spread over the training split."""
    count = CALIBRATION_IMAGES if wanted is None else wanted
    images = source.training_images(count + held_out)
    if len(images) < 2:
        raise DataError(f"{len(images)} training images", "int8 needs two or more: to calibrate on, and to compare on")
    if wanted is None:
        count = min(count, len(images) // 2)
    elif count >= len(images):
        raise UsageError(
            f"{count} calibration images of {len(images)}", "give fewer: the quantized network is tried on the others"
        )
    calibrated = np.zeros(len(images), np.bool_)
    calibrated[np.linspace(0, len(images) - 1, count).round().astype(np.int64)] = True
    return images[calibrated], images[~calibrated]
