import base64
import json
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.server.api.json_images import parse_json_images
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import Upload

DATA = b"\x89PNG and more"
TEXT = base64.b64encode(DATA).decode()


def parse(document: Any) -> tuple[list[Upload], dict[str, str]]:
    return parse_json_images(json.dumps(document).encode(), 3)


@given(st.binary(min_size=1), st.sampled_from(["", "\n", " \r\n"]), st.sampled_from(["", "data:image/png;base64,"]))
def test_any_bytes_are_decoded(data: bytes, separator: str, head: str) -> None:
    text = base64.b64encode(data).decode()
    wrapped = separator.join(text[start : start + 76] for start in range(0, len(text), 76))
    assert parse({"image": head + wrapped}) == ([Upload(None, data)], {})


@pytest.mark.parametrize(
    "instance",
    [
        TEXT,
        {"b64": TEXT},
        {"image": TEXT},
        {"data": TEXT},
        *[{name: {"b64": TEXT}} for name in ("image", "image_bytes")],
    ],
)
def test_an_image_can_have_any_of_the_usual_names(instance: Any) -> None:
    for document in ({"image": instance}, {"images": [instance]}, {"instances": [instance]}):
        assert parse(document) == ([Upload(None, DATA)], {})


def test_images_keep_their_order_and_their_keys() -> None:
    instances = [{"b64": base64.b64encode(bytes([number])).decode(), "key": f"n{number}"} for number in range(3)]
    assert parse({"instances": instances})[0] == [Upload(f"n{number}", bytes([number])) for number in range(3)]


def test_the_other_fields() -> None:
    assert parse({"image": TEXT, "model": "lzh", "top_k": 3})[1] == {"model": "lzh", "top_k": "3"}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({}, 'the JSON has no image: send {"instances": [{"b64": "…"}]}'),
        ([], "Expected `object`, got `array`"),
        ({"image": 3}, "Expected"),
        ({"image": TEXT, "images": [TEXT]}, "the JSON has both 'image' and 'images'"),
        ({"image": TEXT, "topk": 3}, "unknown field `topk`"),
        ({"image": TEXT, "top_k": "3"}, "Expected `int | null`, got `str` - at `$.top_k`"),
        ({"instances": []}, "the list 'instances' is empty"),
        ({"instances": [TEXT, {}]}, "instances[1] has no image"),
        ({"instances": [{"b64": TEXT, "image": TEXT}]}, "instances[0] has 2 images"),
        ({"instances": [{"inputs": [[1.0]]}]}, "unknown field `inputs`"),
        ({"image": ""}, "image is empty"),
        ({"image": "abc"}, "image is not base64"),
        ({"image": TEXT + "!"}, "image is not base64"),
        ({"image": f"data:image/png,{TEXT}"}, "image is a data URL without base64"),
        ({"images": ["https://example.org/dog.png"]}, "images[0] is a URL, and the server downloads nothing"),
    ],
)
def test_a_malformed_document_is_refused(document: Any, problem: str) -> None:
    with pytest.raises(RequestError) as raised:
        parse(document)
    assert problem in str(raised.value)
    assert raised.value.status == HTTPStatus.BAD_REQUEST


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"image": "\xff"}', b"[" * 100_000, b'{"image":' * 100_000])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    with pytest.raises(RequestError, match="is not valid") as raised:
        parse_json_images(body, 3)
    assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_too_many_images_are_refused() -> None:
    with pytest.raises(RequestError, match="the JSON has 4 images, more than 3: send") as raised:
        parse({"images": [TEXT] * 4})
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE
