"""Image files as one batch: in order, within the limits of the request, and refused by number."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.server.inference.errors import DeadlineExceeded, QueueFull, RequestCancelled
from cifarx_serve.server.inference.image_batch import decode_batch
from cifarx_serve.server.inference.metrics import Metrics
from cifarx_serve.server.inference.repository import ModelInstance, ModelRepository
from cifarx_serve.server.settings import Limits, Settings
from tests.support.asgi_client import encode_image
from tests.support.color_model import write_onnx
from tests.support.spec_model import make_spec, write_model

RED, BLUE = (encode_image(Image.new("RGB", (9, 5), color)) for color in ("red", "blue"))
SMALL = encode_image(Image.new("RGB", (3, 2), "red"))
LARGE = encode_image(Image.new("RGB", (3000, 1500), "red"))

Decode = Callable[..., Awaitable[NDArray[np.uint8]]]


def run_with_decoder(path: Path, test: Callable[[Decode, ModelInstance], Awaitable[None]], **limits: int) -> None:
    """Run a test with a function that decodes images for the model of a file."""

    async def run() -> None:
        settings = Settings(files={"colors": str(path)}, device="cpu", limits=Limits(max_batch=1, **limits))
        repository = ModelRepository(settings, Metrics())
        await repository.open()
        max_pixels = settings.limits.max_pixels
        with closing(ImageDecoder(1, max_pixels)) as decoder:

            async def decode(
                *images: bytes, timeout_s: float = 30.0, is_disconnected: Callable[[], bool] = lambda: False
            ) -> NDArray[np.uint8]:
                deadline = Deadline(time.perf_counter(), timeout_s)
                return await decode_batch(images, decoder, repository.get(), max_pixels, deadline, is_disconnected)

            await test(decode, repository.get())
        await repository.close()

    asyncio.run(run())


@pytest.fixture
def colors(tmp_path: Path) -> Path:
    return write_onnx(tmp_path / "colors.onnx")


@pytest.fixture
def any_size(tmp_path: Path) -> Path:
    """A model that takes images of any size."""
    return write_model(tmp_path / "any_size.onnx", make_spec(embedded_preprocessing=True))


def test_images_become_one_batch_in_order(colors: Path) -> None:
    async def test(decode: Decode, instance: ModelInstance) -> None:
        batch = await decode(RED, SMALL, BLUE)
        assert (batch.dtype, batch.shape) == (np.uint8, (3, 4, 6, 3))
        assert batch[:, 0, 0].tolist() == [[255, 0, 0], [255, 0, 0], [0, 0, 255]]
        result = await instance.infer(batch, Deadline(time.perf_counter(), 30.0), lambda: False)
        assert result.values.argmax(1).tolist() == [0, 0, 2]

    run_with_decoder(colors, test)


def test_a_model_that_resizes_images_takes_those_of_one_size(any_size: Path) -> None:
    async def test(decode: Decode, _instance: ModelInstance) -> None:
        assert (await decode(RED, BLUE)).shape == (2, 5, 9, 3)
        with pytest.raises(ImageError, match=r"image 1 has 3 x 2 pixels and image 0 9 x 5: send images of different"):
            await decode(RED, SMALL)

    run_with_decoder(any_size, test)


def test_the_pixels_of_images_that_the_model_resizes_are_limited_together(any_size: Path) -> None:
    async def test(decode: Decode, _instance: ModelInstance) -> None:
        assert len(await decode(RED)) == 1
        with pytest.raises(TooManyPixels, match="image 1: "):
            await decode(RED, BLUE)

    run_with_decoder(any_size, test, max_pixels=80)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        ((SMALL, b"not an image"), ImageError, "^image 1: 12 bytes"),
        ((b"",), ImageError, "^image 0: 0 bytes"),
        ((SMALL, RED, b""), TooManyPixels, "^image 1: .*9x5"),
    ],
    ids=["no image", "empty", "too many pixels"],
)
def test_an_error_names_the_image(
    colors: Path, images: tuple[bytes, ...], error: type[ImageError], message: str
) -> None:
    async def test(decode: Decode, _instance: ModelInstance) -> None:
        with pytest.raises(ImageError, match=message) as raised:
            await decode(*images)
        assert type(raised.value) is error

    run_with_decoder(colors, test, max_pixels=40)


def test_deadlines_disconnects_and_a_full_queue_end_the_request(colors: Path) -> None:
    async def test(decode: Decode, instance: ModelInstance) -> None:
        with pytest.raises(DeadlineExceeded):
            await decode(LARGE, timeout_s=0.0)
        with pytest.raises(RequestCancelled):
            await decode(LARGE, is_disconnected=lambda: True)
        pending = asyncio.ensure_future(
            instance.infer(np.zeros((2, 4, 6, 3), np.uint8), Deadline(time.perf_counter(), 30.0), lambda: False)
        )
        await asyncio.sleep(0)
        with pytest.raises(QueueFull):
            await decode(b"not decoded")
        await pending

    run_with_decoder(colors, test, max_queue=1)
