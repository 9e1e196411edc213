"""A port that the supervisor reserves, and on which workers listen."""

import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from cifarx_serve.errors import UsageError
from cifarx_serve.server.processes.port_reservation import PortReservation

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="requires ports that processes can share")


@pytest.fixture
def reservation() -> Iterator[PortReservation]:
    with closing(PortReservation("127.0.0.1", 0)) as reserved:
        yield reserved


def listen(host: str, port: int, share: bool, family: int = socket.AF_INET) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if share:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError:
        listener.close()
        raise
    return listener


def test_workers_share_the_port(reservation: PortReservation) -> None:
    assert reservation.address == f"127.0.0.1:{reservation.port}"
    address = ("127.0.0.1", reservation.port)
    with listen(*address, share=True), listen(*address, share=True), socket.create_connection(address):
        pass


def test_nobody_is_connected_to_the_reservation(reservation: PortReservation) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", reservation.port))


def test_other_programs_cannot_listen_on_it(reservation: PortReservation) -> None:
    with pytest.raises(OSError, match="in use"):
        listen("127.0.0.1", reservation.port, share=False)


@pytest.mark.parametrize("with_worker", [False, True])
def test_another_server_cannot_reserve_it(reservation: PortReservation, with_worker: bool) -> None:
    problem = (
        rf"cannot listen on 127\.0\.0\.1 port {reservation.port} for gRPC \(Address already in use\): choose another"
    )
    if with_worker:
        with listen("127.0.0.1", reservation.port, share=True), pytest.raises(UsageError, match=problem):
            PortReservation("127.0.0.1", reservation.port)
    else:
        with pytest.raises(UsageError, match=problem):
            PortReservation("127.0.0.1", reservation.port)


def test_a_port_that_is_in_use() -> None:
    with listen("127.0.0.1", 0, share=True) as listener, pytest.raises(UsageError, match="choose another --grpc-port"):
        PortReservation("127.0.0.1", listener.getsockname()[1])


def test_it_is_free_afterwards(reservation: PortReservation) -> None:
    reservation.close()
    PortReservation("127.0.0.1", reservation.port).close()


def test_addresses() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on no-such-host\.invalid port 0 for gRPC"):
        PortReservation("no-such-host.invalid", 0)
    if socket.has_ipv6:
        try:
            reserved = PortReservation("::1", 0)
        except UsageError:
            pytest.skip("the machine has no IPv6")
        with closing(reserved):
            assert reserved.address == f"[::1]:{reserved.port}"
