"""cifarx takes an image classifier from training to deployment and proves every hop.

The Python face: each name is imported when it is first used, so `import cifarx` costs nothing and a machine
without PyTorch can `cifarx.load("lzh_9.onnx")`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cifarx_export.export import export
    from cifarx_export.verify import verify
    from cifarx_serve.backends.registry import read_spec
    from cifarx_serve.benchmarking.benchmark import benchmark
    from cifarx_serve.errors import CifarxError
    from cifarx_serve.predictor import load
    from cifarx_train.train import train

__version__ = "0.1.0"

__all__ = ["CifarxError", "benchmark", "export", "load", "read_spec", "train", "verify"]

_HOMES = {
    "CifarxError": "cifarx_serve.errors",
    "benchmark": "cifarx_serve.benchmarking.benchmark",
    "export": "cifarx_export.export",
    "load": "cifarx_serve.predictor",
    "read_spec": "cifarx_serve.backends.registry",
    "train": "cifarx_train.train",
    "verify": "cifarx_export.verify",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'cifarx' has no attribute {name!r}")
    import_module("cifarx_train")  # offers its backend, also where no entry point does
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
