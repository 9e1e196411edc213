"""Images in JSON, encoded in base64: the bodies of KServe's v1 protocol and of clients that can send nothing else."""

import binascii
from http import HTTPStatus
from typing import Any, Final

import msgspec

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.multipart import Upload

_EXAMPLE: Final = '{"instances": [{"b64": "…"}]}'
_DATA_URL: Final = "data:"
_BASE64_SUFFIX: Final = ";base64"


class Base64(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Base64 as TensorFlow Serving and KServe write it."""

    b64: str


class Instance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, under any of the names that clients of KServe, TensorFlow Serving and TorchServe use.

    `key` is a name for the image, which its prediction repeats.
    """

    b64: str | None = None
    image: str | Base64 | None = None
    image_bytes: str | Base64 | None = None
    data: str | Base64 | None = None
    key: str | None = None


class JsonImages(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image, or a list of images, each in base64 or as a data URL. The other fields are those of the query."""

    image: str | Instance | None = None
    images: list[str | Instance] | None = None
    instances: list[str | Instance] | None = None
    model: str | None = None
    top_k: int | None = None

    @property
    def fields(self) -> dict[str, str]:
        """The fields beside the images, as text, by name."""
        return {name: str(value) for name in ("model", "top_k") if (value := getattr(self, name)) is not None}


def parse_json_images(body: bytes, max_images: int) -> tuple[list[Upload], dict[str, str]]:
    """Return the images of a JSON document, at least one, and its other fields by name.

    Raises:
        RequestError: the document is malformed or has no image (400), or has too many images (413).
    """
    try:
        document = msgspec.json.decode(body, type=JsonImages)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise _bad_request(f"the JSON of {len(body):,} bytes is not valid ({error})", f"send {_EXAMPLE}") from error
    given = [name for name in ("image", "images", "instances") if getattr(document, name) is not None]
    if len(given) != 1:
        problem = f"the JSON has both {given[0]!r} and {given[1]!r}" if given else "the JSON has no image"
        raise _bad_request(problem, f"send {_EXAMPLE}")
    (name,) = given
    value: Any = getattr(document, name)
    images: list[str | Instance] = value if isinstance(value, list) else [value]
    if not images:
        raise _bad_request(f"the list {name!r} is empty", "send at least one image")
    if len(images) > max_images:
        problem = f"the JSON has {len(images):,} images, more than {max_images}"
        raise RequestError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, problem, "send the images in several requests")
    positions = [name] if name == "image" else [f"{name}[{index}]" for index in range(len(images))]
    return list(map(_upload, images, positions)), document.fields


def _upload(image: str | Instance, position: str) -> Upload:
    if isinstance(image, str):
        return Upload(None, decode_base64(image, position))
    fields = ("b64", "image", "image_bytes", "data")
    given = [value for field in fields if (value := getattr(image, field)) is not None]
    if len(given) != 1:
        problem = f"{position} has {len(given)} images" if given else f"{position} has no image"
        raise _bad_request(problem, 'send each as {"b64": "…"}, or under the name image, image_bytes or data')
    (value,) = given
    return Upload(image.key, decode_base64(value.b64 if isinstance(value, Base64) else value, position))


def decode_base64(text: str, position: str) -> bytes:
    """Return the bytes of an image from base64, which may contain white space, or from a data URL of it.

    Args:
        text: the base64.
        position: where it is in the request, for error messages.

    Raises:
        RequestError: it is not base64, or has no bytes (400).
    """
    if text.startswith(("http://", "https://")):
        raise _bad_request(f"{position} is a URL, and the server downloads nothing", "send the image itself in base64")
    if text.startswith(_DATA_URL):
        head, comma, text = text.partition(",")
        if not comma or not head.endswith(_BASE64_SUFFIX):
            raise _bad_request(f"{position} is a data URL without base64", 'send it as "data:image/png;base64,…"')
    try:
        data = binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:
        problem = f"{position} is not base64 ({error})"
        raise _bad_request(problem, "encode the image file, as `base64 dog.png` does") from error
    if not data:
        raise _bad_request(f"{position} is empty", "send an image")
    return data


def _bad_request(problem: str, remedy: str) -> RequestError:
    return RequestError(HTTPStatus.BAD_REQUEST, problem, remedy)
