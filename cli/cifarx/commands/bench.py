"""`cifarx bench`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.console import json_result, note
from cifarx.options import Broken, DataName, DeviceName, Json
from cifarx_serve.errors import UsageError


def command(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Checkpoints and artifacts of one input size.")],
    batch: Annotated[str, typer.Option(metavar="N,N,...", help="Batch sizes.")] = "1,64",
    device: DeviceName = "auto",
    data: DataName = "auto",
    broken: Broken = "refuse",
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the report there too, as .json or .md.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure files side by side: latency, throughput, and whether they agree with the first."""
    from cifarx.benchmark_report import check_suffix, print_report, write_report
    from cifarx_serve.backends.registry import read_spec
    from cifarx_serve.benchmark import benchmark
    from cifarx_train.data.selection import select_data_like

    if report:
        check_suffix(report)
    batches = _batch_sizes(batch)
    spec = read_spec(files[0])
    chosen = select_data_like(spec.training.data if spec.training else None, data, broken)
    images = chosen.load("test", spec.input).images
    measured = benchmark([Path(file) for file in files], images, chosen.name, batches, device, progress=note)
    if report:
        write_report(measured, report)
        note(f"wrote {report}")
    if json:
        json_result(measured)
    else:
        print_report(measured)


def _batch_sizes(text: str) -> list[int]:
    """`1,8,64` as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"batch sizes {text!r}", "give whole numbers with commas between, such as 1,8,64") from error
