import socket
import sys

import pytest

from cifarx_serve.server.processes.supervisor import listen
from cifarx_serve.system.socket_filter import drop_new_connections


@pytest.mark.skipif(sys.platform != "linux", reason="socket filters exist on Linux only")
def test_drops_new_connections_and_keeps_those_in_the_queue() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as before:
        drop_new_connections(listener)
        with socket.socket() as after:
            after.settimeout(0.3)
            with pytest.raises(TimeoutError):
                after.connect(listener.getsockname())
        before.sendall(b"request")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(10) == b"request"
            accepted.sendall(b"response")
            assert before.recv(10) == b"response"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_ignores_a_socket_that_cannot_be_filtered() -> None:
    with socket.socket() as closed:
        pass
    drop_new_connections(closed)
    assert closed.fileno() == -1
