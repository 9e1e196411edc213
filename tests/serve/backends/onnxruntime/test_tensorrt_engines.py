"""Files written where ONNX Runtime would write them."""

from pathlib import Path

import onnxruntime
import pytest

from cifarx_serve.backends.onnxruntime import tensorrt_engines, tensorrt_libraries
from cifarx_serve.backends.onnxruntime.tensorrt_engines import engine_folder, kept_engines
from cifarx_serve.errors import FallbackWarning


@pytest.fixture(autouse=True)
def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101601)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"a model")
    return path


def open_once(model: Path) -> bool:
    """As a session would: read the engine, or build it and write it; whether it was there."""
    with kept_engines(model) as options:
        folder = Path(options["trt_engine_cache_path"])
        assert options["trt_timing_cache_path"] == str(folder)
        engine = folder / f"{options['trt_engine_cache_prefix']}_sm90.engine"
        found = engine.exists()
        engine.write_bytes(b"an engine")
        (folder / "all_sm90.timing").write_bytes(b"times")
    return found


def test_built_once_and_found_again(model: Path) -> None:
    assert [open_once(model) for _ in range(3)] == [False, True, True]


def test_another_file_is_another_engine_that_starts_from_the_same_timings(model: Path) -> None:
    open_once(model)
    model.write_bytes(b"the model, trained longer")
    with kept_engines(model) as options:
        assert [path.name for path in Path(options["trt_engine_cache_path"]).iterdir()] == ["all_sm90.timing"]


def test_another_version_is_another_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_once(model)
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101700)
    assert not open_once(model)
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    assert not open_once(model)


def test_what_ended_early_leaves_nothing(model: Path) -> None:
    with pytest.raises(KeyboardInterrupt), kept_engines(model) as options:
        (Path(options["trt_engine_cache_path"]) / "half.engine").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not [path for path in engine_folder().rglob("*") if path.is_file()]
    assert not open_once(model)


def test_of_two_that_build_at_once_one_is_kept(model: Path) -> None:
    with kept_engines(model) as options:
        assert not open_once(model)
        (Path(options["trt_engine_cache_path"]) / "second.engine").write_bytes(b"second")
    assert open_once(model)
    assert not list(engine_folder().rglob("second.engine"))
    assert not list(engine_folder().rglob(".*"))


def test_one_that_no_session_takes_is_built_again(model: Path) -> None:
    open_once(model)
    with pytest.raises(ValueError, match="could not deserialize"), kept_engines(model):
        raise ValueError("could not deserialize engine from cache")
    assert [open_once(model) for _ in range(2)] == [False, True]


def test_only_the_user_reads_it(model: Path) -> None:
    open_once(model)
    [folder] = engine_folder().iterdir()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("fault", ["no folder", "no version", "no home"])
def test_without_a_place_it_is_built_each_time_and_said(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no folder":
        engine_folder().parent.parent.mkdir()
        engine_folder().parent.write_text("a file in its way")
    elif fault == "no version":
        monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    else:
        monkeypatch.setattr(tensorrt_engines, "engine_folder", lambda: raises(RuntimeError("no home")))
    with pytest.warns(FallbackWarning, match=r"each time: it cannot be kept"), kept_engines(model) as options:
        assert options == {}


def raises(error: Exception) -> Path:
    raise error


def test_a_session_that_cannot_be_made_is_the_error_alone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    with pytest.raises(ValueError, match="no session"), kept_engines(model):
        raise ValueError("no session")


def test_relative_paths_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert engine_folder() == Path.home() / ".cache" / "cifarx" / "tensorrt"
