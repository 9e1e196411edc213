"""TensorRT's engines, kept between processes: to build one takes tens of seconds, to read one less than one."""

import hashlib
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cifarx_serve.backends.onnxruntime import tensorrt_libraries
from cifarx_serve.errors import FallbackWarning


@contextmanager
def kept_engines(model: Path) -> Iterator[dict[str, str]]:
    """The provider options with which a session made inside finds the engine of a file, or builds and keeps it.

    ONNX Runtime writes an engine in place and takes half of one for whole. So it is built in a folder of its own,
    which gets its name when the session is made: a killed process leaves nothing that another would read. The time
    that each kernel took is kept for the next network of such layers. Another version of TensorRT, of ONNX Runtime or
    of the file is another folder; another kind of GPU another engine in it.

    Without a place to write it, an engine is built each time, told with a FallbackWarning.
    """
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    made: Path | None = None
    try:
        folder = engine_folder() / _versions()
        if not (kept := folder / digest).is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            _copy_timings(folder, made)
    except (OSError, RuntimeError) as error:  # RuntimeError: a user without a home
        _discard(made)
        yield {}
        told = f"building TensorRT's engine of {model} each time: it cannot be kept ({error})"
        warnings.warn(told, FallbackWarning, stacklevel=2)
        return
    try:
        yield _options(made or kept, digest)
        if made:
            _publish(made, kept)
    except Exception:
        _discard(kept)  # it may be damaged: the next session builds another
        raise
    finally:
        _discard(made)


def engine_folder() -> Path:
    """The folder of all engines, by the XDG base directory specification: what is no absolute path there is ignored.

    Raises:
        RuntimeError: the user has no home.
    """
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".cache") / "cifarx" / "tensorrt"


def _versions() -> str:
    import onnxruntime

    if (version := tensorrt_libraries.version()) is None:
        raise OSError("the version of TensorRT is not known")
    return f"{version}-{onnxruntime.__version__}"


def _options(folder: Path, prefix: str) -> dict[str, str]:
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_engine_cache_prefix": prefix,
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _copy_timings(source: Path, target: Path) -> None:
    for timing in source.glob("*.timing"):
        shutil.copyfile(timing, target / timing.name)


def _publish(made: Path, kept: Path) -> None:
    """Under its name, unless another process was first; of the timings the last that were written stay."""
    with suppress(OSError):
        for timing in made.glob("*.timing"):
            timing.replace(kept.parent / timing.name)
        made.rename(kept)


def _discard(made: Path | None) -> None:
    if made:
        shutil.rmtree(made, ignore_errors=True)
