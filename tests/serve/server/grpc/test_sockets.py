"""The sockets of a port, found among those of this process."""

import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cifarx_serve.server.grpc.sockets import drop_connections, has_connections, stop_listening

pytestmark = pytest.mark.skipif(not Path("/dev/fd").exists(), reason="requires a list of file descriptors")


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        yield opened


def port_of(listener: socket.socket) -> int:
    port: int = listener.getsockname()[1]
    return port


def test_connections_are_found(listener: socket.socket) -> None:
    """The end of the client, which has another local port, does not count."""
    assert not has_connections(port_of(listener))
    with socket.create_connection(listener.getsockname()) as client:
        assert not has_connections(port_of(listener))
        accepted, _ = listener.accept()
        with accepted:
            assert has_connections(port_of(listener))
            assert not has_connections(port_of(listener) ^ 1)
            client.sendall(b"still open")
            assert accepted.recv(100) == b"still open"
        assert not has_connections(port_of(listener))


def test_a_listener_that_has_stopped_refuses_connections(listener: socket.socket) -> None:
    address = listener.getsockname()
    stop_listening(port_of(listener) ^ 1)
    socket.create_connection(address).close()
    stop_listening(port_of(listener))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


@pytest.mark.skipif(sys.platform != "linux", reason="requires filters of Linux")
def test_new_handshakes_are_dropped(listener: socket.socket) -> None:
    """Those that were complete can be accepted."""
    with socket.create_connection(listener.getsockname()):
        drop_connections(port_of(listener))
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.3)
        listener.accept()[0].close()


def test_no_descriptor_is_left_open(listener: socket.socket) -> None:
    before = len(list(Path("/dev/fd").iterdir()))
    for _ in range(3):
        has_connections(port_of(listener))
    assert len(list(Path("/dev/fd").iterdir())) == before
