"""What reverse proxies say about the clients of their requests: the headers `X-Forwarded-For`, `-Proto` and `-Prefix`.

Any client can send these headers, so only those of trusted proxies are used. `Forwarded` of RFC 7239 is not: a proxy
that does not set it passes on that of the client.
"""

import ipaddress
import re
from collections.abc import Iterable, Iterator, Sequence
from http import HTTPStatus
from typing import Final, TypeAlias

from cifarx_serve.errors import UsageError
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.request import Request

UNIX: Final = "unix"
"""Names the clients of a Unix socket, which have no address, among the trusted networks."""

_ROOT_PATH: Final = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~-]+)+")
_SCHEMES: Final = ("http", "https")

_Address: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
_Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network


def require_root_path(value: str) -> str:
    """Check a path prefix and return it.

    Raises:
        UsageError: it is not one, such as `/models`.
    """
    if value and not _ROOT_PATH.fullmatch(value):
        remedy = "give it as /prefix, with letters, digits and -._~, and without a slash at the end"
        raise UsageError(f"--root-path {value!r} is not the prefix of a path", remedy)
    return value


class TrustedProxies:
    """The reverse proxies whose headers are used.

    Args:
        networks: their networks, such as `10.0.0.0/8`; their addresses; or `UNIX`.

    Raises:
        UsageError: a value is neither.
    """

    def __init__(self, networks: Sequence[str]) -> None:
        self._unix = UNIX in networks
        self._networks = [_parse_network(value) for value in networks if value != UNIX]

    def apply(self, request: Request) -> None:
        """Set the client and the scheme in the scope of a request, and its root path, as its trusted proxies say.

        Raises:
            RequestError: `X-Forwarded-Prefix` is not the prefix of a path (400).
        """
        peer = request.scope.get("client")
        if not self._trusts_peer(peer and peer[0]):
            return
        if (client := self._last_client(_values(request, b"x-forwarded-for"))) is not None:
            request.scope["client"] = (str(client), 0)
        if (scheme := next(_values(request, b"x-forwarded-proto"), "").lower()) in _SCHEMES:
            request.scope["scheme"] = scheme
        if prefix := next(_values(request, b"x-forwarded-prefix"), "").rstrip("/"):
            if not _ROOT_PATH.fullmatch(prefix):
                problem = f"X-Forwarded-Prefix is {prefix[:80]!r}"
                raise RequestError(HTTPStatus.BAD_REQUEST, problem, "let the proxy send a path such as /prefix")
            request.mount(prefix)

    def client(self, peer: str, forwarded_for: Sequence[str]) -> str:
        """Return the address of the client of a call over gRPC.

        Args:
            peer: the address of the peer.
            forwarded_for: the values of `x-forwarded-for` in the metadata.
        """
        if not self._trusts_peer(peer):
            return peer
        values = [element.strip() for value in forwarded_for for element in value.split(",")]
        client = self._last_client(reversed(values))
        return peer if client is None else str(client)

    def _trusts_peer(self, peer: str | None) -> bool:
        return self._trusts(_parse_address(peer)) if peer else self._unix

    def _last_client(self, values: Iterable[str]) -> _Address | None:
        """Return the last address that is not of a trusted proxy, or the first of all; None if none is valid.

        What is left of it was sent by the client, which can send anything.
        """
        client = None
        for value in values:
            address = _parse_address(value)
            if address is None:
                break
            client = address
            if not self._trusts(address):
                break
        return client

    def _trusts(self, address: _Address | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def _values(request: Request, name: bytes) -> Iterator[str]:
    """Yield the elements of a header that is a list, from the last to the first."""
    for header, value in reversed(request.scope["headers"]):
        if header == name:
            for element in reversed(value.decode("latin-1").split(",")):
                yield element.strip()


def _parse_network(value: str) -> _Network:
    try:
        return ipaddress.ip_network(value)
    except ValueError as error:
        problem = f"--trusted-proxy {value!r} is not a network ({error})"
        raise UsageError(problem, f"give it as 10.0.0.0/8, or as one address; or {UNIX} for --uds") from error


def _parse_address(value: str) -> _Address | None:
    """Return an IP address, which may have a port: `10.0.0.1`, `10.0.0.1:80`, `::1` or `[::1]:80`; None if invalid."""
    host, bracket, _ = value.removeprefix("[").partition("]")
    if not bracket and value.count(":") == 1:
        host = value.partition(":")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address
