"""The image files of a request: its body, or the parts of a multipart form."""

from http import HTTPStatus

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import MULTIPART_FORM, Upload, parse_form
from cifarx_serve.server.http.request import Request


def parse_uploads(request: Request, body: bytes) -> list[Upload]:
    """Return the image files of a request, at least one.

    Raises:
        RequestError: the content type is not supported (415), there is no image or the form is malformed (400), or
            there are too many images (413).
    """
    content_type = request.content_type
    if content_type == MULTIPART_FORM:
        return parse_form(request.headers[b"content-type"], body, request.limits.max_images)
    if content_type and not content_type.startswith("image/") and content_type != "application/octet-stream":
        problem = f"the content type {content_type[:80]!r} is not supported"
        remedy = f"send an image as image/png, image/jpeg, … or application/octet-stream, or a form as {MULTIPART_FORM}"
        raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem, remedy)
    if not body:
        raise RequestError(HTTPStatus.BAD_REQUEST, "the body is empty", "send an image")
    return [Upload(None, body)]
