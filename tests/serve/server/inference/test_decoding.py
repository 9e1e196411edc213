import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.pixel_limits import TooManyPixels
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import read_image
from cifarx_serve.server.inference import decoding
from cifarx_serve.server.inference.deadline import Deadline
from cifarx_serve.server.inference.decoding import ImageDecoder
from cifarx_serve.spec import InputSpec, ModelSpec
from tests.support.asgi_client import encode_image
from tests.support.child_processes import running_children
from tests.support.color_model import SPEC
from tests.support.hostile_images import decode_bombs

EMBEDDED = msgspec.structs.replace(SPEC, embedded_preprocessing=True)


Decode = Callable[..., NDArray[np.uint8]]


@pytest.fixture(scope="module")
def decode() -> Iterator[Decode]:
    """Return a function that decodes an image with a decoder that all calls share."""
    with asyncio.Runner() as runner, closing(ImageDecoder(1, 10_000_000)) as decoder:

        def run(data: bytes, spec: ModelSpec = SPEC, max_pixels: int = 1_000_000) -> NDArray[np.uint8]:
            deadline = Deadline(time.perf_counter(), 30.0)
            return runner.run(decoder.decode(data, spec, max_pixels, deadline, lambda: False))

        yield run


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(6, 4), (40, 30), (200, 150)])
def test_pixels_are_those_of_the_image_reader(image_format: str, size: tuple[int, int], decode: Decode) -> None:
    data = encode_image(noise(*size), image_format)
    image = read_image(data)
    assert np.array_equal(decode(data), resize(image, SPEC.input))
    assert np.array_equal(decode(data, EMBEDDED), np.asarray(image))


SMALL, LARGE = encode_image(noise(32, 32)), encode_image(Image.new("RGB", (1200, 1000)))


CROPPED = msgspec.structs.replace(SPEC, input=InputSpec(height=32, width=32, resize="shorter_side", resize_to=36))
EMBEDDED_CROPPED = msgspec.structs.replace(CROPPED, embedded_preprocessing=True)


