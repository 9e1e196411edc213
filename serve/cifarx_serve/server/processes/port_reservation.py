"""Reserves a port on which each worker listens with a socket of its own, as gRPC does."""

import socket

from cifarx_serve.errors import UsageError, error_message


class PortReservation:
    """A port of the supervisor, which does not listen on it.

    Only processes of the same user that ask to share the port can listen on it. It stays reserved while no worker runs.

    Args:
        host: the address to listen on.
        port: the port; 0 chooses a free one.

    Attributes:
        address: the numeric address and the port, such as `127.0.0.1:8001` or `[::1]:8001`.
        port: the port.

    Raises:
        UsageError: the address does not exist, or another program uses it.
    """

    def __init__(self, host: str, port: int) -> None:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, _, _, _, address = found[0]
            self._socket = _reserve(family, address)
        except (OSError, OverflowError) as error:
            raise UsageError(
                f"cannot listen on {host} port {port} for gRPC ({error_message(error)})", "choose another --grpc-port"
            ) from error
        bound_host, self.port = self._socket.getsockname()[:2]
        self.address = f"[{bound_host}]:{self.port}" if family == socket.AF_INET6 else f"{bound_host}:{self.port}"

    def close(self) -> None:
        """End the reservation."""
        self._socket.close()


def _reserve(family: int, address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> socket.socket:
    reserved = socket.socket(family, socket.SOCK_STREAM)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        reserved.bind(address)
        # Now, not before: the port must have been free, and another server must not be able to reserve it too.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        reserved.close()
        raise
    return reserved
