"""`cifarx doctor`"""

from collections.abc import Iterator
from importlib.util import find_spec

import msgspec

from cifarx.options import Json
from cifarx.output.console import json_result, result, tick


class Finding(msgspec.Struct, frozen=True):
    """One thing that works here or does not; `required` ones decide the exit status."""

    name: str
    works: bool
    found: str
    required: bool = False


def command(json: Json = False) -> int:
    """Find out which devices and providers really work here, and why the others do not."""
    findings = [finding for examine in (_runtime, _pytorch, _rooms, _data) for finding in examine()]
    if json:
        json_result(findings)
    else:
        result("\n".join(f"{tick(finding.works)} {finding.name:<22} {finding.found}" for finding in findings))
    return 0 if all(finding.works for finding in findings if finding.required) else 1


def _runtime() -> Iterator[Finding]:
    import onnxruntime

    from cifarx_serve.backends.onnxruntime.backend import provider_problem
    from cifarx_serve.devices import Device
    from cifarx_serve.system.environment import environment

    here = environment()
    yield Finding("machine", True, f"{here.system}, {here.cpu}, {here.threads} of {here.cpus} CPUs for this process")
    yield Finding("python", True, here.python)
    for device in (Device("cpu"), Device("cuda"), Device("tensorrt")):
        problem = provider_problem(device)
        found = f"ran a model, version {onnxruntime.__version__}" if problem is None else str(problem)
        yield Finding(f"onnxruntime {device.kind}", problem is None, found, device.kind == "cpu")


def _pytorch() -> Iterator[Finding]:
    if find_spec("torch") is None:
        yield Finding("torch", False, 'not installed; to train and export: pip install "cifarx[train]"')
        return
    import torch

    from cifarx_serve.backends.torch.device import cuda_problem

    yield Finding("torch cpu", bool(torch.ones(2).sum() == 2), f"ran, version {torch.__version__}")
    problem = cuda_problem()
    if problem is None:
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        yield Finding("torch cuda", bool(torch.ones(2, device="cuda").sum() == 2), f"ran on {', '.join(names)}")
    else:
        yield Finding("torch cuda", False, problem)
    available = torch.backends.mps.is_available()
    yield Finding("torch mps", available, "there" if available else "not on this machine")


def _rooms() -> Iterator[Finding]:
    for command, packages in (
        ("train", ("torch", "torchvision", "tensorboard")),
        ("export", ("torch", "onnx", "onnxscript")),
    ):
        missing = [package for package in packages if find_spec(package) is None]
        found = f'missing {", ".join(missing)}: pip install "cifarx[train]"' if missing else "ready"
        yield Finding(f"cifarx {command}", not missing, found)


def _data() -> Iterator[Finding]:
    import os
    from pathlib import Path

    from cifarx_train.data.selection import DATA_ENV_VAR

    named = os.environ.get(DATA_ENV_VAR)
    if named:
        there = Path(named).exists()
        yield Finding(DATA_ENV_VAR, there, named if there else f"{named} does not exist")
    else:
        there = Path("cifar10/cifar-10-batches-py").is_dir()
        found = "./cifar10" if there else "not in ./cifar10; `--data auto` downloads it or takes the built-in drawings"
        yield Finding("CIFAR-10", there, found)
