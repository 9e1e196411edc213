from http import HTTPStatus

import pytest
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.server.api.uploads import parse_uploads
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.multipart import Upload
from cifarx_serve.server.http.request import Message, Request
from cifarx_serve.server.settings import Limits


def parse(body: bytes, content_type: str | None) -> list[Upload]:
    async def receive() -> Message:
        raise AssertionError

    headers = [] if content_type is None else [(b"content-type", content_type.encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers}
    return parse_uploads(Request(scope, receive, Limits(max_images=2), BodyBudget(1 << 20)), body)


@pytest.mark.parametrize("content_type", [None, "image/png", "IMAGE/x-anything; a=b", "application/octet-stream"])
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


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/json", "application/x-www-form-urlencoded", "multipart/mixed", "imag"]
)
def test_other_content_types_are_refused(content_type: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(b"bytes", content_type)
    assert str(refused.value) == (
        f"the content type {content_type!r} is not supported: send an image as image/png, image/jpeg, … or "
        "application/octet-stream, or a form as multipart/form-data"
    )
    assert refused.value.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE


def test_an_empty_body_is_refused() -> None:
    with pytest.raises(RequestError, match="the body is empty: send an image") as refused:
        parse(b"", "image/png")
    assert refused.value.status == HTTPStatus.BAD_REQUEST
