"""Search for an int8 version of a network that agrees with it in fp32, with as few layers in fp32 as possible."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.int8.calibration import METHODS
from cifarx_export.formats.registry import ConversionSource
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

_BATCH_SIZE: Final = 64

_STAGE_IMAGES: Final = 512
"""Number of images after which a comparison ends if the choice can no longer reach its target."""

_REPORT_EVERY_S: Final = 10.0
"""Time between two lines about the sensitivities."""

_MAC_BUDGET: Final = 10**12
"""Multiply-accumulate operations that one comparison may take. Large networks are compared on fewer images."""


Network: TypeAlias = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Returns the outputs, (N, output_size), of inputs, (N, *input.shape)."""


class Layer(NamedTuple):
    """Nodes that are quantized together, or left in fp32 together.

    Attributes:
        name: name of the node, or what the nodes are.
        nodes: names of the nodes.
        fp32_cost: what leaving the layer in fp32 costs in speed, as a fraction of the whole network.
        has_weights: whether the nodes have weights.
    """

    name: str
    nodes: tuple[str, ...]
    fp32_cost: float
    has_weights: bool = True


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
    """A choice and its score.

    Attributes:
        score: on the images that were compared.
        choice: what was compared.
        best_case: the agreement on all images if the rest of them agrees.
    """

    score: Score
    choice: MixedPrecision
    best_case: float

    @property
    def is_complete(self) -> bool:
        return self.best_case == self.score.agreement


