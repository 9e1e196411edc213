"""The images of a request, decoded to what a model takes."""

from concurrent.futures import Executor
from http import HTTPStatus
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cifarx_serve.errors import ImageError
from cifarx_serve.images.preprocess import resize
from cifarx_serve.images.reader import TooManyPixels, open_image, read_image
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import FORM, Upload, read_form
from cifarx_serve.server.http.request import Request
from cifarx_serve.spec import ModelSpec

_QUICK_PIXELS: Final = 128 * 128
_QUICK_BYTES: Final = 32 * 1024
"""A picture up to this is decoded in a fraction of a millisecond: sooner than a thread takes it.

More bytes than the pixels take may be a thousand layers of a JPEG, or a million chunks before the picture: seconds.
"""


def uploads(request: Request, body: bytes) -> list[Upload]:
    """The image files of a request, at least one: its body, or the parts of a form.

    Raises:
        RequestError: another content type (415), no image or a damaged form (400), or too many images (413).
    """
    kind = request.content_type
    if kind == FORM:
        return read_form(request.headers[b"content-type"], body, request.limits.max_images)
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        problem = f"a body of type {kind[:80]!r}"
        remedy = f"send an image as image/png and the like or application/octet-stream, or a form as {FORM}"
        raise RequestError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, problem, remedy)
    if not body:
        raise RequestError(HTTPStatus.BAD_REQUEST, "the body is empty", "send an image")
    return [Upload(None, body)]


async def decode(
    upload: Upload, spec: ModelSpec, max_pixels: int, request: Request, pool: Executor
) -> NDArray[np.uint8]:
    """RGB pixels, (H, W, 3), at the model's size unless it resizes them itself; a large picture in the pool.

    Raises:
        ImageError: it cannot be read. TooManyPixels: it is over the limit, and was not decoded.
        RequestError: the request's deadline has passed (504).
    """
    if len(upload.data) > _QUICK_BYTES:
        return await request.run_in_threadpool(pool, _read, upload.data, max_pixels, spec)
    image = open_image(upload.data, max_pixels)
    if image.width * image.height <= _QUICK_PIXELS:
        return _pixels(image, spec)
    return await request.run_in_threadpool(pool, _pixels, image, spec)


def refusal(error: ImageError) -> RequestError:
    """For a request of which no image could be read."""
    large = isinstance(error, TooManyPixels)
    status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if large else HTTPStatus.BAD_REQUEST
    return RequestError(status, error.problem, error.remedy)


def _read(data: bytes, max_pixels: int, spec: ModelSpec) -> NDArray[np.uint8]:
    return _pixels(open_image(data, max_pixels), spec)


def _pixels(image: Image.Image, spec: ModelSpec) -> NDArray[np.uint8]:
    picture = read_image(image)
    return np.asarray(picture) if spec.embedded_preprocessing else resize(picture, spec.input)
