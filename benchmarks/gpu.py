"""Run everything that needs a GPU, and write the results with their environment: `make gpu`.

    python -m benchmarks.gpu [--out benchmarks/results]

The parts run one after the other, in order of value, within ten minutes. Each has a limit of its own, and none stops
the others. The report is written after every part. `$CIFARX_DATA` selects the images, as in all benchmarks.
"""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Final, NamedTuple

import typer

from cifarx.bench_report.summary import environment_line
from cifarx.output.console import note, print_error
from cifarx_serve.backends.onnxruntime.backend import provider_error
from cifarx_serve.devices import Device
from cifarx_serve.system.environment import current_environment
from cifarx_train.data.selection import DATA_ENV_VAR

TOTAL_S: Final = 590.0
_GRACE_S: Final = 5.0
"""How long a part may take to end after its limit."""
_MAX_LINES: Final = 80


class Part(NamedTuple):
    """A command with a limit.

    Attributes:
        name: a heading for the report.
        limit_s: the time after which the command and its processes are ended, in seconds.
        command: the program and its arguments.
    """

    name: str
    limit_s: float
    command: Sequence[str]


class PartResult(NamedTuple):
    """What became of a part.

    Attributes:
        status: "passed", "exit status N", "ended after N s" or "not started".
        seconds: how long it ran.
        output: the last lines of its output.
    """

    part: Part
    status: str
    seconds: float
    output: str


def run_parts(
    parts: Iterable[Part], directory: Path, environment: Mapping[str, str], total_s: float = TOTAL_S
) -> Iterator[PartResult]:
    """Run the parts one after the other, and yield the result of each.

    Args:
        parts: a failure of one, or its limit, does not stop the others.
        directory: the working directory of all parts.
        environment: the environment variables of all parts.
        total_s: the limit of all parts together, in seconds.
    """
    end = time.monotonic() + total_s
    for part in parts:
        limit_s = min(part.limit_s, end - time.monotonic())
        if limit_s <= 0:
            yield PartResult(part, "not started", 0.0, f"the {total_s:g} s of all parts were over")
        else:
            yield _run_part(part, directory, environment, limit_s)


def _run_part(part: Part, directory: Path, environment: Mapping[str, str], limit_s: float) -> PartResult:
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            # A session of its own, so that the processes that it starts are ended with it.
            process = subprocess.Popen(
                part.command,
                cwd=directory,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return PartResult(part, "exit status 127", 0.0, str(error))
        status = _wait(process, limit_s)
        output.seek(0)
        lines = output.read().splitlines()[-_MAX_LINES:]
    return PartResult(part, status, time.monotonic() - started, "\n".join(line.rstrip() for line in lines))


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    try:
        status = process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGINT)  # pytest then prints the results so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        return f"ended after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):  # nothing is left of the part
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return "passed" if status == 0 else f"exit status {status}"


def format_report(gpu: str, environment: str, results: Sequence[PartResult]) -> str:
    """Return the report in Markdown.

    Args:
        gpu: the name of the GPU.
        environment: the machine and the versions, on one line.
        results: one per part.
    """
    rows = [f"| {result.part.name} | {result.status} | {result.seconds:.0f} |" for result in results]
    sections = [
        f"# {gpu}",
        f"Measured by `make gpu` on {time.strftime('%Y-%m-%d')}.\n\n{environment}",
        "\n".join(("| part | result | s |", "| --- | --- | ---: |", *rows)),
    ]
    for result in results:
        command = " ".join(result.part.command).replace(sys.executable, "python")
        sections.append(f"## {result.part.name}\n\n```text\n$ {command}\n{result.output}\n```")
    return "\n\n".join(sections) + "\n"


def report_name(gpu: str) -> str:
    """Return the file name of the report of a GPU."""
    return f"gpu-{'-'.join(re.findall('[a-z0-9]+', gpu.lower()))}.md"


