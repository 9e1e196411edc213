import socket
import sys

import pytest

from cifarx_serve.server.processes.socket_filter import refuse_handshakes
from cifarx_serve.server.processes.supervisor import listen


@pytest.mark.skipif(sys.platform != "linux", reason="this system lets clients in until the socket is closed")
def test_who_is_connected_gets_through_and_nobody_else() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as before:
        refuse_handshakes(listener)
        with socket.socket() as after:
            after.settimeout(0.3)
            with pytest.raises(TimeoutError):
                after.connect(listener.getsockname())
        before.sendall(b"asked")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(10) == b"asked"
            accepted.sendall(b"answered")
            assert before.recv(10) == b"answered"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_what_cannot_be_done_changes_nothing() -> None:
    with socket.socket() as closed:
        pass
    refuse_handshakes(closed)
    assert closed.fileno() == -1
