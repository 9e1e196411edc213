"""Calibration: the ranges of a network's activations by several methods, from one pass over the images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.quiet import quiet

Ranges: TypeAlias = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""By name of the activation: the values that are quantized to 0 and to 255."""

_PERCENTILES: Final = {"percentile 99.99": 99.99, "percentile 99.999": 99.999}

METHODS: Final = ("minmax", "entropy", *_PERCENTILES)

_PERCENTILE_BINS: Final = 2048
"""Bins of the histogram for percentiles. With fewer, a single bin holds more values than a percentile cuts off."""

_ENTROPY_BINS: Final = 128


def calibrate(batches: Iterable[Mapping[str, NDArray[np.float32]]]) -> dict[str, Ranges]:
    """Return the ranges of the activations by each of `METHODS`.

    The histograms are those of ONNX Runtime (`HistogramCollector`). Its calibrators are not used: they keep every
    activation of every image in memory, and run the network once per method.

    Args:
        batches: the activations by name, for one batch of images after the other.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    fine = HistogramCollector("percentile", False, _PERCENTILE_BINS, 0, 100.0, None)
    coarse = HistogramCollector("entropy", False, _ENTROPY_BINS, _ENTROPY_BINS, 0.0, None)
    for batch in batches:
        with quiet():
            fine.collect(batch)
            coarse.collect(batch)
    ranges = {"minmax": _as_ranges({name: entry[2:4] for name, entry in fine.histogram_dict.items()})}
    with quiet():
        ranges["entropy"] = _as_ranges(coarse.compute_collection_result())
        for method, percentile in _PERCENTILES.items():
            fine.percentile = percentile
            ranges[method] = _as_ranges(fine.compute_collection_result())
    return ranges


def _as_ranges(results: Mapping[str, Sequence[Any]]) -> Ranges:
    return {
        name: (np.asarray(entry[0], np.float32), np.asarray(entry[1], np.float32)) for name, entry in results.items()
    }
