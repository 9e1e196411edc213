"""The versions of the libraries that decide what a model answers."""

from importlib.metadata import PackageNotFoundError, version

_LIBRARIES = ("torch", "torchvision", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime", "numpy", "pillow")


def package_version() -> str:
    """Of cifarx, as installed; "0" where it is not."""
    try:
        return version("cifarx")
    except PackageNotFoundError:
        return "0"


def library_versions() -> dict[str, str]:
    """Installed version by distribution name; what is not installed is left out."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
