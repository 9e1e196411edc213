"""Search for an int8 version of an ONNX model that agrees with the fp32 model, with as few layers in fp32 as possible.

Activations are uint8 with one scale per tensor. Weights are int8 with one scale per output channel, and use 7 bits:
this way the sums of products cannot overflow on CPUs without dot-product instructions (x86 before VNNI), so the outputs
and the result of the parity check are the same on every CPU. GPTQ more than makes up for the missing bit.
"""

from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from cifarx_export.formats.onnx.int8.calibration import METHODS, calibrate
from cifarx_export.formats.onnx.int8.gain import check_gain, int8_share
from cifarx_export.formats.onnx.int8.gptq import quantize_weights
from cifarx_export.formats.onnx.int8.graph import insert_qdq, prepare_for_quantization, tensors_to_calibrate
from cifarx_export.formats.onnx.int8.inference import open_session, run_in_batches
from cifarx_export.formats.onnx.int8.layers import Layer, find_layers, macs_per_image
from cifarx_export.formats.registry import ConversionSource
from cifarx_export.parity.checks import Check
from cifarx_serve.errors import DataError, UsageError
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.scores import applicable_labels

CALIBRATION_IMAGES: Final = 512

AGREEMENT_TARGETS: Final = (0.99, 0.992, 0.994, 0.998, 1.0)
"""Agreement on held-out training images at which a search ends. The first is the tolerance of the parity check."""

MAX_CANDIDATES: Final = 4

_HELD_OUT_IMAGES: Final = (128, 8192)
_SENSITIVITY_IMAGES: Final = (16, 256)
"""Lowest and highest number of images to compare a candidate on, and to measure the sensitivity of a layer on."""

_MAC_BUDGET: Final = 10**12
"""Multiply-accumulate operations that one comparison may take. Large networks are compared on fewer images."""

_PROTOBUF_LIMIT: Final = 2**31 - 1


class MixedPrecision(NamedTuple):
    """A configuration to try: the calibration method, and the layers that stay in fp32."""

    method: str
    fp32_layers: tuple[Layer, ...]


class Score(NamedTuple):
    """The quality of a quantized model. Scores are ordered by agreement first, then by error.

    Attributes:
        agreement: fraction of the images with the same prediction as in fp32: the class, or the set of labels.
        negative_error: minus the mean squared error of the outputs, relative to their mean square.
    """

    agreement: float
    negative_error: float


class _Trial(NamedTuple):
    score: Score
    choice: MixedPrecision


