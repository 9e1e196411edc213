import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.predictor import Prediction
from cifarx_serve.server.inference.classification import Classification, ImageClassifier
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.errors import DeadlineExceeded, QueueFull
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelRepository
from cifarx_serve.server.settings import Limits, Settings
from cifarx_serve.spec import InputSpec
from tests.support.asgi_client import encode_image
from tests.support.faulty_backend import register_faulty_backend, write_faulty_model
from tests.support.spec_model import make_spec, write_model

RED, GREEN, BLUE = (encode_image(Image.new("RGB", (9, 5), color)) for color in ("red", "lime", "blue"))

Classify = Callable[..., Awaitable[Classification]]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register_faulty_backend(monkeypatch)
    return write_faulty_model(tmp_path / "colors.faulty")


def run_with_classifier(
    path: Path, test: Callable[[Classify, Metrics], Awaitable[None]], max_pixels: int = 10_000, max_queue: int = 256
) -> None:
    """Run a test with a function that classifies images: `await classify(RED, BLUE, top_k=2)`."""

    async def run() -> None:
        metrics = Metrics()
        limits = Limits(max_batch=4, max_queue=max_queue)
        repository = ModelRepository(Settings(files={"colors": str(path)}, device="cpu", limits=limits), metrics)
        await repository.open()
        with closing(ImageDecoder(1, max_pixels)) as decoder:
            classifier = ImageClassifier(decoder, max_pixels)

            async def classify(*images: bytes, top_k: int = 1, timeout_s: float = 30.0) -> Classification:
                deadline = Deadline(time.perf_counter(), timeout_s)
                return await classifier.classify(images, repository.get(), top_k, deadline, lambda: False)

            try:
                await test(classify, metrics)
            finally:
                path.with_suffix(".slow").unlink(missing_ok=True)
                await repository.close()

    asyncio.run(run())


def labels(result: Classification) -> list[str]:
    return [one.label if isinstance(one, Prediction) else type(one).__name__ for one in result.predictions]


def test_images_are_classified_in_order_and_in_one_batch(path: Path) -> None:
    async def test(classify: Classify, metrics: Metrics) -> None:
        result = await classify(RED, BLUE, GREEN, top_k=2)
        assert labels(result) == ["red", "blue", "green"]
        assert [len(one.top) for one in result.predictions if isinstance(one, Prediction)] == [2, 2, 2]
        assert min(result.decode_s, result.compute_s) > 0
        assert result.queue_s >= 0
        assert b'cifarx_batch_images_sum{model="colors"} 3.0' in metrics.render()
        assert b'cifarx_batch_images_count{model="colors"} 1.0' in metrics.render()

    run_with_classifier(path, test)


def test_images_of_different_sizes_are_classified_in_order(path: Path) -> None:
    """A model with embedded preprocessing gets one batch per size."""
    write_faulty_model(path, embedded=True)
    wide = encode_image(Image.new("RGB", (20, 5), "lime"))

    async def test(classify: Classify, metrics: Metrics) -> None:
        assert labels(await classify(RED, wide, BLUE)) == ["red", "green", "blue"]
        assert b'cifarx_batch_images_count{model="colors"} 2.0' in metrics.render()

    run_with_classifier(path, test)


def test_an_image_that_cannot_be_read_does_not_stop_the_others(path: Path) -> None:
    large = encode_image(Image.new("RGB", (101, 100)))

    async def test(classify: Classify, _: Metrics) -> None:
        assert labels(await classify(b"no image", RED, large, BLUE)) == ["ImageError", "red", "TooManyPixels", "blue"]
        with pytest.raises(ImageError, match="is not an image"):
            await classify(b"no image", large)
        with pytest.raises(TooManyPixels):
            await classify(large, b"no image")

    run_with_classifier(path, test)


def test_the_pixels_before_the_crop_of_all_images_are_limited_together(tmp_path: Path) -> None:
    """Each image has 20 pixels, and 4,000 once its shorter side is resized to 20."""
    spec = InputSpec(height=4, width=6, resize="shorter_side", resize_to=20)
    path = write_model(tmp_path / "means.onnx", make_spec(spec, embedded_preprocessing=True))
    panorama = encode_image(Image.new("RGB", (2, 20)))

    async def test(classify: Classify, _: Metrics) -> None:
        result = await classify(panorama, panorama, panorama)
        assert [type(prediction) for prediction in result.predictions] == [Prediction, Prediction, TooManyPixels]

    run_with_classifier(path, test, max_pixels=10_000)


def test_a_request_that_does_not_fit_into_the_queue_is_not_decoded(path: Path) -> None:
    async def test(classify: Classify, _: Metrics) -> None:
        path.with_suffix(".slow").touch()
        running = asyncio.ensure_future(classify(RED))
        await asyncio.sleep(0.05)
        queued = asyncio.ensure_future(classify(GREEN))
        await asyncio.sleep(0.05)
        with pytest.raises(QueueFull):
            await classify(b"no image", b"no image")
        path.with_suffix(".slow").unlink()
        assert [labels(result) for result in await asyncio.gather(running, queued)] == [["red"], ["green"]]

    run_with_classifier(path, test, max_queue=2)


def test_a_request_fails_at_its_deadline(path: Path) -> None:
    async def test(classify: Classify, _: Metrics) -> None:
        path.with_suffix(".slow").touch()
        with pytest.raises(DeadlineExceeded, match=r"no response within 0\.1 s"):
            await classify(RED, timeout_s=0.1)

    run_with_classifier(path, test)
