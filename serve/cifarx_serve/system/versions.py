"""The installed versions of cifarx and of the libraries that affect a model's outputs."""

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow")


def package_version() -> str:
    """Return the installed version of cifarx, or "0" if it is not installed."""
    try:
        return version("cifarx")
    except PackageNotFoundError:
        return "0"


def library_versions() -> dict[str, str]:
    """Return the installed version of each library by its distribution name. Libraries not installed are omitted."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
