"""Convert a requested device to an available PyTorch device. This module imports PyTorch."""

import warnings

import torch

from cifarx_serve.backends import cuda_libraries
from cifarx_serve.devices import Device
from cifarx_serve.errors import DeviceError, FallbackWarning, error_message
from cifarx_serve.system.cpus import available_cpus


def torch_device(device: Device) -> torch.device:
    """Return the PyTorch device, which is available. `auto` selects the first CUDA device if there is one, or the CPU.

    This also sets the number of PyTorch's threads to the CPUs this process may use, and disables TF32 so that fp32 has
    full precision.

    Raises:
        DeviceError: the device was requested by name and is not available.
    """
    torch.set_num_threads(available_cpus())
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        _require_cuda(device.index)
        return torch.device("cuda", device.index)
    if device.type == "tensorrt":
        raise DeviceError(
            f"PyTorch does not support device {device}",
            "use --device cuda, or an ONNX file: backend onnxruntime supports TensorRT",
        )
    if device.type in ("gpu", "npu"):
        raise DeviceError(
            f"PyTorch does not support device {device}, which is Intel's", "use --device cuda, or an OpenVINO file"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps was requested, but PyTorch cannot use it on this machine", "use --device cpu")
    if device.type == "auto":
        return _best_device()
    return torch.device(device.type)


def _best_device() -> torch.device:
    """Return the first CUDA device or the CPU, with a FallbackWarning if there is a GPU that PyTorch cannot use."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if cuda_libraries.has_driver():
        warnings.warn(f"running on the CPU: {cuda_unavailable_reason()}", FallbackWarning, stacklevel=3)
    return torch.device("cpu")


def cuda_unavailable_reason() -> str | None:
    """Return why PyTorch cannot use CUDA on this machine, or None if it can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return error_message(error).split(". ")[0].rstrip(".")
    return None if torch.cuda.is_available() else "PyTorch finds no usable GPU"


def _require_cuda(index: int) -> None:
    if reason := cuda_unavailable_reason():
        raise DeviceError(
            f"device cuda:{index} was requested, but PyTorch cannot use it ({reason})",
            "use --device cpu, or run `cifarx doctor`",
        )
    if index >= (count := torch.cuda.device_count()):
        remedy = "use cuda:0" if count == 1 else f"use cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"device cuda:{index} was requested, but there are {count} GPUs", remedy)
