"""Cache TensorRT engines on disk. Building an engine takes tens of seconds, and loading one takes less than one."""

import hashlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from cifarx_serve.backends.onnxruntime import tensorrt_libraries
from cifarx_serve.errors import FallbackWarning
from cifarx_serve.files.cache_directory import cache_directory, create_cache_directory, require_own

_NAME: Final = "tensorrt"


@contextmanager
def engine_cache(model: Path) -> Iterator[dict[str, str]]:
    """Yield the provider options with which a session loads the cached engine of a model file, or builds and caches it.

    ONNX Runtime writes an engine in place and does not notice an incomplete one. So the engine is built in a temporary
    directory, which is renamed after the session was created: a killed process leaves nothing that another one would
    load. The timings of the kernels are kept for other models with similar layers. Another version of TensorRT, of ONNX
    Runtime or of the file uses another directory, and another kind of GPU uses another engine in the same directory.

    If the cache cannot be written, or belongs to another user, whose engine would be code that this process runs, a
    FallbackWarning is issued and the engine is built each time.
    """
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary: Path | None = None
    try:
        folder = create_cache_directory(_NAME) / _versions()
        if not (cached := folder / digest).is_dir():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder))
            _copy_timings(folder, temporary)
        else:
            require_own(cached)
    except OSError as error:
        _remove(temporary)
        yield {}
        message = f"the TensorRT engine of {model} is built each time: it cannot be cached ({error})"
        warnings.warn(message, FallbackWarning, stacklevel=2)
        return
    try:
        yield _provider_options(temporary or cached, digest)
        if temporary:
            _publish(temporary, cached)
    except Exception:
        _remove(cached)  # the engine may be damaged, so the next session builds another one
        raise
    finally:
        _remove(temporary)


def engine_cache_dir() -> Path:
    """Return the directory of all engines; see `cache_directory`."""
    return cache_directory(_NAME)


def _versions() -> str:
    import onnxruntime

    if (version := tensorrt_libraries.version()) is None:
        raise OSError("the version of TensorRT is unknown")
    return f"{version}-{onnxruntime.__version__}"


def _provider_options(folder: Path, prefix: str) -> dict[str, str]:
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


def _publish(temporary: Path, cached: Path) -> None:
    """Rename the directory, unless another process was first. The latest timings replace the earlier ones."""
    with suppress(OSError):
        for timing in temporary.glob("*.timing"):
            timing.replace(cached.parent / timing.name)
        temporary.rename(cached)


def _remove(folder: Path | None) -> None:
    if folder:
        shutil.rmtree(folder, ignore_errors=True)
