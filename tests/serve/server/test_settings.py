import msgspec
import pytest

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.server.settings import (
    Limits,
    Settings,
    limit_options,
    limits_from_options,
)


def test_settings_round_trip_through_json() -> None:
    settings = Settings(
        files={"a": "/a.onnx", "b": "/b.pt2"},
        registered_backends=registered_backends(),
        limits=Limits(max_batch=8, deadline_s=0.25),
        cors_origin="https://example.org",
    )
    assert settings.registered_backends
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


@pytest.mark.parametrize("limit", ['{"max_batch":0}', '{"deadline_s":0}', '{"max_delay_us":-1}', '{"max_images":1.5}'])
def test_rejects_a_limit_out_of_bounds(limit: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(limit, type=Limits)


def test_limit_options() -> None:
    options = {option.name: (option.minimum, option.default) for option in limit_options()}
    assert options == {
        "max_batch": (1, 64),
        "max_delay_us": (0, 0),
        "max_queue": (1, 256),
        "deadline_ms": (1, 10_000),
        "max_body_mb": (1, 32),
        "max_pixels": (1, 50_000_000),
        "max_images": (1, 64),
        "max_connections": (1, 1024),
        "load_timeout_s": (1, 30),
    }
    assert all(option.help.endswith(".") for option in limit_options())


def test_limits_from_options_converts_units() -> None:
    limits = limits_from_options({"deadline_ms": 7, "max_body_mb": 3, "max_pixels": 2**60 + 1})
    assert limits == Limits(deadline_s=0.007, max_body_bytes=3 * 2**20, max_pixels=2**60 + 1)


def test_the_defaults_of_the_options_are_the_default_limits() -> None:
    assert limits_from_options({option.name: option.default for option in limit_options()}) == Limits()
