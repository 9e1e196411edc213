"""The check that a network returns what its spec states: logits or probabilities."""

from typing import Literal

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from cifarx_export.parity.compare import Reference
from cifarx_export.parity.data import ParityData
from cifarx_export.parity.stated_output import require_stated_output
from cifarx_serve.errors import CheckFailed
from cifarx_serve.spec import InputSpec, ModelSpec

SPEC = ModelSpec(model="net", class_names=("a", "b", "c"), input=InputSpec(height=1, width=1))
BINARY = msgspec.structs.replace(SPEC, class_names=("a", "b"), activation="sigmoid", outputs=1)
LOGITS = np.random.default_rng(0).normal(size=(1000, 3)).astype(np.float32)
SOFTMAX = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
SIGMOID = (1 / (1 + np.exp(-LOGITS[:, :1]))).astype(np.float32)


def check(
    outputs: NDArray[np.float32],
    spec: ModelSpec = SPEC,
    output: Literal["logits", "probabilities"] = "logits",
    stated: bool = False,
) -> None:
    data = ParityData(np.zeros((len(outputs), 1, 1, 3), np.uint8), None, "pictures", "0" * 64)
    described = msgspec.structs.replace(spec, output=output)
    reference = Reference("pytorch", described, data, outputs, outputs, outputs[:3], outputs[:3])
    require_stated_output(reference, "net.pth", is_stated=stated)


def test_probabilities_that_nobody_states_are_refused() -> None:
    with pytest.raises(CheckFailed, match=r"outputs of net\.pth are between 0 and 1 and sum to 1, as probabilities do"):
        check(SOFTMAX)
    with pytest.raises(CheckFailed, match=r"are between 0 and 1, as .*: state output = \"probabilities\", or \"logits"):
        check(SIGMOID, BINARY)


def test_logits_that_are_stated_as_probabilities_are_refused() -> None:
    with pytest.raises(CheckFailed, match=r"are from -\d.* to \d.* and do not sum to 1, .*: state output = \"logits\""):
        check(LOGITS, output="probabilities")
    with pytest.raises(CheckFailed, match=r"do not sum to 1"):
        check(LOGITS[:, :1], BINARY, "probabilities")


def test_what_is_right_or_stated_passes() -> None:
    check(LOGITS)
    check(LOGITS[:, :1], BINARY)
    check(SOFTMAX, output="probabilities")
    check(SOFTMAX, stated=True)  # somebody may have trained with them as logits
    check(SIGMOID, BINARY, "probabilities")
    check(SIGMOID.repeat(3, axis=1))  # values from 0 to 1 that do not sum to 1 are logits, unless they are of a sigmoid
