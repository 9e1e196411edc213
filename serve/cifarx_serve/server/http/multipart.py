"""A form of images: the body of a `multipart/form-data` request (RFC 7578)."""

import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Final, NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from cifarx_serve.server.errors import RequestError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

FORM: Final = "multipart/form-data"
FIELDS: Final = ("image", "images")
"""What a form's parts with images are named; other parts are passed over."""

_OTHERS: Final = 64
"""Parts that a form may have beside its images: each costs the parser microseconds, and takes ten bytes to send."""

logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # a damaged form is told to who sent it


class Upload(NamedTuple):
    """The bytes of an image file, and its name where the client gave one."""

    name: str | None
    data: bytes


def read_form(content_type: bytes, body: bytes, max_images: int) -> list[Upload]:
    """The images of a form, at least one.

    Raises:
        RequestError: a damaged form or one without an image (400), or too many images (413).
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    if body.count(b"\r\n--" + boundary) > max_images + _OTHERS:
        raise _too_many(f"a form of over {max_images + _OTHERS} parts")
    reading = _Reading(max_images)
    try:
        parser = MultipartParser(boundary, reading.callbacks())
        parser.write(body)
    except FormParserError as error:
        raise _bad(f"a damaged form ({error})", "send it again") from error
    if not reading.ended:
        raise _bad("a form without its end", "send all of it, with the boundary that its content type names")
    if not reading.images:
        raise _bad("a form without an image", f"name the part {FIELDS[0]!r}, as in curl -F image=@dog.png")
    return reading.images


class _Reading:
    """What a form's parser has found so far."""

    def __init__(self, max_images: int) -> None:
        self.images: list[Upload] = []
        self.ended = False
        self._max_images = max_images
        self._headers: dict[bytes, bytes] = {}
        self._field = b""
        self._value = b""
        self._data: list[bytes] = []

    def callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._add_to_field,
            "on_header_value": self._add_to_value,
            "on_header_end": self._end_header,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._headers, self._data = {}, []

    def _add_to_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _add_to_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _end_header(self) -> None:
        self._headers[self._field.lower()] = self._value
        self._field = self._value = b""

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data.append(data[start:end])

    def _end_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        if options.get(b"name", b"").decode("latin-1") not in FIELDS:
            return
        if len(self.images) == self._max_images:
            raise _too_many(f"over {self._max_images} images in one form")
        name = options.get(b"filename", b"").decode("utf-8", "replace")
        self.images.append(Upload(name or None, b"".join(self._data)))

    def _end(self) -> None:
        self.ended = True


def _bad(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)


def _too_many(problem: str) -> RequestError:
    return RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send them in several requests")
