"""The `cifarx doctor` command."""

from collections.abc import Iterator
from importlib.util import find_spec

import msgspec

from cifarx.options import Json
from cifarx.output.console import json_result, result, tick


class Finding(msgspec.Struct, frozen=True):
    """Whether one thing works on this machine; `required` ones determine the exit status."""

    name: str
    works: bool
    found: str
    required: bool = False


def command(json: Json = False) -> int:
    """Check what works on this machine.

    Run a model on each device and execution provider, and explain why the others do not work.
    """
    findings = [
        finding for check in (_check_runtime, _check_pytorch, _check_packages, _check_data) for finding in check()
    ]
    if json:
        json_result(findings)
    else:
        result(*[f"{tick(finding.works)} {finding.name:<22} {finding.found}" for finding in findings])
    return 0 if all(finding.works for finding in findings if finding.required) else 1


def _check_runtime() -> Iterator[Finding]:
    import onnxruntime

    from cifarx_serve.backends.onnxruntime.backend import provider_error
    from cifarx_serve.devices import Device
    from cifarx_serve.system.environment import current_environment

    machine = current_environment()
    yield Finding(
        "machine", True, f"{machine.system}, {machine.cpu}, {machine.threads} of {machine.cpus} CPUs for this process"
    )
    yield Finding("python", True, machine.python)
    for device in (Device("cpu"), Device("cuda"), Device("tensorrt")):
        problem = provider_error(device)
        found = f"ran a model, version {onnxruntime.__version__}" if problem is None else str(problem)
        yield Finding(f"onnxruntime {device.type}", problem is None, found, device.type == "cpu")


def _check_pytorch() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding("torch", False, 'not installed; needed to train and export: pip install "cifarx[train]"')
        return
    import torch

    from cifarx_serve.backends.torch.device import cuda_unavailable_reason

    yield Finding("torch cpu", bool(torch.ones(2).sum() == 2), f"ran, version {torch.__version__}")
    problem = cuda_unavailable_reason()
    if problem is None:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("torch cuda", bool(torch.ones(2, device="cuda").sum() == 2), f"ran on {', '.join(names)}")
    else:
        yield Finding("torch cuda", False, problem)
    available = torch.backends.mps.is_available()
    yield Finding("torch mps", available, "available" if available else "not available on this machine")


def _check_packages() -> Iterator[Finding]:
    for command, packages in (
        ("train", ("torch", "torchvision", "tensorboard")),
        ("export", ("torch", "onnx", "onnxscript")),
    ):
        missing = [package for package in packages if find_spec(package) is None]
        found = f'missing {", ".join(missing)}: pip install "cifarx[train]"' if missing else "ready"
        yield Finding(f"cifarx {command}", not missing, found)


def _check_data() -> Iterator[Finding]:
    import os
    from pathlib import Path

    from cifarx_train.data.selection import DATA_ENV_VAR

    path = os.environ.get(DATA_ENV_VAR)
    if path:
        exists = Path(path).exists()
        yield Finding(DATA_ENV_VAR, exists, path if exists else f"{path} does not exist")
    else:
        exists = Path("cifar10/cifar-10-batches-py").is_dir()
        found = "./cifar10" if exists else "not in ./cifar10; `--data auto` downloads it or uses the built-in drawings"
        yield Finding("CIFAR-10", exists, found)
