"""Forms from other encoders, and malformed forms."""

import re
from http import HTTPStatus

import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import IMAGE_FIELDS, Upload, parse_form

TYPE = b"multipart/form-data; boundary=XX"

# All encoders write these characters unchanged; quotes and control characters are encoded in different ways.
filenames = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters='"\\'), max_size=20)
images = st.tuples(
    filenames, st.binary(max_size=60) | st.sampled_from([b"\r\n", b"--XX", b"\r\n--XX", b"\r\n--XX--\r\n"])
)


def part(disposition: str, data: bytes = b"pixels", boundary: str = "XX") -> bytes:
    return f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


IMAGE = part('form-data; name="image"; filename="a.png"')
END = b"--XX--\r\n"
NO_IMAGE = "the form has no image: name the part 'image', as in curl -F image=@dog.png"
INCOMPLETE = "the form is incomplete: send all of it, with the boundary of the Content-Type header"


def parse(body: bytes, content_type: bytes = TYPE, max_images: int = 3) -> list[Upload]:
    return parse_form(content_type, body, max_images).images


@given(st.lists(images, min_size=1, max_size=8), st.sampled_from(IMAGE_FIELDS))
def test_parses_forms_of_urllib3(sent: list[tuple[str, bytes]], field: str) -> None:
    fields = [(field, (name, data, "image/png")) for name, data in sent]
    body, content_type = encode_multipart_formdata(fields)
    assert parse_form(str(content_type).encode(), body, 8).images == [Upload(name or None, data) for name, data in sent]


@given(st.lists(images.filter(lambda image: bool(image[0])), min_size=1, max_size=8))
def test_parses_forms_of_requests(sent: list[tuple[str, bytes]]) -> None:
    files = [("image", (name, data)) for name, data in sent]
    prepared = requests.Request("POST", "http://127.0.0.1/", files=files, data={"comment": "x"}).prepare()
    assert isinstance(prepared.body, bytes)
    form = parse_form(str(prepared.headers["Content-Type"]).encode(), prepared.body, 8, ("comment",))
    assert form.images == [Upload(name, data) for name, data in sent]
    assert form.fields == {"comment": "x"}


def test_returns_the_other_fields() -> None:
    body = part('form-data; name="comment"', b"hello") + IMAGE + part('form-data; name="top_k"', b"3") + END
    assert parse_form(TYPE, body, 3, ("comment", "top_k")).fields == {"comment": "hello", "top_k": "3"}


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        (part('form-data; name="Image"'), "unknown form field 'Image': use image, images, top_k, as in curl -F"),
        (part('form-data; name="image[]"'), "unknown form field 'image[]': use image"),
        (part('form-data; name="file"; filename="a.png"'), "unknown form field 'file': use image"),
        (part("form-data"), "unknown form field '': use image"),
        (part('form-data; name="top_k"', b"1") * 2, "the form field 'top_k' occurs twice: send each field once"),
        (part('form-data; name="top_k"', b"1" * 1001), "the form field 'top_k' has 1,001 bytes: send at most 1,000"),
    ],
)
def test_rejects_fields_that_would_be_ignored(other: bytes, problem: str) -> None:
    for body in (IMAGE + other + END, other + IMAGE + END):
        with pytest.raises(RequestError, match=re.escape(problem)) as raised:
            parse_form(TYPE, body, 3, ("top_k",))
        assert raised.value.status == HTTPStatus.BAD_REQUEST


def test_accepts_a_part_without_a_file_name() -> None:
    assert (
        parse(part('form-data; name="image"') + part("form-data; name=images") + END) == [Upload(None, b"pixels")] * 2
    )


def test_accepts_part_headers_in_any_case_and_order() -> None:
    body = (
        b"--XX\r\nContent-Type: image/png\r\n"
        b'content-DISPOSITION: form-data; filename="a.png"; name="image"\r\n\r\nx\r\n' + END
    )
    assert parse(body) == [Upload("a.png", b"x")]


def test_does_not_carry_headers_over_to_the_next_part() -> None:
    assert parse(IMAGE + part('form-data; name="image"', b"other") + END) == [
        Upload("a.png", b"pixels"),
        Upload(None, b"other"),
    ]


