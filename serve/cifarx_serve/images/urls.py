"""Recognizes URLs in place of paths. cifarx opens no network connection to read an image."""

from typing import Final

from cifarx_serve.errors import ImageError

_MAX_SHOWN: Final = 200
"""A `data:` URL can be as long as its image."""

_REMEDIES: Final = {"file": "give its path", "data": "decode the base64 text, and give the bytes"}


def is_url(name: str) -> bool:
    """Return whether a name is a URL, such as `https://…`, `s3://…` or `data:…`."""
    scheme, separator, rest = name.partition(":")
    is_scheme = len(scheme) > 1 and scheme.isascii() and scheme[0].isalpha() and scheme.replace("+", "").isalnum()
    return bool(separator) and is_scheme and (scheme == "data" or rest.startswith("//"))


def url_error(url: str) -> ImageError:
    """Return the error for a URL in place of a path."""
    shown = url if len(url) <= _MAX_SHOWN else f"{url[:_MAX_SHOWN]}…"
    remedy = _REMEDIES.get(url.partition(":")[0], "save it to a file first, or give its content as bytes")
    return ImageError(f"{shown} is a URL, and cifarx does not download", remedy)