class MixedPrecisionSearch(ABC):
    """Finds the layers of a network that stay in fp32, and the calibration method of the others.

    A subclass quantizes and runs the network; it has to be able to do so before it calls this constructor. Calibration
    runs once, in the constructor. Scores are kept, so no choice is evaluated twice. The comparison of a choice ends
    early if it can no longer reach its target.

    Args:
        source: provides the training images, and how many of them to calibrate on.
        layers: the layers that can be quantized.
        total_macs: multiply-accumulate operations of the network for one image.

    Raises:
        UsageError: the number of calibration images is below 1 or leaves no images to compare on.
        DataError: there are fewer than two training images.
    """

    def __init__(self, source: ConversionSource, layers: Sequence[Layer], total_macs: int) -> None:
        require_calibration_images(source)
        self._progress = source.progress
        self._spec = source.spec
        self._layers = layers
        self._total_macs = total_macs
        images, held_out = split_images(source, _affordable_images(total_macs, _HELD_OUT_IMAGES))
        self._calibration_images = len(images)
        self._progress(f"int8: calibrating on {len(images)} training images")
        self.calibrate(normalize(images, source.spec.input))
        self._inputs = normalize(held_out, source.spec.input)
        self._expected = self._run_original(source)
        self._trials: dict[MixedPrecision, _Trial] = {}
        self._by_sensitivity: list[Layer] = []

    def _run_original(self, source: ConversionSource) -> NDArray[np.float32]:
        """Return the outputs that those of a quantized network are compared with, for the images to compare on."""
        if source.original is None:
            return self.open(None)(self._inputs)
        import torch  # the network in fp32 has other weights than the original

        module = source.original()
        with torch.inference_mode():
            batches = torch.from_numpy(self._inputs).split(_BATCH_SIZE)
            return np.concatenate([module(batch).numpy() for batch in batches])

    @abstractmethod
    def calibrate(self, inputs: NDArray[np.float32]) -> None:
        """Find the ranges of the activations, on images as the network takes them: float32 (N, *input.shape)."""

    @abstractmethod
    def open(self, choice: MixedPrecision | None) -> Network:
        """Return the quantized network, or that in fp32 if the choice is None."""

    def choices(self) -> Iterator[tuple[MixedPrecision, float]]:
        """Yield choices, each with its agreement on the images to compare on.

        The first choice has the fewest layers in fp32 that reach the lowest of `AGREEMENT_TARGETS`. If it fails its
        parity check, the caller takes the next one, which has to reach the next target above the agreement of the
        last. The iteration ends when the search finds no other choice.
        """
        yielded: list[MixedPrecision] = []
        reached = 0.0
        while len(yielded) < MAX_CANDIDATES:
            target = next((value for value in AGREEMENT_TARGETS if value > reached), AGREEMENT_TARGETS[-1])
            score, choice, _ = self.find(target)
            if choice in yielded:
                return
            reached = score.agreement
            if reached < target:
                self._progress(f"int8: best agreement found {reached:.2%}, below {target:.2%}")
            yielded.append(choice)
            yield choice, reached

    def find(self, target: float) -> _Trial:
        """Return the choice with the fewest layers in fp32 that reaches an agreement, or the best one if none does.

        The best calibration method is chosen first. If it misses the target, layers stay in fp32, starting with those
        whose quantization costs the most agreement for the speed that it gains.
        """
        best = self._best_method()
        if best.score.agreement >= target or len(self._layers) < 2:
            return self._completed(best)
        method = best.choice.method
        self._by_sensitivity = self._by_sensitivity or self._rank_by_sensitivity(method)
        # One layer with weights is always quantized, or the model would not be int8.
        quantized = next(layer for layer in reversed(self._by_sensitivity) if layer.has_weights)
        order = [layer for layer in self._by_sensitivity if layer != quantized]
        return self._completed(self._find_fewest(method, order, best, target))

    def all_in_int8(self) -> tuple[MixedPrecision, float]:
        """Return the choice without layers in fp32, and its agreement on the images to compare on."""
        best = self._best_method()
        return best.choice, best.score.agreement

    def _best_method(self) -> _Trial:
        lowest = AGREEMENT_TARGETS[0]
        return max((self._evaluate(MixedPrecision(method, ()), lowest) for method in METHODS), key=_score)

    def describe(self, choice: MixedPrecision, agreement: float, weights: str, int8_share: float) -> dict[str, str]:
        """Return the facts about a choice that a spec records.

        Args:
            choice: the choice.
            agreement: its agreement, from `choices`.
            weights: how the weights were quantized.
            int8_share: the share of the multiplications that run in int8, from 0 to 1.
        """
        return {
            "calibration": f"{choice.method}, {self._calibration_images} training images",
            "weights": weights,
            "fp32 layers": ", ".join(layer.name for layer in choice.fp32_layers) or "none",
            "in int8": f"{int8_share:.0%} of the multiplications",
            "held-out agreement": f"{agreement:.2%} of {len(self._inputs):,} training images",
        }

    def _completed(self, trial: _Trial) -> _Trial:
        """Return the trial of the same choice on all images."""
        return self._evaluate(trial.choice, 0.0)

    def _evaluate(self, choice: MixedPrecision, target: float) -> _Trial:
        """Compare a choice on the held-out images, or on as many as show that it misses the target."""
        known = self._trials.get(choice)
        if known is None or (not known.is_complete and known.best_case >= target):
            known = self._compare(choice, len(self._inputs), target)
            layers = f" with {len(choice.fp32_layers)} layers in fp32" if choice.fp32_layers else ""
            self._progress(f"int8: {choice.method}{layers}: agreement {known.score.agreement:.2%}")
            self._trials[choice] = known
        return known

    def _compare(self, choice: MixedPrecision, images: int, target: float = 0.0) -> _Trial:
        """Compare with the network in fp32 on this number of held-out images, evenly spread.

        Each stage is spread over all of these images too. After a stage, the comparison ends if the choice would miss
        the target even if the rest of the images agreed.
        """
        rows = np.linspace(0, len(self._inputs) - 1, images).round().astype(np.int64)
        stages = -(-images // _STAGE_IMAGES)
        network = self.open(choice)
        compared, outputs = rows[:0], self._expected[:0]
        for stage in range(stages):
            part = rows[stage::stages]
            compared = np.concatenate([compared, part])
            outputs = np.concatenate([outputs, network(self._inputs[part])])
            same = self._same_predictions(outputs, self._expected[compared])
            best_case = (images - np.count_nonzero(~same)) / images
            if best_case < target:
                break
        expected = self._expected[compared]
        error = np.square(outputs.astype(np.float64) - expected).mean() / max(np.square(expected).mean(), 1e-12)
        score = Score(np.count_nonzero(same) / len(same), -float(np.nan_to_num(error, nan=np.inf)))
        return _Trial(score, choice, best_case)

    def _same_predictions(self, outputs: NDArray[np.float32], expected: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Return for each image whether the predictions are the same, (N,)."""
        same = applicable_labels(outputs, self._spec) == applicable_labels(expected, self._spec)
        per_image: NDArray[np.bool_] = np.logical_and.reduce(same, axis=1)
        return per_image

    def _rank_by_sensitivity(self, method: str) -> list[Layer]:
        """Sort layers by the error with only that layer quantized, divided by what the layer costs in fp32.

        The errors of layers nearly add up, because their rounding errors are independent, so one run per layer gives
        the order. Quantizing all layers but one would tell less: of two sensitive layers, each would hide the other.
        """
        layers = self._layers
        images = min(_affordable_images(self._total_macs * len(layers), _SENSITIVITY_IMAGES), len(self._inputs))

        self._progress(f"int8: measuring the sensitivity of {len(layers)} layers on {images} images")
        sensitivities = {}
        reported = time.monotonic()
        for number, layer in enumerate(layers, 1):
            others = tuple(other for other in layers if other != layer)
            score = self._compare(MixedPrecision(method, others), images).score
            sensitivities[layer.name] = -score.negative_error / layer.fp32_cost
            if time.monotonic() > reported + _REPORT_EVERY_S:
                self._progress(f"int8: measured the sensitivity of {number} of {len(layers)} layers")
                reported = time.monotonic()
        return sorted(layers, key=lambda layer: -sensitivities[layer.name])

    def _find_fewest(self, method: str, order: Sequence[Layer], best: _Trial, target: float) -> _Trial:
        """Keep 1, 2, 4 … layers in fp32 until the target is reached, then bisect; takes about 2 log2(layers) runs."""
        low, high = 0, 1
        while True:
            reached = self._evaluate(MixedPrecision(method, tuple(order[:high])), target)
            best = max(best, reached, key=_score)
            if reached.score.agreement >= target:
                break
            if high == len(order):
                return best
            low, high = high, min(2 * high, len(order))
        while high - low > 1:
            middle = (low + high) // 2
            trial = self._evaluate(MixedPrecision(method, tuple(order[:middle])), target)
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


def require_calibration_images(source: ConversionSource) -> None:
    """Check the number of calibration images that the user gave.

    Raises:
        UsageError: it is below 1.
    """
    images = source.options.calibration_images
    if images is not None and images < 1:
        raise UsageError(
            f"{images} calibration images are too few", f"give 1 or more; the default is {CALIBRATION_IMAGES}"
        )


def split_images(source: ConversionSource, held_out: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
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
