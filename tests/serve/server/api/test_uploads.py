import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.errors import ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import TooManyPixels, read_image
from cifarx_serve.server.api import uploads as module
from cifarx_serve.server.api.uploads import decode, refusal, uploads
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.multipart import Upload
from cifarx_serve.server.http.request import Message, Request
from cifarx_serve.server.settings import Limits
from cifarx_serve.spec import ModelSpec
from tests.support.asked import encoded
from tests.support.color_model import SPEC

EMBEDDED = msgspec.structs.replace(SPEC, embedded_preprocessing=True)


def request(content_type: str | None) -> Request:
    async def receive() -> Message:
        raise AssertionError

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return Request(scope, receive, Limits(max_images=2), BodyBudget(1 << 20))


def sent(body: bytes, content_type: str | None) -> list[Upload]:
    return uploads(request(content_type), body)


def decoded(data: bytes, spec: ModelSpec = SPEC, max_pixels: int = 1_000_000) -> NDArray[np.uint8]:
    with ThreadPoolExecutor(1) as pool:
        return asyncio.run(decode(Upload("x", data), spec, max_pixels, request(None), pool))


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize("kind", [None, "image/png", "IMAGE/x-anything; a=b", "application/octet-stream"])
def test_a_body_is_one_image(kind: str | None) -> None:
    assert sent(b"bytes", kind) == [Upload(None, b"bytes")]


def test_a_form_is_several() -> None:
    body, kind = encode_multipart_formdata([("image", ("a.png", b"1")), ("images", ("b.png", b"2"))])
    assert sent(body, kind) == [Upload("a.png", b"1"), Upload("b.png", b"2")]
    body, kind = encode_multipart_formdata([("image", ("a.png", b"1"))] * 3)
    with pytest.raises(RequestError, match="over 2 images in one form"):
        sent(body, kind)


@pytest.mark.parametrize(
    "kind", ["text/plain", "application/json", "application/x-www-form-urlencoded", "multipart/mixed", "imag"]
)
def test_another_type_is_refused(kind: str) -> None:
    with pytest.raises(RequestError, match=f"a body of type '{kind}': send an image as image/png") as refused:
        sent(b"bytes", kind)
    assert refused.value.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(RequestError, match="the body is empty: send an image") as refused:
        sent(b"", "image/png")
    assert refused.value.status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
@pytest.mark.parametrize("size", [(6, 4), (40, 30), (200, 150)])
def test_an_image_is_what_it_is_everywhere_else(kind: str, size: tuple[int, int]) -> None:
    data = encoded(noise(*size), kind)
    picture = read_image(data)
    assert np.array_equal(decoded(data), resize(picture, SPEC.input))
    assert np.array_equal(decoded(data, EMBEDDED), np.asarray(picture))


def test_what_takes_its_time_is_decoded_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture, and a small one of many bytes."""
    threads: list[str] = []

    def read(image: Image.Image) -> Image.Image:
        threads.append(threading.current_thread().name)
        return read_image(image)

    monkeypatch.setattr(module, "read_image", read)
    small, large = encoded(noise(32, 32)), encoded(noise(300, 300))
    for data in (small, large, small + bytes(100_000)):
        decoded(data)
    assert [name == threading.main_thread().name for name in threads] == [True, False, False]


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(noise(40, 30))[:300], b"%!PS-Adobe-3.0 EPSF-3.0\n"], ids=range(4)
)
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(ImageError) as broken:
        decoded(data)
    refused = refusal(broken.value)
    assert refused.status == HTTPStatus.BAD_REQUEST
    assert str(refused) == str(broken.value)


def test_a_picture_over_the_limit_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(noise(20, 20))
    assert decoded(data, max_pixels=400).shape == (4, 6, 3)
    monkeypatch.setattr(module, "read_image", pytest.fail)
    with pytest.raises(TooManyPixels, match="20x20 pixels, over the limit of 399 pixels: resize the image") as large:
        decoded(data, max_pixels=399)
    assert refusal(large.value).status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


def test_a_photograph(dog: Path) -> None:
    assert np.array_equal(decoded(dog.read_bytes(), max_pixels=10_000_000), resize(read_image(dog), SPEC.input))
