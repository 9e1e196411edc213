"""`cifarx verify`"""

from pathlib import Path
from typing import Annotated

import typer

from cifarx.options import (
    AbsoluteTolerance,
    Broken,
    DataName,
    DeviceName,
    Json,
    ModelName,
    OnError,
    RelativeTolerance,
    ReportPage,
    resolve_on_error,
)
from cifarx.output.console import json_result, note, result


def command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A file that a backend opens.")],
    reference: Annotated[
        str | None, typer.Argument(metavar="[REFERENCE]", help="Another, to agree with, in place of --ckpt.")
    ] = None,
    ckpt: Annotated[
        str | None, typer.Option("--ckpt", metavar="FILE", help="The checkpoint to agree with: a .pth file.")
    ] = None,
    model: ModelName = None,
    data: DataName = "auto",
    on_error: OnError = None,
    broken: Broken = None,
    device: DeviceName = "cpu",
    batch: Annotated[int | None, typer.Option(help="Compare this batch size too, beside 1, 3 and 64.")] = None,
    spec: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A model spec for a file that carries none, as `inspect --json` prints it."),
    ] = None,
    locate: Annotated[bool, typer.Option("--locate", help="Name the first layer that differs.")] = False,
    page: ReportPage = None,
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    json: Json = False,
) -> int:
    """Compare a file with a checkpoint or any other file again, on any data; exit 1 where it does not hold."""
    from cifarx_export.verify import verify

    report = verify(
        artifact,
        reference,
        checkpoint=ckpt,
        model=model,
        data=data,
        on_error=resolve_on_error(on_error, broken),
        device=device,
        batch=batch,
        spec=spec,
        locate=locate,
        html_report=page,
        atol=atol,
        rtol=rtol,
        progress=note,
    )
    if json:
        json_result([report.row()])
    else:
        from cifarx.output.parity import parity_lines

        result(parity_lines(report))
    if page:
        note(f"wrote {page}")
    if json and locate:
        for check in report.checks:
            if check.name == "layer":
                note(f"note: {check.found}")
    failed = ", ".join(check.name for check in report.checks if not check.passed)
    if failed:
        note(f"error: {artifact} does not answer as {reference or ckpt} does ({failed}): export it again")
    return 1 if failed else 0
