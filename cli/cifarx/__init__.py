"""cifarx takes an image classifier from training to deployment and checks every step.

This package is the Python API. Each name is imported when it is first used, so `import cifarx` is fast, and
`cifarx.load("lzh_9.onnx")` works without PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cifarx_export.export import export
    from cifarx_export.optimization.optimize import optimize
    from cifarx_export.verify import verify
    from cifarx_serve.backends.registry import read_spec
    from cifarx_serve.benchmarking.benchmark import benchmark
    from cifarx_serve.errors import CifarxError
    from cifarx_serve.predictor import load
    from cifarx_train.data.selection import DataSource
    from cifarx_train.models.preprocessing import Preprocessing
    from cifarx_train.train import train

__version__ = "0.2.0"

__all__ = [
    "CifarxError",
    "DataSource",
    "Preprocessing",
    "benchmark",
    "export",
    "load",
    "optimize",
    "read_spec",
    "train",
    "verify",
]

_MODULES = {
    "CifarxError": "cifarx_serve.errors",
    "DataSource": "cifarx_train.data.selection",
    "Preprocessing": "cifarx_train.models.preprocessing",
    "benchmark": "cifarx_serve.benchmarking.benchmark",
    "export": "cifarx_export.export",
    "load": "cifarx_serve.predictor",
    "optimize": "cifarx_export.optimization.optimize",
    "read_spec": "cifarx_serve.backends.registry",
    "train": "cifarx_train.train",
    "verify": "cifarx_export.verify",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'cifarx' has no attribute {name!r}")
    import_module("cifarx_train")  # registers its backend, for a source tree that is not installed
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
