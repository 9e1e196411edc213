"""A call as the services see it."""

import time

import pytest

from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.grpc.call import Call, client_address


def test_the_id_is_that_of_the_client_if_it_is_valid() -> None:
    assert Call("/a/b", [("x-request-id", "abc-1")]).id == "abc-1"
    for invalid in ("", "a b", "x" * 129, "é"):
        assert len(Call("/a/b", [("x-request-id", invalid)]).id) == 32
    assert Call("/a/b", []).id != Call("/a/b", []).id


def test_the_deadline_is_the_shorter_one() -> None:
    call = Call("/a/b", [])
    assert call.deadline(5) == (call.started_at, 5)
    call.set_time_remaining(2)
    assert call.deadline(5).timeout_s == pytest.approx(2, abs=0.1)
    assert call.deadline(1).timeout_s == 1


def test_a_request_of_a_stream_has_the_time_that_the_stream_has_left() -> None:
    call = Call("/a/b", [])
    call.authenticated = True
    call.set_time_remaining(2)
    time.sleep(0.05)
    request = call.of_stream()
    assert request.started_at > call.started_at
    assert 1.5 < request.deadline(5).timeout_s < 1.96
    assert request.deadline(1).timeout_s == 1
    assert request.authenticated
    assert request.id != call.id
    assert Call("/a/b", []).of_stream().deadline(5).timeout_s == 5


def test_the_metadata_as_headers() -> None:
    call = Call("/a/b", [("authorization", "Bearer é"), ("trace-bin", b"\xff")])
    assert call.headers() == {b"authorization": "Bearer é".encode("latin-1"), b"trace-bin": b"\xff"}


def test_requires_a_key() -> None:
    call = Call("/a/b", [])
    with pytest.raises(RequestError, match="missing or invalid API key: send the metadata authorization: Bearer KEY"):
        call.require_key()
    call.authenticated = True
    call.require_key()


@pytest.mark.parametrize(
    ("peer", "address"),
    [("ipv4:127.0.0.1:50000", "127.0.0.1"), ("ipv6:%5B::1%5D:50000", "::1"), ("unix:", ""), ("", "")],
)
def test_the_address_of_the_client(peer: str, address: str) -> None:
    assert client_address(peer) == address
