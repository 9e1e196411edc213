"""Classify a folder of 10,000 images, compared with the ideal on these cores and with one image at a time."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.support.decode_alone import decode, decode_and_drop
from benchmarks.support.limits import require
from benchmarks.support.models import Models
from cifarx_serve.images.preprocess import model_input
from cifarx_serve.predictor import load
from cifarx_serve.system.cpus import available_cpus

IMAGES = 10_000
ONE_BY_ONE = 2_000
"""Number of images classified one at a time, which is slow and linear."""
CHUNK = 100
ROUNDS = 5
BATCHES = (16, 64, 256)
MIN_SHARE = 0.85
MIN_SPEED_UP = 1.5


@pytest.fixture(scope="module")
def folder(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("images")
    for position in range(IMAGES):
        Image.fromarray(models.images[position % len(models.images)]).save(place / f"{position:05}.jpg", quality=90)
    return place


@pytest.mark.timeout(900)
def test_a_folder_is_classified_as_fast_as_the_cores_allow(models: Models, folder: Path, notes: list[str]) -> None:
    """Compare with the ideal: decoding alone in one process per core, then the session alone on all cores."""
    paths = sorted(map(str, folder.iterdir()))
    with (
        load(models.files["onnxruntime"], device="cpu") as predictor,
        ProcessPoolExecutor(available_cpus(), get_context("spawn")) as processes,
    ):
        spec = predictor.spec
        pixels = decode(spec.input, paths)
        parts = [paths[start : start + CHUNK] for start in range(0, IMAGES, CHUNK)]

        def decoding() -> None:
            list(processes.map(decode_and_drop, [spec.input] * len(parts), parts))

        def running(batch: int) -> Callable[[], None]:
            inputs = [model_input(part, spec) for part in _batches(pixels, batch)]

            def run() -> None:
                for part in inputs:
                    predictor._backend.run(part)

            return run

        decoding()  # start the processes
        best = min(BATCHES, key=lambda batch: _seconds(running(batch)))
        session = running(best)
        rounds = []
        for _ in range(ROUNDS):
            ideal = _seconds(decoding) + _seconds(session)
            ours = _seconds(lambda: list(predictor.predict_stream(paths)))
            one_by_one = (
                _seconds(lambda: [predictor.predict(path) for path in paths[:ONE_BY_ONE]]) * IMAGES / ONE_BY_ONE
            )
            rounds.append((ideal / ours, one_by_one / ours, IMAGES / ours))
    share, speed_up, images_per_s = (statistics.median(column) for column in zip(*rounds, strict=True))
    notes.append(
        f"{IMAGES:,} JPEGs of {spec.input.height}x{spec.input.width} in a folder: {images_per_s:,.0f} images/s, "
        f"{share:.0%} of the ideal on {available_cpus()} CPUs (at least {MIN_SHARE:.0%}; the session at batch {best}), "
        f"{speed_up:.2f} times one image at a time (at least {MIN_SPEED_UP}), medians of {ROUNDS} in turns"
    )
    require(share >= MIN_SHARE, f"{share:.0%} of the ideal is under {MIN_SHARE:.0%}")
    require(speed_up >= MIN_SPEED_UP, f"{speed_up:.2f} times one at a time is under {MIN_SPEED_UP}")


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _batches(pixels: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    return (pixels[start : start + batch] for start in range(0, len(pixels), batch))
