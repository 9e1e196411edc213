"""The overhead of a predictor over the bare `session.run` of ONNX Runtime on the same array."""

import numpy as np
import pytest

from benchmarks.support.limits import require
from benchmarks.support.models import Models
from cifarx_serve.benchmarking.timing import Runner, measure
from cifarx_serve.images.preprocess import normalize
from cifarx_serve.predictor import Predictor, load

TURNS_S = 3.0
MAX_ADDED_US = 15
MAX_ADDED_SHARE = 0.01
BATCH = 64


@pytest.fixture(scope="module")
def predictor(models: Models) -> Predictor:
    """Open the ONNX file."""
    return load(models.files["onnxruntime"], device="cpu")


@pytest.mark.parametrize("batch", [1, BATCH])
def test_a_predictor_adds_little(predictor: Predictor, models: Models, batch: int, notes: list[str]) -> None:
    """Compare the 10th percentiles: the overhead is smaller than the noise of a busy machine."""
    pixels = list(models.images[:batch])
    inputs = normalize(np.stack(pixels), predictor.spec.input)
    bare_session = predictor._backend._session  # type: ignore[attr-defined]
    bare, ready, whole = measure(
        [
            Runner("session.run", lambda: bare_session.run(["logits"], {"input": inputs})),
            Runner("run", lambda: predictor.run(inputs)),
            Runner("predict", lambda: predictor.predict(pixels)),
        ],
        TURNS_S,
    )
    bare_us, added_us, whole_us = (
        bare.percentiles[10],
        *(each.percentiles[10] - bare.percentiles[10] for each in (ready, whole)),
    )
    notes.append(
        f"predictor over session.run at batch {batch} ({bare_us:,.0f} µs): {added_us:+.1f} µs "
        f"({added_us / bare_us:+.1%}) from the same array to logits; {whole_us:+.0f} µs from uint8 images to labels, "
        "preprocessing included"
    )
    limit = MAX_ADDED_US if batch == 1 else MAX_ADDED_SHARE * bare_us
    require(added_us <= limit, f"{added_us:.1f} µs at batch {batch} is over {limit:.1f} µs")
