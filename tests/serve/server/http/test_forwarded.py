"""The headers of reverse proxies, from trusted and other peers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.server.errors import RequestError
from cifarx_serve.server.http.body_budget import BodyBudget
from cifarx_serve.server.http.forwarded import UNIX, TrustedProxies, require_root_path
from cifarx_serve.server.http.request import Message, Request
from cifarx_serve.server.settings import Limits

PEER = "10.0.0.1"
SPOOFED = "6.6.6.6"


async def receive() -> Message:
    raise AssertionError("no body is read")


def request(*headers: tuple[str, str], peer: str | None = PEER, path: str = "/v1/predict") -> Request:
    scope: dict[str, Any] = {
        "method": "GET",
        "path": path,
        "scheme": "http",
        "client": peer and (peer, 1234),
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
    }
    return Request(scope, receive, Limits(), BodyBudget(1))


def client(trusted: tuple[str, ...], *forwarded_for: str, peer: str | None = PEER) -> str | None:
    """Return the client of a request with these `X-Forwarded-For` headers."""
    forwarded = request(*(("X-Forwarded-For", value) for value in forwarded_for), peer=peer)
    TrustedProxies(trusted).apply(forwarded)
    address = forwarded.scope["client"]
    return None if address is None else str(address[0])


@pytest.mark.parametrize(
    ("forwarded_for", "expected"),
    [
        (("1.2.3.4",), "1.2.3.4"),
        ((f"{SPOOFED}, 1.2.3.4",), "1.2.3.4"),
        ((f"{SPOOFED},1.2.3.4, 10.9.9.9",), "1.2.3.4"),
        ((SPOOFED, "1.2.3.4", "10.9.9.9"), "1.2.3.4"),
        (("10.1.1.1, 10.2.2.2",), "10.1.1.1"),
        (("1.2.3.4:5678",), "1.2.3.4"),
        (("2001:db8::1",), "2001:db8::1"),
        (("[2001:db8::1]:443",), "2001:db8::1"),
        (("[2001:db8::1]",), "2001:db8::1"),
        (("::ffff:1.2.3.4",), "1.2.3.4"),
        (("1.2.3.4, ::ffff:10.2.2.2",), "1.2.3.4"),
        ((f"{SPOOFED}, unknown, 10.2.2.2",), "10.2.2.2"),
        ((f"{SPOOFED}, ",), PEER),
        (("unknown",), PEER),
        (("",), PEER),
        ((), PEER),
    ],
)
def test_the_client_is_the_last_address_that_is_not_trusted(forwarded_for: tuple[str, ...], expected: str) -> None:
    assert client(("10.0.0.0/8",), *forwarded_for) == expected


@pytest.mark.parametrize(
    ("peer", "forwarded_for", "expected"),
    [
        (PEER, [f"{SPOOFED}, 1.2.3.4"], "1.2.3.4"),
        (PEER, [SPOOFED, "1.2.3.4, 10.2.2.2"], "1.2.3.4"),
        (PEER, [], PEER),
        (PEER, ["unknown"], PEER),
        ("11.0.0.1", [SPOOFED], "11.0.0.1"),
        ("", [SPOOFED], ""),
    ],
)
def test_the_client_of_a_call_over_grpc(peer: str, forwarded_for: list[str], expected: str) -> None:
    assert TrustedProxies(("10.0.0.0/8",)).client(peer, forwarded_for) == expected


@pytest.mark.parametrize(
    ("trusted", "peer", "is_trusted"),
    [
        (("10.0.0.0/8",), "11.0.0.1", False),
        (("10.0.0.0/8",), "::ffff:10.0.0.1", True),
        (("10.0.0.0/8",), None, False),
        (("10.0.0.0/8",), "2001:db8::1", False),
        (("2001:db8::/32",), "2001:db8::1", True),
        (("192.0.2.7",), "192.0.2.7", True),
        (("192.0.2.7",), "192.0.2.8", False),
        ((UNIX,), None, True),
        ((UNIX,), "127.0.0.1", False),
        (("10.0.0.0/8", UNIX), "10.0.0.1", True),
        (("0.0.0.0/0",), None, False),
    ],
)
def test_headers_of_other_peers_are_ignored(trusted: tuple[str, ...], peer: str | None, is_trusted: bool) -> None:
    forwarded = request(
        ("X-Forwarded-For", "1.2.3.4"), ("X-Forwarded-Proto", "https"), ("X-Forwarded-Prefix", "/models"), peer=peer
    )
    TrustedProxies(trusted).apply(forwarded)
    address, scheme = forwarded.scope["client"], forwarded.scope["scheme"]
    expected = ("1.2.3.4", "https", "/models") if is_trusted else (peer, "http", "")
    assert (address and address[0], scheme, forwarded.root_path) == expected


def test_the_forwarded_header_is_not_used_because_proxies_pass_it_on() -> None:
    forwarded = request(("Forwarded", f"for={SPOOFED};proto=https"))
    TrustedProxies((PEER,)).apply(forwarded)
    assert forwarded.scope["client"][0] == PEER
    assert forwarded.scope["scheme"] == "http"


@pytest.mark.parametrize(
    ("path", "expected"),
    [("/a/b/v1/predict", "/v1/predict"), ("/v1/predict", "/v1/predict"), ("/a/b", ""), ("/a/bc", "/a/bc")],
)
def test_a_prefix_is_removed_if_the_proxy_has_not(path: str, expected: str) -> None:
    forwarded = request(("X-Forwarded-Prefix", "/a/b/"), path=path)
    TrustedProxies((PEER,)).apply(forwarded)
    assert (forwarded.root_path, forwarded.path) == ("/a/b", expected)


@pytest.mark.parametrize("prefix", ["models", "//evil.example", "/a/../b", "/a b", "/a?b", "/\u00e4", "https://a/b"])
def test_an_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(RequestError, match=r"X-Forwarded-Prefix is .*: let the proxy send a path such as /prefix"):
        TrustedProxies((PEER,)).apply(request(("X-Forwarded-Prefix", prefix)))
    if prefix.isascii():
        with pytest.raises(UsageError, match="is not the prefix of a path: give it as /prefix"):
            require_root_path(prefix)


@pytest.mark.parametrize("prefix", ["", "/models", "/a/b-c/d.e_f~1", "/..a"])
def test_root_paths(prefix: str) -> None:
    assert require_root_path(prefix) == prefix


@pytest.mark.parametrize("prefix", ["/", "/a/", "/a//b", "/.", "/a/..", "/a%20b"])
def test_invalid_root_paths(prefix: str) -> None:
    with pytest.raises(UsageError, match="without a slash at the end"):
        require_root_path(prefix)


@pytest.mark.parametrize("network", ["10.0.0.1/8", "localhost", "*", "", "10.0.0.0/33", "Unix"])
def test_invalid_networks(network: str) -> None:
    with pytest.raises(UsageError, match=r"--trusted-proxy '.*' is not a network .*: give it as 10\.0\.0\.0/8"):
        TrustedProxies((network,))


@given(st.text(st.characters(codec="latin-1")), st.ip_addresses())
def test_what_the_client_sends_before_its_proxy_never_matters(sent: str, address: Any) -> None:
    trusted = TrustedProxies((PEER, "10.2.0.0/16"))
    forwarded = request(("X-Forwarded-For", sent), ("X-Forwarded-For", f"{address}, 10.2.3.4"))
    trusted.apply(forwarded)
    expected = getattr(address, "ipv4_mapped", None) or address
    if str(expected) != PEER and not str(expected).startswith("10.2."):
        assert forwarded.scope["client"][0] == str(expected)


@given(st.text(st.characters(codec="latin-1")), st.sampled_from(["/v1/predict", "/a", "/a/b"]))
def test_any_prefix_is_valid_or_refused(prefix: str, path: str) -> None:
    forwarded = request(("X-Forwarded-Prefix", prefix), path=path)
    try:
        TrustedProxies((PEER,)).apply(forwarded)
    except RequestError as error:
        assert error.status == 400
    else:
        assert require_root_path(forwarded.root_path) == forwarded.root_path
        assert path in (forwarded.path, forwarded.root_path + forwarded.path)