class QuantizationSearch:
    """Quantizes an fp32 model to int8, with layers in mixed precision where the agreement requires it.

    Calibration and GPTQ run once, in the constructor. Scores are kept, so no choice is evaluated twice.

    Args:
        model: an fp32 model from `input`, float32 (batch, *input.shape), to its only output. It is not modified.
        source: provides the training images, and how many of them to calibrate on.

    Raises:
        UsageError: the number of calibration images is below 1 or leaves no images to compare on, or the model exceeds
            protobuf's limit of 2 GB.
        DataError: there are fewer than two training images.
    """

    def __init__(self, model: ModelProto, source: ConversionSource) -> None:
        _check_request(model, source)
        self._progress = source.progress
        self._spec = source.spec
        self._model = prepare_for_quantization(model)
        self._macs = macs_per_image(self._model)
        self._total_macs = sum(self._macs.values())
        images, held_out = _split_images(source, _affordable_images(self._total_macs, _HELD_OUT_IMAGES))
        self._calibration_images = len(images)
        calibration = normalize(images, source.spec.input)
        self._progress(f"int8: calibrating on {len(images)} training images")
        self._ranges = calibrate(self._model, tensors_to_calibrate(self._model), calibration)
        self._progress("int8: quantizing the weights with GPTQ")
        every_layer = insert_qdq(self._model, self._ranges["minmax"])
        self._weights = quantize_weights(self._model, every_layer, calibration)
        self._inputs = normalize(held_out, source.spec.input)
        self._expected = run_in_batches(open_session(self._model), self._inputs)
        self._trials: dict[MixedPrecision, _Trial] = {}
        self._by_sensitivity: list[Layer] = []

    def candidates(self) -> Iterator[tuple[ModelProto, dict[str, str]]]:
        """Yield quantized models, each with the facts that its spec records.

        The first model has the fewest layers in fp32 that reach the lowest of `AGREEMENT_TARGETS`. If it fails its
        parity check, the caller takes the next model, which has to reach the next target above the agreement of the
        last. The iteration ends when the search finds no other model, so no model is yielded twice.
        """
        yielded: list[MixedPrecision] = []
        reached = 0.0
        while len(yielded) < MAX_CANDIDATES:
            target = next((value for value in AGREEMENT_TARGETS if value > reached), AGREEMENT_TARGETS[-1])
            score, choice = self.find(target)
            if choice in yielded:
                return
            reached = score.agreement
            if reached < target:
                self._progress(f"int8: best agreement found {reached:.2%}, below {target:.2%}")
            yielded.append(choice)
            model = self.build(choice)
            yield model, self._describe(choice, reached, model)

    def find(self, target: float) -> _Trial:
        """Return the choice with the fewest layers in fp32 that reaches an agreement, or the best one if none does.

        The best calibration method is chosen first. If it misses the target, layers stay in fp32, starting with those
        whose quantization costs the most agreement for the speed that it gains.
        """
        best = max((self._evaluate(MixedPrecision(method, ())) for method in METHODS), key=_score)
        layers = find_layers(self._model)
        if best.score.agreement >= target or len(layers) < 2:
            return best
        method = best.choice.method
        self._by_sensitivity = self._by_sensitivity or self._rank_by_sensitivity(method, layers)
        # One layer with weights is always quantized, or the model would not be int8.
        quantized = next(layer for layer in reversed(self._by_sensitivity) if layer.has_weights)
        return self._find_fewest(method, [layer for layer in self._by_sensitivity if layer != quantized], best, target)

    def build(self, choice: MixedPrecision) -> ModelProto:
        """Return the quantized model."""
        fp32_nodes = [node for layer in choice.fp32_layers for node in layer.nodes]
        model = insert_qdq(self._model, self._ranges[choice.method], fp32_nodes)
        for tensor in model.graph.initializer:
            if tensor.name in self._weights:
                tensor.CopyFrom(numpy_helper.from_array(self._weights[tensor.name], tensor.name))
        return model

    def check_gain(self, model: ModelProto) -> Check:
        """Check that a quantized model has gained something: multiplications in int8, or a smaller size."""
        return check_gain(model, self._model, self._macs)

    def _describe(self, choice: MixedPrecision, agreement: float, model: ModelProto) -> dict[str, str]:
        return {
            "calibration": f"{choice.method}, {self._calibration_images} training images",
            "weights": "7 bits, per channel, rounded by GPTQ",
            "fp32 layers": ", ".join(layer.name for layer in choice.fp32_layers) or "none",
            "in int8": f"{int8_share(model, self._macs):.0%} of the multiplications",
            "held-out agreement": f"{agreement:.2%} of {len(self._inputs):,} training images",
        }

    def _evaluate(self, choice: MixedPrecision) -> _Trial:
        if choice not in self._trials:
            score = self._compute_score(choice, len(self._inputs))
            layers = f" with {len(choice.fp32_layers)} layers in fp32" if choice.fp32_layers else ""
            self._progress(f"int8: {choice.method}{layers}: agreement {score.agreement:.2%}")
            self._trials[choice] = _Trial(score, choice)
        return self._trials[choice]

    def _compute_score(self, choice: MixedPrecision, images: int) -> Score:
        """Compare with the fp32 model on this number of held-out images, evenly spread."""
        rows = np.linspace(0, len(self._inputs) - 1, images).round().astype(np.int64)
        outputs, expected = run_in_batches(open_session(self.build(choice)), self._inputs[rows]), self._expected[rows]
        error = np.square(outputs.astype(np.float64) - expected).mean() / max(np.square(expected).mean(), 1e-12)
        same = applicable_labels(outputs, self._spec) == applicable_labels(expected, self._spec)
        agreement = float(same.all(axis=1).mean())
        return Score(agreement, -float(np.nan_to_num(error, nan=np.inf)))

    def _rank_by_sensitivity(self, method: str, layers: Sequence[Layer]) -> list[Layer]:
        """Sort layers by the error with only that layer quantized, divided by what the layer costs in fp32.

        The errors of layers nearly add up, because their rounding errors are independent, so one run per layer gives
        the order. Quantizing all layers but one would tell less: of two sensitive layers, each would hide the other.
        """
        images = min(_affordable_images(self._total_macs * len(layers), _SENSITIVITY_IMAGES), len(self._inputs))

        def sensitivity(layer: Layer) -> float:
            others = tuple(other for other in layers if other != layer)
            return -self._compute_score(MixedPrecision(method, others), images).negative_error / layer.fp32_cost

        self._progress(f"int8: measuring the sensitivity of {len(layers)} layers on {images} images")
        sensitivities = {layer.name: sensitivity(layer) for layer in layers}
        return sorted(layers, key=lambda layer: -sensitivities[layer.name])

    def _find_fewest(self, method: str, order: Sequence[Layer], best: _Trial, target: float) -> _Trial:
        """Keep 1, 2, 4 … layers in fp32 until the target is reached, then bisect; takes about 2 log2(layers) runs."""
        low, high = 0, 1
        while True:
            reached = self._evaluate(MixedPrecision(method, tuple(order[:high])))
            best = max(best, reached, key=_score)
            if reached.score.agreement >= target:
                break
            if high == len(order):
                return best
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            trial = self._evaluate(MixedPrecision(method, tuple(order[:middle])))
            if trial.score.agreement >= target:
                reached, high = trial, middle
            else:
                low = middle
        return reached


