"""`cifarx verify`"""

from typing import Annotated

import typer

from cifarx.console import json_result, note, result
from cifarx.options import AbsoluteTolerance, Broken, Checkpoint, DataName, Json, ModelName, RelativeTolerance


def command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A file that `cifarx export` made.")],
    ckpt: Checkpoint,
    model: ModelName = None,
    data: DataName = "auto",
    broken: Broken = "refuse",
    atol: AbsoluteTolerance = None,
    rtol: RelativeTolerance = None,
    json: Json = False,
) -> int:
    """Prove an artifact against a checkpoint again, on any data; exit 1 where it does not hold."""
    from cifarx_export.verification import verify

    report = verify(artifact, ckpt, model=model, data=data, broken=broken, atol=atol, rtol=rtol, progress=note)
    if json:
        json_result([report.row()])
    else:
        from cifarx.parity_lines import parity_lines

        result(parity_lines(report))
    failed = ", ".join(check.name for check in report.checks if not check.passed)
    if failed:
        note(f"error: {artifact} does not answer as {ckpt} does ({failed}): export it again")
    return 1 if failed else 0
