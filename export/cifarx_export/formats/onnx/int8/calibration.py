"""The ranges of a network's activations, by several methods from one pass over the images."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cifarx_export.formats.onnx.int8.layers import float_tensors, quiet, session

Ranges: TypeAlias = dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Of each tensor: the values that become 0 and 255."""

_PERCENTILES: Final = {"percentile 99.99": 99.99, "percentile 99.999": 99.999}

METHODS: Final = ("minmax", "entropy", *_PERCENTILES)

_BINS: Final = 2048
"""Of a percentile's histogram: with fewer, a bin holds more than it cuts off."""

_ENTROPY_BINS: Final = 128

_BATCH_FLOATS: Final = 2**25
"""How many values all activations of a batch may have together: 128 MB."""

_LARGEST_BATCH: Final = 32


def activations(
    model: Any, names: Sequence[str], inputs: NDArray[np.float32]
) -> Iterator[Mapping[str, NDArray[np.float32]]]:
    """The named float tensors of a network, batch for batch."""
    tensors = float_tensors(model)
    watched = copy.deepcopy(model)
    given = {value.name for value in [*watched.graph.input, *watched.graph.output]}
    watched.graph.output.extend(tensors[name] for name in names if name not in given)
    wanted = [name for name in names if name != "input"]
    elements = sum(_elements(tensors[name]) for name in names)
    batch = max(1, min(_LARGEST_BATCH, _BATCH_FLOATS // max(1, elements)))
    opened = session(watched)
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        yield {"input": part, **dict(zip(wanted, opened.run(wanted, {"input": part}), strict=True))}


def _elements(value: Any) -> int:
    """Of one image."""
    return math.prod(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim[1:])


def calibrate(model: Any, names: Sequence[str], inputs: NDArray[np.float32]) -> dict[str, Ranges]:
    """Ranges by each of `METHODS` for the named activations.

    The histograms are ONNX Runtime's (`HistogramCollector`); its calibrators would hold every activation of every
    image at once, and run the network once a method.
    """
    from onnxruntime.quantization.calibrate import HistogramCollector

    fine = HistogramCollector("percentile", False, _BINS, 0, 100.0, None)
    coarse = HistogramCollector("entropy", False, _ENTROPY_BINS, _ENTROPY_BINS, 0.0, None)
    for batch in activations(model, names, inputs):
        with quiet():
            fine.collect({name: batch[name] for name in names})
            coarse.collect({name: batch[name] for name in names})
    found = {"minmax": _as_ranges({name: entry[2:4] for name, entry in fine.histogram_dict.items()})}
    with quiet():
        found["entropy"] = _as_ranges(coarse.compute_collection_result())
        for method, percentile in _PERCENTILES.items():
            fine.percentile = percentile
            found[method] = _as_ranges(fine.compute_collection_result())
    return found


def _as_ranges(found: Mapping[str, Sequence[Any]]) -> Ranges:
    return {name: (np.asarray(entry[0], np.float32), np.asarray(entry[1], np.float32)) for name, entry in found.items()}
