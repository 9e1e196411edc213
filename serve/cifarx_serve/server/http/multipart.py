"""Forms with images: the body of a `multipart/form-data` request (RFC 7578)."""

import logging
from collections.abc import Collection
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cifarx_serve.server.errors import RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MULTIPART_FORM: Final = "multipart/form-data"
IMAGE_FIELDS: Final = ("image", "images")
"""The field names of the parts that are images."""

_MAX_OTHER_PARTS: Final = 16
"""Parts allowed in addition to the images: parsing one takes microseconds, but sending one takes only ten bytes."""

_MAX_VALUE: Final = 1000
"""The maximum size of a part that is no image, in bytes."""

_EXAMPLE: Final = "curl -F image=@dog.png"

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a malformed form is reported to the client instead


class Upload(NamedTuple):
    """An uploaded image file.

    Attributes:
        filename: the file name; None if the client sent none.
        data: the content of the file.
    """

    filename: str | None
    data: bytes


class Form(NamedTuple):
    """The content of a form: the images, at least one, and the values of the other fields by name."""

    images: list[Upload]
    fields: dict[str, str]


def parse_form(content_type: bytes, body: bytes, max_images: int, fields: Collection[str] = ()) -> Form:
    """Parse a form with images.

    Args:
        content_type: the `Content-Type` header, which states the boundary.
        body: the body of the request.
        max_images: the maximum number of images.
        fields: the names of the fields that a form may have beside the images.

    Raises:
        RequestError: the form is malformed, has no image, an unknown field or a field twice (400), or has too many
            images or parts (413).
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if not boundary:
        problem = f"the Content-Type {MULTIPART_FORM} has no boundary"
        raise _bad_request(problem, f"set no Content-Type yourself, so that the client sets it, as in {_EXAMPLE}")
    max_parts = max_images + _MAX_OTHER_PARTS
    if body.count(b"\r\n--" + boundary) > max_parts:
        raise _too_large(f"the form has more than {max_parts} parts")
    form = _FormParser(max_images, fields)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        parser.write(body)
    except FormParserError as error:
        raise _bad_request(f"malformed form ({error})", "send it again") from error
    if not form.complete:
        raise _bad_request("the form is incomplete", "send all of it, with the boundary of the Content-Type header")
    if not form.images:
        raise _bad_request("the form has no image", f"name the part {IMAGE_FIELDS[0]!r}, as in {_EXAMPLE}")
    return Form(form.images, form.fields)


class _FormParser:
    """Collects the images and fields of a form from the callbacks of the parser."""

    def __init__(self, max_images: int, field_names: Collection[str]) -> None:
        self.images: list[Upload] = []
        self.fields: dict[str, str] = {}
        self.complete = False
        self._max_images = max_images
        self._field_names = field_names
        self._headers: dict[bytes, bytes] = {}
        self._header_field = b""
        self._header_value = b""
        self._data: list[bytes] = []

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._on_part_begin,
            "on_header_field": self._on_header_field,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_end": self._on_end,
        }

    def _on_part_begin(self) -> None:
        self._headers, self._data = {}, []

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[self._header_field.lower()] = self._header_value
        self._header_field = self._header_value = b""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _on_part_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        name, data = options.get(b"name", b"").decode("utf-8", "replace"), b"".join(self._data)
        if name not in IMAGE_FIELDS:
            self._add_field(name, data)
            return
        if len(self.images) == self._max_images:
            raise _too_large(f"the form has more than {self._max_images} images")
        filename = options.get(b"filename", b"").decode("utf-8", "replace")
        self.images.append(Upload(filename or None, data))

    def _add_field(self, name: str, data: bytes) -> None:
        if name not in self._field_names:
            known = ", ".join((*IMAGE_FIELDS, *self._field_names))
            raise _bad_request(f"unknown form field {name[:80]!r}", f"use {known}, as in {_EXAMPLE}")
        if name in self.fields:
            raise _bad_request(f"the form field {name!r} occurs twice", "send each field once")
        if len(data) > _MAX_VALUE:
            raise _bad_request(f"the form field {name!r} has {len(data):,} bytes", f"send at most {_MAX_VALUE:,}")
        self.fields[name] = data.decode("utf-8", "replace")

    def _on_end(self) -> None:
        self.complete = True


def _bad_request(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)


def _too_large(problem: str) -> RequestError:
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send the images in several requests")
