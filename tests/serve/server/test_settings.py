import string
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarx_serve.backends.registry import registered_backends
from cifarx_serve.errors import UsageError
from cifarx_serve.server.settings import Limits, Settings, served_names


def names(*paths: str) -> list[str]:
    return list(served_names([Path(path) for path in paths]))


def test_a_file_is_served_under_its_name_without_the_suffix() -> None:
    assert names("models/lzh_9.onnx") == ["lzh_9"]
    assert names("lzh_9.embedded.onnx", "lzh_9.torchscript.pt") == ["lzh_9.embedded", "lzh_9.torchscript"]


def test_files_stay_in_order_with_their_whole_paths(tmp_path: Path) -> None:
    served = served_names([Path("b.onnx"), tmp_path / "a.onnx"])
    assert list(served.items()) == [("b", str(Path.cwd() / "b.onnx")), ("a", str(tmp_path / "a.onnx"))]


def test_two_of_one_name_keep_their_suffixes() -> None:
    assert names("lzh_9.onnx", "lzh_9.pt2", "other.onnx") == ["lzh_9-onnx", "lzh_9-pt2", "other"]


def test_two_of_one_whole_name_have_numbers() -> None:
    assert names("old/lzh_9.onnx", "new/lzh_9.onnx") == ["lzh_9-onnx-0", "lzh_9-onnx-1"]


def test_a_folder_is_served_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    assert served_names([Path()]) == {"repository": str(tmp_path / "repository")}


def test_no_file_is_refused() -> None:
    with pytest.raises(UsageError, match="no file to serve"):
        served_names([])


def test_a_file_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a\.onnx is named twice: name each file once"):
        names("a.onnx", "b.onnx", "./a.onnx")


parts = st.text(string.ascii_lowercase[:2] + ".-01", min_size=1, max_size=6).filter(
    lambda part: part not in (".", "..")
)


@given(st.lists(st.builds("{}/{}".format, parts, parts), min_size=1, max_size=6, unique_by=Path))
def test_every_file_has_a_name_of_its_own(paths: list[str]) -> None:
    served = served_names([Path(path) for path in paths])
    assert list(served.values()) == [str(Path(path).absolute()) for path in paths]
    assert all(name and "/" not in name for name in served)


def test_settings_travel_as_json() -> None:
    settings = Settings(
        files={"a": "/a.onnx", "b": "/b.pt2"},
        registered=registered_backends(),
        limits=Limits(max_batch=8, deadline_s=0.25),
        cors_origin="https://example.org",
    )
    assert settings.registered
    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


@pytest.mark.parametrize("limit", ['{"max_batch":0}', '{"deadline_s":0}', '{"max_delay_us":-1}', '{"max_images":1.5}'])
def test_a_limit_that_means_nothing_does_not_arrive(limit: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(limit, type=Limits)
