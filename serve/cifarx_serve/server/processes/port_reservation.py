"""Reserves a port on which each worker listens with a socket of its own, as gRPC does."""

import socket
from contextlib import suppress
from typing import Final

from cifarx_serve.errors import UsageError, error_message

_ANY_IPV4: Final = "0.0.0.0"
_ANY_IPV6: Final = "::"


class PortReservation:
    """A port of the supervisor, which does not listen on it.

    Only processes of the same user that ask to share the port can listen on it. It stays reserved while no worker runs.

    Args:
        host: the address to listen on.
        port: the port; 0 chooses a free one.

    Attributes:
        address: the numeric address and the port, such as `127.0.0.1:8001` or `[::1]:8001`.

    Raises:
        UsageError: the address does not exist, or another program uses it.
    """

    def __init__(self, host: str, port: int) -> None:
        self._sockets: list[socket.socket] = []
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
                0
            ]
            self._bind(family, address)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen on {host} port {port} for gRPC ({error_message(error)})", "choose another --grpc-port"
            ) from error
        bound_host, bound_port = self._sockets[0].getsockname()[:2]
        self.port: int = bound_port
        self.address = f"[{bound_host}]:{bound_port}" if family == socket.AF_INET6 else f"{bound_host}:{bound_port}"
        if bound_host == _ANY_IPV4:
            self._keep_from_ipv6()

    def _bind(self, family: int, address: object) -> None:
        reserved = socket.socket(family, socket.SOCK_STREAM)
        self._sockets.append(reserved)
        try:
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reserved.bind(address)  # type: ignore[arg-type]
            # Now, not before: the port must have been free, and another server must not be able to reserve it too.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        except OSError:
            self.close()
            raise

    def _keep_from_ipv6(self) -> None:
        """Reserve the IPv6 port without sharing it: for all IPv4 addresses, gRPC would listen on those of IPv6 too."""
        with suppress(OSError):  # there is no IPv6, or another program listens there
            guard = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
            self._sockets.append(guard)
            guard.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            guard.bind((_ANY_IPV6, self.port))

    def close(self) -> None:
        """End the reservation."""
        for reserved in self._sockets:
            reserved.close()
