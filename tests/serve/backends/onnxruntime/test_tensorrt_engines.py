"""These tests write files in place of ONNX Runtime."""

import os
from pathlib import Path

import onnxruntime
import pytest

from cifarx_serve.backends.onnxruntime import tensorrt_libraries
from cifarx_serve.backends.onnxruntime.tensorrt_engines import engine_cache, engine_cache_dir
from cifarx_serve.errors import FallbackWarning
from tests.support.file_owner import pretend_other_owner


@pytest.fixture(autouse=True)
def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101601)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"a model")
    return path


def open_once(model: Path) -> bool:
    """Load the engine as a session does, or build and write it. Return whether it was in the cache."""
    with engine_cache(model) as options:
        folder = Path(options["trt_engine_cache_path"])
        assert options["trt_timing_cache_path"] == str(folder)
        engine = folder / f"{options['trt_engine_cache_prefix']}_sm90.engine"
        found = engine.exists()
        engine.write_bytes(b"an engine")
        (folder / "all_sm90.timing").write_bytes(b"times")
    return found


def test_an_engine_is_built_once(model: Path) -> None:
    assert [open_once(model) for _ in range(3)] == [False, True, True]


def test_another_file_has_another_engine_that_starts_with_the_same_timings(model: Path) -> None:
    open_once(model)
    model.write_bytes(b"the model, trained longer")
    with engine_cache(model) as options:
        assert [path.name for path in Path(options["trt_engine_cache_path"]).iterdir()] == ["all_sm90.timing"]


def test_another_version_has_another_engine(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_once(model)
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: 101700)
    assert not open_once(model)
    monkeypatch.setattr(onnxruntime, "__version__", "99.0")
    assert not open_once(model)


def test_an_interrupted_build_leaves_nothing(model: Path) -> None:
    with pytest.raises(KeyboardInterrupt), engine_cache(model) as options:
        (Path(options["trt_engine_cache_path"]) / "half.engine").write_bytes(b"half")
        raise KeyboardInterrupt
    assert not [path for path in engine_cache_dir().rglob("*") if path.is_file()]
    assert not open_once(model)


def test_one_of_two_concurrent_builds_is_cached(model: Path) -> None:
    with engine_cache(model) as options:
        assert not open_once(model)
        (Path(options["trt_engine_cache_path"]) / "second.engine").write_bytes(b"second")
    assert open_once(model)
    assert not list(engine_cache_dir().rglob("second.engine"))
    assert not list(engine_cache_dir().rglob(".*"))


def test_an_engine_that_cannot_be_loaded_is_built_again(model: Path) -> None:
    open_once(model)
    with pytest.raises(ValueError, match="could not deserialize"), engine_cache(model):
        raise ValueError("could not deserialize engine from cache")
    assert [open_once(model) for _ in range(2)] == [False, True]


def test_the_cache_is_readable_only_by_the_user(model: Path) -> None:
    open_once(model)
    [folder] = engine_cache_dir().iterdir()
    assert folder.stat().st_mode & 0o077 == 0


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="the system has no user IDs")
@pytest.mark.parametrize("owned", ["cifarx", "tensorrt", "engine"])
def test_an_engine_of_another_user_is_not_loaded(model: Path, monkeypatch: pytest.MonkeyPatch, owned: str) -> None:
    """An engine is code that this process would run."""
    assert not open_once(model)
    (engine,) = (path for path in engine_cache_dir().glob("*/*") if path.is_dir())
    other = {"cifarx": engine_cache_dir().parent, "tensorrt": engine_cache_dir(), "engine": engine}[owned]
    pretend_other_owner(monkeypatch, other)
    with pytest.warns(FallbackWarning, match="belongs to another user"), engine_cache(model) as options:
        assert options == {}


@pytest.mark.parametrize("fault", ["no directory", "no version", "no home"])
def test_without_a_cache_the_engine_is_built_each_time_with_a_warning(
    model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "no directory":
        engine_cache_dir().parent.parent.mkdir()
        engine_cache_dir().parent.write_text("a file in its way")
    elif fault == "no version":
        monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: raises(RuntimeError("no home")))
    with (
        pytest.warns(FallbackWarning, match=r"is built each time: it cannot be cached"),
        engine_cache(model) as options,
    ):
        assert options == {}


def raises(error: Exception) -> Path:
    raise error


def test_the_exception_of_the_session_is_raised(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_libraries, "version", lambda: None)
    with pytest.raises(ValueError, match="no session"), engine_cache(model):
        raise ValueError("no session")


def test_relative_paths_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert engine_cache_dir() == Path.home() / ".cache" / "cifarx" / "tensorrt"
