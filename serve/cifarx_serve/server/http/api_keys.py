"""API keys, compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from cifarx_serve.errors import UsageError, error_message
from cifarx_serve.files.regular_file import read_text_file


class ApiKeys:
    """The API keys of a file, one per line. Empty lines and lines that start with # are ignored.

    Only SHA-256 digests are kept, so that the time of a comparison does not depend on the length of a key.

    Raises:
        UsageError: the file cannot be read, has no key, or has a key that cannot be sent in a header.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = read_text_file(path).splitlines()
        except (OSError, UnicodeError) as error:
            problem = f"cannot read the API keys in {path} ({error_message(error)})"
            raise UsageError(problem, "write one key per line") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise UsageError(f"no API key in {path}", "write one key per line")
        if invalid := [number for number, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable())]:
            problem = f"API key {invalid[0]} in {path} has characters other than printable ASCII"
            raise UsageError(problem, "choose another key")
        self._digests = [_digest(key.encode()) for key in keys]

    def authenticate(self, headers: dict[bytes, bytes]) -> bool:
        """Return whether the request headers have a valid key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`."""
        key = headers.get(b"x-api-key", b"")
        scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":
            key = credentials.strip()
        digest = _digest(key)
        # Compare with every key, even after a match, so that the time does not depend on which one matches.
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
