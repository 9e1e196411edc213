import asyncio
import base64
import json
from contextlib import closing
from http import HTTPStatus

import pytest
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.server.api.uploads import Uploads, parse_uploads
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.multipart import Upload
from cifarx_serve.server.http.request import Message, Request
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool
from cifarx_serve.server.settings import Limits


def parse_all(body: bytes, content_type: str | None) -> Uploads:
    async def receive() -> Message:
        raise AssertionError

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    request = Request(scope, receive, Limits(max_images=2), BodyBudget(1 << 20))
    with closing(ThreadPool(1, "parse")) as threads:
        return asyncio.run(parse_uploads(request, body, ("top_k",), threads, Deadline(request.received_at, 10.0)))


def parse(body: bytes, content_type: str | None) -> list[Upload]:
    return parse_all(body, content_type).images


@pytest.mark.parametrize(
    "content_type",
    [None, "image/png", "IMAGE/x-anything; a=b", "application/octet-stream", "application/x-image"],
)
def test_a_body_is_one_image(content_type: str | None) -> None:
    assert parse(b"bytes", content_type) == [Upload(None, b"bytes")]


def test_a_form_has_one_image_per_part() -> None:
    body, content_type = encode_multipart_formdata([("image", ("a.png", b"1")), ("images", ("b.png", b"2"))])
    assert parse(body, content_type) == [Upload("a.png", b"1"), Upload("b.png", b"2")]
    body, content_type = encode_multipart_formdata([("image", ("a.png", b"1"))] * 3)
    with pytest.raises(
        RequestError, match="the form has more than 2 images: send the images in several requests"
    ) as refused:
        parse(body, content_type)
    assert refused.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


@pytest.mark.parametrize("size", [3, 100_000], ids=["inline", "in a thread"])
def test_json_has_images_and_fields(size: int) -> None:
    data = bytes(range(256)) * (size // 256 + 1)
    body = json.dumps({"image": base64.b64encode(data).decode(), "top_k": 2}).encode()
    assert parse_all(body, "application/json; charset=utf-8") == ([Upload(None, data)], {"top_k": "2"})


def test_a_form_has_fields() -> None:
    body, content_type = encode_multipart_formdata([("image", ("a.png", b"1")), ("top_k", "2")])
    assert parse_all(body, content_type) == ([Upload("a.png", b"1")], {"top_k": "2"})


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "multipart/mixed", "imag"])
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(b"bytes", content_type)
    assert str(refused.value) == (
        f"the content type {content_type!r} is not supported: send an image, as in curl --data-binary @dog.png "
        "-H 'Content-Type: image/png', a form, as in curl -F image=@dog.png, or base64 in JSON as application/json"
    )
    assert refused.value.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(RequestError, match="the body is empty: send an image") as refused:
        parse(b"", "image/png")
    assert refused.value.status == HTTPStatus.BAD_REQUEST