def _score(trial: _Trial) -> Score:
    return trial.score


def _affordable_images(macs: int, bounds: tuple[int, int]) -> int:
    """Return the number of images that `_MAC_BUDGET` allows, within bounds. `macs` is per image."""
    low, high = bounds
    return max(low, min(high, _MAC_BUDGET // max(1, macs)))


def _check_request(model: ModelProto, source: ConversionSource) -> None:
    images = source.options.calibration_images
    if images is not None and images < 1:
        raise UsageError(
            f"{images} calibration images are too few", f"give 1 or more; the default is {CALIBRATION_IMAGES}"
        )
    if (size := model.ByteSize()) > _PROTOBUF_LIMIT:
        raise UsageError(
            f"the network is too large for int8, {size / 2**30:.1f} GB",
            "use --precision fp16; the limit of protobuf is 2 GB",
        )


def _split_images(source: ConversionSource, held_out: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images to calibrate on and about `held_out` others to compare on, both spread over the training split."""
    requested = source.options.calibration_images
    count = CALIBRATION_IMAGES if requested is None else requested
    images = source.load_training_images(count + held_out)
    if len(images) < 2:
        raise DataError(
            f"the dataset has {len(images)} training images",
            "int8 needs at least 2: one to calibrate on and one to compare on",
        )
    if requested is None:
        count = min(count, len(images) // 2)
    elif count >= len(images):
        raise UsageError(
            f"{count} calibration images leave none of the {len(images)} training images to compare on", "give fewer"
        )
    is_calibration = np.zeros(len(images), np.bool_)
    is_calibration[np.linspace(0, len(images) - 1, count).round().astype(np.int64)] = True
    return images[is_calibration], images[~is_calibration]
