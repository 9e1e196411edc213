"""Forms against encoders of other hands, and against what nobody should send."""

import re
from http import HTTPStatus

import pytest
import requests
from hypothesis import example, given
from hypothesis import strategies as st
from urllib3.filepost import encode_multipart_formdata

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import FIELDS, Upload, read_form

TYPE = b"multipart/form-data; boundary=XX"

# What encoders write as it is; quotes and control characters each writes in a way of its own.
names = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters='"\\'), max_size=20)
images = st.tuples(names, st.binary(max_size=60) | st.sampled_from([b"\r\n", b"--XX", b"\r\n--XX", b"\r\n--XX--\r\n"]))


def part(disposition: str, data: bytes = b"pixels", boundary: str = "XX") -> bytes:
    return f"--{boundary}\r\nContent-Disposition: {disposition}\r\n\r\n".encode() + data + b"\r\n"


IMAGE = part('form-data; name="image"; filename="a.png"')
END = b"--XX--\r\n"


def read(body: bytes, content_type: bytes = TYPE, most: int = 3) -> list[Upload]:
    return read_form(content_type, body, most)


@given(st.lists(images, min_size=1, max_size=8), st.sampled_from(FIELDS))
def test_what_urllib3_encodes_is_read_back(sent: list[tuple[str, bytes]], field: str) -> None:
    fields = [(field, (name, data, "image/png")) for name, data in sent]
    body, content_type = encode_multipart_formdata(fields)
    assert read_form(str(content_type).encode(), body, 8) == [Upload(name or None, data) for name, data in sent]


@given(st.lists(images.filter(lambda image: bool(image[0])), min_size=1, max_size=8))
def test_what_requests_encodes_is_read_back(sent: list[tuple[str, bytes]]) -> None:
    files = [("image", (name, data)) for name, data in sent]
    prepared = requests.Request("POST", "http://127.0.0.1/", files=files, data={"comment": "x"}).prepare()
    assert isinstance(prepared.body, bytes)
    found = read_form(prepared.headers["Content-Type"].encode(), prepared.body, 8)
    assert found == [Upload(name, data) for name, data in sent]


def test_other_parts_are_passed_over() -> None:
    body = part('form-data; name="comment"', b"hello") + IMAGE + part('form-data; name="Image"; filename="b"') + END
    assert read(body) == [Upload("a.png", b"pixels")]


def test_a_part_without_a_file_name_is_an_image() -> None:
    assert read(part('form-data; name="image"') + part("form-data; name=images") + END) == [Upload(None, b"pixels")] * 2


def test_headers_are_of_any_case_and_order() -> None:
    body = (
        b"--XX\r\nContent-Type: image/png\r\n"
        b'content-DISPOSITION: form-data; filename="a.png"; name="image"\r\n\r\nx\r\n' + END
    )
    assert read(body) == [Upload("a.png", b"x")]


def test_a_field_has_no_part_of_the_one_before() -> None:
    assert read(IMAGE + part('form-data; name="image"', b"other") + END) == [
        Upload("a.png", b"pixels"),
        Upload(None, b"other"),
    ]


def test_what_follows_the_end_is_passed_over() -> None:
    assert read(IMAGE + END + b"epilogue") == read(IMAGE + b"--XX--") == [Upload("a.png", b"pixels")]


def test_a_quoted_boundary() -> None:
    assert read(IMAGE.replace(b"XX", b"a b") + b"--a b--\r\n", b'multipart/form-data; boundary="a b"')


def test_a_name_that_is_no_utf8_is_read_as_far_as_it_can_be() -> None:
    body = IMAGE.replace(b"a.png", b"\xff.png") + END
    assert read(body)[0].name == "\ufffd.png"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "a form without its end"),
        (IMAGE, "a form without its end"),
        (IMAGE + END[:-3], "a form without its end"),
        (IMAGE[:30], "a form without its end"),
        (b"no form", "a damaged form"),
        (IMAGE.replace(b"XX", b"YY") + END, "a damaged form"),
        (IMAGE.replace(b"Content-D", b"Content\xffD") + END, "a damaged form"),
        (b"--XX\r\nContent-Disposition\r\n\r\nx\r\n" + END, "a damaged form"),
        (b"--XX\r\n: x\r\n\r\nx\r\n" + END, "a damaged form"),
        (b"--XX\r\n" + b"a: b\r\n" * 1000 + b"\r\nx\r\n" + END, "a damaged form"),
        (b"--XX\r\n" + b"a" * 100_000 + b": b\r\n\r\nx\r\n" + END, "a damaged form"),
        (END, "a form without an image"),
        (part('form-data; name="file"') + END, "a form without an image: name the part 'image', as in curl"),
        (b"--XX\r\n\r\nx\r\n" + END, "a form without an image"),
    ],
    ids=range(14),
)
def test_a_damaged_form_is_refused(body: bytes, problem: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RequestError, match=problem) as refused:
        read(body)
    assert refused.value.status == HTTPStatus.BAD_REQUEST
    assert caplog.records == []  # what clients send wrong does not fill the log of who runs the server


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data",
        b"multipart/form-data; boundary=",
        b"multipart/form-data; boundary=" + b"X" * 1000,
        b";;=;",
    ],
)
def test_a_type_without_a_sound_boundary_is_refused(content_type: bytes) -> None:
    with pytest.raises(RequestError) as refused:
        read(IMAGE + END, content_type)
    assert refused.value.status == HTTPStatus.BAD_REQUEST


def test_no_more_images_than_are_taken() -> None:
    assert len(read(IMAGE * 3 + END)) == 3
    with pytest.raises(RequestError, match="over 3 images in one form: send them in several requests") as refused:
        read(IMAGE * 4 + END)
    assert refused.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


@pytest.mark.parametrize(
    "unit", [b"\r\n--XX\r\n\r\n", b"\r\n--XX\r\na: b\r\n\r\n", b"\r\n--XXX"], ids=["empty", "small", "near"]
)
def test_a_form_of_parts_without_number_is_refused_before_it_is_read(unit: bytes) -> None:
    with pytest.raises(RequestError, match="a form of over 67 parts") as refused:
        read(IMAGE[:-2] + unit * 1_000_000 + b"\r\n" + END)
    assert refused.value.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE


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
def test_a_hostile_form_is_read_or_refused(body: bytes, content_type: bytes) -> None:
    try:
        found = read(body, content_type)
    except RequestError as error:
        assert error.status in (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    else:
        assert 1 <= len(found) <= 3
        assert all(re.search(re.escape(upload.data), body, re.DOTALL) for upload in found)
