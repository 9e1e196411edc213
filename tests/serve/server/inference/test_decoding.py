import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.inner_sizes import TooManyPixels
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.server.inference import decoding
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import decode_image
from cifarx_serve.spec import ModelSpec
from tests.support.asgi_client import encode_image
from tests.support.color_model import SPEC

EMBEDDED = msgspec.structs.replace(SPEC, embedded_preprocessing=True)


def decode(data: bytes, spec: ModelSpec = SPEC, max_pixels: int = 1_000_000) -> NDArray[np.uint8]:
    with ThreadPoolExecutor(1) as executor:
        return asyncio.run(decode_image(data, spec, max_pixels, executor, Deadline(time.perf_counter(), 30.0)))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(6, 4), (40, 30), (200, 150)])
def test_pixels_are_those_of_the_image_reader(image_format: str, size: tuple[int, int]) -> None:
    data = encode_image(noise(*size), image_format)
    image = read_image(data)
    assert np.array_equal(decode(data), resize(image, SPEC.input))
    assert np.array_equal(decode(data, EMBEDDED), np.asarray(image))


def test_large_images_and_large_files_are_decoded_in_the_threadpool(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []

    def read(image: Image.Image) -> Image.Image:
        threads.append(threading.current_thread().name)
        return read_image(image)

    monkeypatch.setattr(decoding, "read_image", read)
    small, large = encode_image(noise(32, 32)), encode_image(noise(300, 300))
    for data in (small, large, small + bytes(100_000)):
        decode(data)
    assert [name == threading.main_thread().name for name in threads] == [True, False, False]


@pytest.mark.parametrize(
    "data", [b"", b"no image", encode_image(noise(40, 30))[:300], b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=range(4)
)
def test_data_that_is_not_an_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_an_image_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(noise(20, 20))
    assert decode(data, max_pixels=400).shape == (4, 6, 3)
    monkeypatch.setattr(decoding, "read_image", pytest.fail)
    with pytest.raises(TooManyPixels, match="20x20 pixels, over the limit of 399 pixels: resize the image"):
        decode(data, max_pixels=399)


def test_a_photograph(dog: Path) -> None:
    assert np.array_equal(decode(dog.read_bytes(), max_pixels=10_000_000), resize(read_image(dog), SPEC.input))
