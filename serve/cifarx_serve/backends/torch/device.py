"""A device's name as PyTorch's device, checked. Imports PyTorch: for the backends that run it."""

import warnings

import torch

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning
from cifarx_serve.system.cpus import available_cpus


def torch_device(device: Device) -> torch.device:
    """The device, there and ready; `auto` is the first GPU where there is one, else the CPU.

    Also gives PyTorch as many threads as this process may use, and switches TF32 off: fp32 means fp32.

    Raises:
        DeviceError: it was asked for by name and cannot be had.
    """
    torch.set_num_threads(available_cpus())
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.kind == "cuda":
        _require_cuda(device.number)
        return torch.device("cuda", device.number)
    if device.kind == "tensorrt":
        raise DeviceError(
            f"PyTorch has no device {device}", "use --device cuda, or an ONNX file: backend onnxruntime has TensorRT"
        )
    if device.kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps was asked for and PyTorch has none here", "use --device cpu")
    if device.kind == "auto":
        return _best_device()
    return torch.device(device.kind)


def _best_device() -> torch.device:
    """The first GPU where PyTorch can use one; told where a GPU's driver is there and PyTorch cannot."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if cuda_libraries.has_driver():
        warnings.warn(f"running on the CPU: {cuda_problem()}", FallbackWarning, stacklevel=3)
    return torch.device("cpu")


def cuda_problem() -> str | None:
    """Why PyTorch cannot use CUDA here, or None where it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).strip().split(". ")[0].splitlines()[0].rstrip(".")
    return None if torch.cuda.is_available() else "PyTorch finds no usable GPU"


def _require_cuda(index: int) -> None:
    if problem := cuda_problem():
        raise DeviceError(
            f"device cuda:{index} was asked for and PyTorch cannot use it ({problem})",
            "use --device cpu, or run `cifarx doctor`",
        )
    if index >= (count := torch.cuda.device_count()):
        raise DeviceError(f"device cuda:{index} was asked for and there are {count}", "count from cuda:0")
