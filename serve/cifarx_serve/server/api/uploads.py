"""The image files of a request: its body, the parts of a multipart form, or base64 in JSON."""

from collections.abc import Collection
from http import HTTPStatus
from typing import Final, NamedTuple

from cifarx_serve.server.api.json_images import parse_json_images
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import MULTIPART_FORM, Upload, parse_form
from cifarx_serve.server.http.request import Request
from cifarx_serve.server.inference.deadline import Deadline, ThreadPool

JSON: Final = "application/json"

_IMAGE_TYPES: Final = ("application/octet-stream", "application/x-image")
"""The types of an image beside `image/*`. The second one is SageMaker's."""

_MAX_INLINE_JSON: Final = 1 << 16
"""Longer JSON, in bytes, is parsed in a thread: decoding a megabyte of base64 takes a millisecond."""


class Uploads(NamedTuple):
    """The images of a request, at least one, and the fields that it states beside them."""

    images: list[Upload]
    fields: dict[str, str]


async def parse_uploads(
    request: Request, body: bytes, fields: Collection[str], threads: ThreadPool, deadline: Deadline
) -> Uploads:
    """Return the image files of a request, and the fields that a form or JSON has beside them.

    Args:
        request: the request.
        body: its body.
        fields: the names of the fields that are known.
        threads: the threads that parse large JSON.
        deadline: when the request must be answered.

    Raises:
        RequestError: the content type is not supported (415), there is no image, or the form or the JSON is malformed
            (400), or there are too many images (413).
        DeadlineExceeded: the deadline has passed.
    """
    content_type, max_images = request.content_type, request.limits.max_images
    if content_type == MULTIPART_FORM:
        return Uploads(*parse_form(request.headers[b"content-type"], body, max_images, fields))
    if content_type == JSON:
        if len(body) <= _MAX_INLINE_JSON:
            return Uploads(*parse_json_images(body, max_images))
        return Uploads(*await threads.run(deadline, parse_json_images, body, max_images))
    if content_type and not content_type.startswith("image/") and content_type not in _IMAGE_TYPES:
        problem = f"the content type {content_type[:80]!r} is not supported"
        remedy = (
            "send an image, as in curl --data-binary @dog.png -H 'Content-Type: image/png', "
            f"a form, as in curl -F image=@dog.png, or base64 in JSON as {JSON}"
        )
        raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem, remedy)
    if not body:
        raise RequestError(HTTPStatus.BAD_REQUEST, "the body is empty", "send an image")
    return Uploads([Upload(None, body)], {})