def test_an_image_that_the_model_would_resize_to_too_many_pixels_is_refused(decode: Decode) -> None:
    panorama = encode_image(Image.new("RGB", (2000, 1)))
    assert decode(panorama, CROPPED).shape == (32, 32, 3)
    with pytest.raises(TooManyPixels, match="the image is resized to 72000x36 pixels, over the limit of 1,000,000"):
        decode(panorama, EMBEDDED_CROPPED)
    assert decode(panorama, EMBEDDED_CROPPED, max_pixels=2_600_000).shape == (1, 2000, 3)


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_panoramas_are_resized_in_a_process(
    size: tuple[int, int], decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding, "read_image", lambda _: pytest.fail("it is decoded in this process"))
    image = Image.new("RGB", size, (1, 2, 3))
    assert (decode(encode_image(image), CROPPED) == (1, 2, 3)).all()


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (SMALL, "event loop"),
        (encode_image(noise(128, 128), "JPEG"), "event loop"),
        (encode_image(noise(129, 128), "JPEG"), "thread"),
        (SMALL + bytes(100_000), "thread"),
        (encode_image(Image.new("RGB", (1024, 1024))), "thread"),
        (encode_image(Image.new("RGB", (1025, 1024))), "process"),
        (SMALL + bytes(1 << 22), "process"),
        *[(encode_image(noise(32, 32), image_format), "process") for image_format in ("WEBP", "GIF", "BMP", "TIFF")],
    ],
    ids=["PNG", "JPEG", "pixels", "bytes", "a million pixels", "more", "more bytes", "WebP", "GIF", "BMP", "TIFF"],
)
def test_where_an_image_is_decoded(data: bytes, place: str, decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only PNG and JPEG images take a time that is known before."""
    places = []

    def read(image: Image.Image) -> Image.Image:
        is_main = threading.current_thread() is threading.main_thread()
        places.append("event loop" if is_main else "thread")
        return read_image(image)

    monkeypatch.setattr(decoding, "read_image", read)
    assert decode(data, max_pixels=2_000_000).shape == (4, 6, 3)
    assert places == ([] if place == "process" else [place])


@pytest.mark.parametrize("kind", ["ICNS", "ICO", "JPEG 2000"])
def test_a_format_that_is_not_accepted_is_refused_without_a_process(kind: str) -> None:
    async def run() -> None:
        with closing(ImageDecoder(1, 1)) as decoder:
            deadline = Deadline(time.perf_counter(), 30.0)
            await decoder.decode(decode_bombs()[kind], SPEC, 1_000_000, deadline, pytest.fail)

    with pytest.raises(ImageError, match="images are not accepted"):
        asyncio.run(run())


@pytest.mark.parametrize(
    "data", [b"", b"no image", encode_image(noise(40, 30))[:300], b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=range(4)
)
def test_data_that_is_not_an_image_is_an_error(data: bytes, decode: Decode) -> None:
    with pytest.raises(ImageError):
        decode(data)


def test_an_image_over_the_limit_is_not_decoded(decode: Decode, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_image(noise(20, 20))
    assert decode(data, max_pixels=400).shape == (4, 6, 3)
    monkeypatch.setattr(decoding, "read_image", pytest.fail)
    with pytest.raises(TooManyPixels, match="20x20 pixels, over the limit of 399 pixels: resize the image"):
        decode(data, max_pixels=399)


def test_a_photograph(dog: Path, decode: Decode) -> None:
    assert np.array_equal(decode(dog.read_bytes(), max_pixels=10_000_000), resize(read_image(dog), SPEC.input))


@pytest.mark.parametrize("kind", decode_bombs())
def test_a_bomb_takes_little_time_and_memory_and_does_not_block_the_event_loop(kind: str) -> None:
    """CPU time is measured instead of time, because other processes may use the CPUs at the same time.

    They also slow down this one, so that of all processes together is the least of three runs.
    """

    async def run() -> None:
        with closing(ImageDecoder(1, 10_000_000)) as decoder:
            await decode_with(decoder, LARGE)  # starts the process
            processes = [psutil.Process(), *decoder_processes()]
            memory = resident_memory(processes)
            costs = [await decode_bomb(decoder, kind, processes) for _ in range(3)]
            assert decoder_processes() == processes[1:]
            assert min(used_s for used_s, _ in costs) < 0.2
            assert costs[0][1] < 0.05
            assert resident_memory(processes) - memory < 64 << 20

    asyncio.run(run())


async def decode_bomb(decoder: ImageDecoder, kind: str, processes: list[psutil.Process]) -> tuple[float, float]:
    """Return the CPU time of a refusal in seconds, and the longest time that it blocked the event loop."""
    started_s = cpu_time(processes)
    decoding = asyncio.ensure_future(decode_with(decoder, decode_bombs()[kind]))
    longest_s, before = 0.0, time.thread_time()
    while not decoding.done():
        await asyncio.sleep(0.001)
        now = time.thread_time()
        longest_s, before = max(longest_s, now - before), now
    with pytest.raises(ImageError):
        decoding.result()
    return cpu_time(processes) - started_s, longest_s


async def decode_with(decoder: ImageDecoder, data: bytes) -> NDArray[np.uint8]:
    deadline = Deadline(time.perf_counter(), 60.0)
    return await decoder.decode(data, SPEC, 10_000_000 if data is LARGE else 1_000_000, deadline, lambda: False)


def decoder_processes() -> list[psutil.Process]:
    return running_children("decoder_process")


def cpu_time(processes: list[psutil.Process]) -> float:
    """Return the CPU time of processes in seconds."""
    return sum(times.user + times.system for times in (process.cpu_times() for process in processes))


def resident_memory(processes: list[psutil.Process]) -> int:
    return sum(process.memory_info().rss for process in processes)
