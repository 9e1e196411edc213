from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.api_keys import ApiKeys


def key_file(content: str | bytes) -> Path:
    path = Path("keys")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys(key_file("# of the shop\nfirst-key\n\n  second-key \r\n   # none\n"))


@pytest.mark.parametrize("key", [b"first-key", b"second-key"])
def test_each_key_of_the_file_may_ask(keys: ApiKeys, key: bytes) -> None:
    assert keys.allow({b"x-api-key": key})
    assert keys.allow({b"authorization": b"Bearer " + key})
    assert keys.allow({b"authorization": b"bearer  " + key + b" "})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"x-api-key": b""},
        {b"x-api-key": b"first-ke"},
        {b"x-api-key": b"first-key2"},
        {b"x-api-key": b"FIRST-KEY"},
        {b"x-api-key": b"# of the shop"},
        {b"x-api-key": b"# none"},
        {b"x-api-key": b"first-key\nsecond-key"},
        {b"x-api-key": b"\xff\xfe"},
        {b"authorization": b"first-key"},
        {b"authorization": b"Bearer"},
        {b"authorization": b"Bearer "},
        {b"authorization": b"Basic first-key"},
        {b"authorization": b"Bearer wrong"},
    ],
    ids=str,
)
def test_nobody_else_may(keys: ApiKeys, headers: dict[bytes, bytes]) -> None:
    assert not keys.allow(headers)


def test_keys_are_not_kept_as_they_are(keys: ApiKeys) -> None:
    assert "first-key" not in repr(vars(keys))


@given(st.binary(max_size=30))
def test_no_bytes_are_taken_for_another_key(given_key: bytes) -> None:
    keys = ApiKeys(key_file("secret"))
    assert keys.allow({b"x-api-key": given_key}) == (given_key == b"secret")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no API key in keys: write one key a line"),
        ("# nothing\n\n  \n", "no API key in keys"),
        ("good\nschlüssel\n", "API key 2 in keys is not of visible ASCII characters"),
        ("one\x07\n", "API key 1 in keys"),
        (b"\xff\xfe", "cannot read the API keys in keys"),
    ],
)
def test_a_file_without_sound_keys_is_refused(content: str | bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ApiKeys(key_file(content))


def test_an_absent_file_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot read the API keys in absent"):
        ApiKeys(Path("absent"))


def test_an_error_does_not_tell_the_key() -> None:
    with pytest.raises(UsageError) as raised:
        ApiKeys(key_file("geheim-ü"))
    assert "geheim" not in str(raised.value)