def gpu_parts(project: Path, *, with_onnx: bool) -> list[Part]:
    """Return the parts, in order of value.

    Args:
        project: the root of the source tree.
        with_onnx: whether ONNX Runtime can use the GPU.
    """
    python = sys.executable
    cifarx = [python, "-m", "cifarx"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(project)]
    data = "auto" if DATA_ENV_VAR in os.environ else "builtin"
    on_gpu = ["--data", data, "--device", "cuda"]
    formats = [word for name in ("onnx", "torchscript", "pt2") for word in ("--format", name)]
    training, gpu_training = (str(project / "benchmarks" / f"test_{name}.py") for name in ("training", "gpu_training"))

    def train(model: str, *options: str) -> list[str]:
        return [*cifarx, "train", "--model", model, "--out", model, *on_gpu, *options]

    def export(checkpoint: str, *options: str) -> list[str]:
        return [*cifarx, "export", "--ckpt", checkpoint, "--data", data, *options]

    def bench(stem: str, *suffixes: str) -> list[str]:
        files = [f"{stem}{suffix}" for suffix in suffixes if with_onnx or not suffix.endswith(".onnx")]
        return [*cifarx, "bench", *files, *on_gpu, "--batch", "1,64,512"]

    resnet_options = ["--recipe", "fast", "--precision", "bf16", "--epochs", "3"]
    return [
        Part("doctor", 30, [*cifarx, "doctor"]),
        Part("tests that need a GPU", 90, [*pytest, str(project / "tests"), "-m", "gpu", "-rs"]),
        Part("train lzh, notes", 60, train("lzh")),
        Part("train fastnet, fast", 45, train("fastnet", "--recipe", "fast")),
        Part("train resnet34, fast, bf16", 45, train("resnet34", *resnet_options)),
        Part("resume lzh", 30, train("lzh", "--epochs", "12", "--resume", "auto")),
        Part("images/s against the notes' loop", 75, [*pytest, training, "-k", "cuda", "--limits", "report", "-rx"]),
        Part("export lzh", 60, export("lzh/lzh_9.pth", *formats, "--precision", "fp32", "--precision", "fp16")),
        Part("bench lzh", 60, bench("lzh/lzh_9", ".pth", ".torchscript.pt", ".pt2", ".onnx", ".fp16.onnx")),
        Part("images/s by precision, format and graph", 75, [*pytest, gpu_training, "-k", "images"]),
        Part("seconds to an accuracy", 75, [*pytest, gpu_training, "-k", "seconds"]),
        Part("export resnet34", 75, export("resnet34/resnet34_2.pth", *formats[:4])),
        Part("bench resnet34", 60, bench("resnet34/resnet34_2", ".pth", ".torchscript.pt", ".onnx")),
    ]


def _find_gpu() -> tuple[str, str | None]:
    """Return the name of the first GPU that PyTorch can use, and otherwise why there is none."""
    import torch

    from cifarx_serve.backends.torch.device import cuda_unavailable_reason

    reason = cuda_unavailable_reason()
    return (torch.cuda.get_device_name(0), None) if reason is None else ("", reason)


def main(
    out: Annotated[Path, typer.Option(help="The folder of the report.")] = Path("benchmarks/results"),
) -> None:
    """Run everything that needs a GPU."""
    gpu, reason = _find_gpu()
    if reason is not None:
        print_error(f"nothing here can be measured without a GPU ({reason}): run it on a machine with an NVIDIA GPU")
        raise typer.Exit(2)
    project = Path(__file__).parents[1]
    report = out.absolute() / report_name(gpu)
    environment = environment_line(current_environment())
    folders = [str(project), *(str(project / room) for room in ("cli", "export", "train", "serve"))]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])}
    results: list[PartResult] = []
    with tempfile.TemporaryDirectory(prefix="cifarx-gpu-") as directory:
        parts = gpu_parts(project, with_onnx=provider_error(Device("cuda")) is None)
        for result in run_parts(parts, Path(directory), variables):
            note(f"{result.part.name}: {result.status}, {result.seconds:.0f} s")
            results.append(result)
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(format_report(gpu, environment, results), encoding="utf-8")
    note(f"wrote {report}")
    raise typer.Exit(0 if all(result.status == "passed" for result in results) else 1)


if __name__ == "__main__":
    typer.run(main)
