import os
import string
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.errors import UsageError
from cifarx_serve.server.settings import (
    Limits,
    Settings,
    absolute_path,
    files_by_name,
    limit_options,
    limits_from_options,
)


def model_names(*paths: str) -> list[str]:
    return list(files_by_name(paths))


def test_the_model_name_is_the_file_name_without_suffix() -> None:
    assert model_names("models/lzh_9.onnx") == ["lzh_9"]
    assert model_names("lzh_9.embedded.onnx", "lzh_9.torchscript.pt") == ["lzh_9.embedded", "lzh_9.torchscript"]


def test_files_keep_their_order(tmp_path: Path) -> None:
    files = files_by_name(["b.onnx", str(tmp_path / "a.onnx")])
    assert list(files.items()) == [("b", Path("b.onnx")), ("a", tmp_path / "a.onnx")]


def test_files_of_the_same_stem_keep_their_suffixes() -> None:
    assert model_names("lzh_9.onnx", "lzh_9.pt2", "other.onnx") == ["lzh_9-onnx", "lzh_9-pt2", "other"]


def test_files_of_the_same_name_are_numbered() -> None:
    assert model_names("old/lzh_9.onnx", "new/lzh_9.onnx") == ["lzh_9-onnx-0", "lzh_9-onnx-1"]


def test_the_current_directory_has_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    assert files_by_name(["."]) == {"repository": Path()}


def test_a_name_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files_by_name(["cats=a.onnx", "b.onnx", "v1.2=c/a.onnx"]) == {
        "cats": Path("a.onnx"),
        "b": Path("b.onnx"),
        "v1.2": Path("c/a.onnx"),
    }
    (tmp_path / "cats=a.onnx").touch()
    assert model_names("cats=a.onnx") == ["cats=a"], "a file of this name wins"
    assert model_names("a b=c.onnx", "./x=y.onnx", "x=") == ["a b=c", "x=y", "x="]
    with pytest.raises(UsageError, match="two models have the name a: name one of them, as in NAME=FILE"):
        model_names("a.onnx", "a=b.onnx")


def test_rejects_no_files() -> None:
    with pytest.raises(UsageError, match="no file to serve: name at least one model file"):
        files_by_name([])


def test_rejects_a_file_named_twice() -> None:
    with pytest.raises(UsageError, match=r"a\.onnx is named twice: name each file once"):
        model_names("a.onnx", "b.onnx", "./a.onnx")


parts = st.text(string.ascii_lowercase[:2] + ".-01", min_size=1, max_size=6).filter(
    lambda part: part not in (".", "..")
)


@given(st.lists(st.builds("{}/{}".format, parts, parts), min_size=1, max_size=6, unique_by=Path))
def test_model_names_are_unique(paths: list[str]) -> None:
    files = files_by_name(paths)
    assert list(files.values()) == [Path(path) for path in paths]
    assert all(name and "/" not in name for name in files)


def test_names_are_safe_to_print() -> None:
    assert list(files_by_name(["a\x1b[31m\nb.onnx", "\u202ec.onnx"])) == ["a�[31m�b", "�c"]


def test_a_path_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(UsageError, match="is not valid UTF-8: rename the file or its directory"):
        absolute_path(Path(os.fsdecode(b"/models/\xff/a.onnx")))


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