def test_ignores_data_after_the_end() -> None:
    assert parse(IMAGE + END + b"epilogue") == parse(IMAGE + b"--XX--") == [Upload("a.png", b"pixels")]


def test_accepts_a_quoted_boundary() -> None:
    assert parse(IMAGE.replace(b"XX", b"a b") + b"--a b--\r\n", b'multipart/form-data; boundary="a b"')


def test_replaces_invalid_utf8_in_a_file_name() -> None:
    body = IMAGE.replace(b"a.png", b"\xff.png") + END
    assert parse(body)[0].filename == "\ufffd.png"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", INCOMPLETE),
        (IMAGE, INCOMPLETE),
        (IMAGE + END[:-3], INCOMPLETE),
        (IMAGE[:30], INCOMPLETE),
        (b"no form", "malformed form"),
        (IMAGE.replace(b"XX", b"YY") + END, "malformed form"),
        (IMAGE.replace(b"Content-D", b"Content\xffD") + END, "malformed form"),
        (b"--XX\r\nContent-Disposition\r\n\r\nx\r\n" + END, "malformed form"),
        (b"--XX\r\n: x\r\n\r\nx\r\n" + END, "malformed form"),
        (b"--XX\r\n" + b"a: b\r\n" * 1000 + b"\r\nx\r\n" + END, "malformed form"),
        (b"--XX\r\n" + b"a" * 100_000 + b": b\r\n\r\nx\r\n" + END, "malformed form"),
        (END, NO_IMAGE),
        (b"--XX\r\n\r\nx\r\n" + END, "unknown form field ''"),
    ],
    ids=range(13),
)
def test_rejects_a_malformed_form(body: bytes, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match=problem) as raised:
        parse(body)
    assert raised.value.status == HTTPStatus.BAD_REQUEST
    assert caplog.records == []  # errors of clients are not logged


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"X" * 1000,
        b";;=;",
    ],
)
def test_rejects_a_content_type_without_a_valid_boundary(content_type: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        parse(IMAGE + END, content_type)
    assert raised.value.status == HTTPStatus.BAD_REQUEST
    if b"X" not in content_type:
        assert str(raised.value) == (
            "the Content-Type multipart/form-data has no boundary: "
            "set no Content-Type yourself, so that the client sets it, as in curl -F image=@dog.png"
        )


def test_rejects_more_images_than_the_limit() -> None:
    assert len(parse(IMAGE * 3 + END)) == 3
    problem = "the form has more than 3 images: send the images in several requests"
    with pytest.raises(RequestError, match=problem) as raised:
        parse(IMAGE * 4 + END)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


@pytest.mark.parametrize(
    "unit", [b"\r\n--XX\r\n\r\n", b"\r\n--XX\r\na: b\r\n\r\n", b"\r\n--XXX"], ids=["empty", "small", "near"]
)
def test_rejects_a_form_of_a_million_parts_before_parsing_it(unit: bytes) -> None:
    problem = "the form has more than 19 parts: send the images in several requests"
    with pytest.raises(RequestError, match=problem) as raised:
        parse(IMAGE[:-2] + unit * 1_000_000 + b"\r\n" + END)
    assert raised.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


pieces = st.lists(
    st.sampled_from(
        [
            b"--XX",
            b"--XX\r\n",
            b"\r\n--XX\r\n",
            b"\r\n--XX--",
            b"--",
            b"\r",
            b"\n",
            b"\r\n",
            b"\r\n\r\n",
            b": ",
            b"\0",
            b" ",
            b";",
            b"Content-Disposition",
            b'form-data; name="image"',
            b"name=image",
            b"filename*=utf-8''x",
            b'"',
            b"\\",
            b"\xff",
        ]
    )
    | st.binary(max_size=8),
    max_size=20,
).map(b"".join)


@given(pieces, st.just(TYPE) | st.binary(max_size=12).map(lambda end: b"multipart/form-data; boundary=" + end))
@example(b"----", b"multipart/form-data; boundary=")
def test_parses_or_rejects_any_form(body: bytes, content_type: bytes) -> None:
    try:
        uploads = parse(body, content_type)
    except RequestError as error:
        assert error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    else:
        assert 1 <= len(uploads) <= 3
        assert all(re.search(re.escape(upload.data), body, re.DOTALL) for upload in uploads)
