from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.errors import UsageError
from cifarx_serve.server.http.api_keys import ApiKeys


def write_keys(content: str | bytes) -> Path:
    path = Path("keys")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def keys() -> ApiKeys:
    return ApiKeys(write_keys("# a comment\nfirst-key\n\n  second-key \r\n   # none\n"))


@pytest.mark.parametrize("key", [b"first-key", b"second-key"])
def test_accepts_each_key_of_the_file(keys: ApiKeys, key: bytes) -> None:
    assert keys.authenticate({b"x-api-key": key})
    assert keys.authenticate({b"authorization": b"Bearer " + key})
    assert keys.authenticate({b"authorization": b"bearer  " + key + b" "})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {b"x-api-key": b""},
        {b"x-api-key": b"first-ke"},
        {b"x-api-key": b"first-key2"},
        {b"x-api-key": b"FIRST-KEY"},
        {b"x-api-key": b"# a comment"},
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
def test_rejects_other_credentials(keys: ApiKeys, headers: dict[bytes, bytes]) -> None:
    assert not keys.authenticate(headers)


def test_does_not_keep_the_keys_in_plain_text(keys: ApiKeys) -> None:
    assert "first-key" not in repr(vars(keys))


@given(st.binary(max_size=30))
def test_accepts_no_other_bytes(candidate: bytes) -> None:
    keys = ApiKeys(write_keys("secret"))
    assert keys.authenticate({b"x-api-key": candidate}) == (candidate == b"secret")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no API key in keys: write one key per line"),
        ("# nothing\n\n  \n", "no API key in keys"),
        ("good\nschlüssel\n", "API key 2 in keys has characters other than printable ASCII: choose another key"),
        ("one\x07\n", "API key 1 in keys"),
        (b"\xff\xfe", "cannot read the API keys in keys"),
    ],
)
def test_rejects_a_file_without_valid_keys(content: str | bytes, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        ApiKeys(write_keys(content))


def test_rejects_a_missing_file() -> None:
    with pytest.raises(UsageError, match="cannot read the API keys in absent"):
        ApiKeys(Path("absent"))


def test_an_error_does_not_contain_the_key() -> None:
    with pytest.raises(UsageError) as raised:
        ApiKeys(write_keys("geheim-ü"))
    assert "geheim" not in str(raised.value)
