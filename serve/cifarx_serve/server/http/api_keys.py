"""Who may ask: a key in a header, compared in constant time."""

import hashlib
import hmac
from pathlib import Path

from cifarx_serve.errors import UsageError


class ApiKeys:
    """The keys of a file, one a line; empty lines and those that begin with # are passed over.

    Only their sha256 is held, so that a comparison says nothing of a key's length.

    Raises:
        UsageError: the file cannot be read, has no key, or one that no header can carry.
    """

    def __init__(self, path: Path) -> None:
        try:
            lines = path.read_text("utf-8").splitlines()
        except (OSError, UnicodeError) as error:
            raise UsageError(f"cannot read the API keys in {path} ({error})", "write one key a line") from error
        keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not keys:
            raise UsageError(f"no API key in {path}", "write one key a line")
        if bad := [number for number, key in enumerate(keys, 1) if not (key.isascii() and key.isprintable())]:
            raise UsageError(f"API key {bad[0]} in {path} is not of visible ASCII characters", "choose another")
        self._digests = [_digest(key.encode()) for key in keys]

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        """Whether a request's headers have a key: `Authorization: Bearer KEY`, or `X-API-Key: KEY`."""
        given = headers.get(b"x-api-key", b"")
        kind, _, credentials = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer":
            given = credentials.strip()
        digest = _digest(given)
        # All of them, whichever fits: the time tells nothing.
        return sum([hmac.compare_digest(digest, known) for known in self._digests]) > 0


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
